"""Measure the trained video model: frame accuracy, FD-digits over frames and videos, motion, a grid to look at.

One command, from the repository root, in the environment of the trainings:

    python training/evaluate_video_dit.py

The figures go to training/results/video_dit_evaluation.json, the grid to video_dit_samples.png beside it: one video
a row, the digits 0 to 9.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import diffusers
import matplotlib
import torch
from digits import describe_hardware
from torch import Tensor

from viditq_fx.demo.model import load_classifier
from viditq_fx.demo.sampling import balanced_labels
from viditq_fx.demo.video import FRAME_COUNT, FRAME_SIZE, VideoDiT, load_video_dit, sample_videos
from viditq_fx.demo.video_metrics import (
    BACKGROUND,
    INK,
    class_loss,
    fd_digits_frames,
    fd_digits_video,
    frame_accuracy,
)
from viditq_fx.quality import displacement, frame_difference

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parents[1] / "training" / "results"


def figures(model: VideoDiT, options: argparse.Namespace, guidance: float) -> tuple[dict[str, Any], Tensor]:
    """Return the figures of one guidance, and its videos."""
    label_n, classifier = balanced_labels(options.count), load_classifier()
    start = time.monotonic()
    video_n1fhw = sample_videos(
        model, labels=label_n, seed=options.seed, steps=options.steps, guidance=guidance, batch_size=10
    )
    moved_nf2 = displacement(video_n1fhw, BACKGROUND, INK)
    row = {
        "guidance": guidance,
        "frame_accuracy": frame_accuracy(video_n1fhw, label_n, classifier),
        "class_loss": class_loss(video_n1fhw, label_n, classifier),
        "fd_digits_frames": fd_digits_frames(video_n1fhw, classifier),
        "fd_digits_video": fd_digits_video(video_n1fhw, classifier),
        "frame_difference": frame_difference(video_n1fhw),
        "speed": moved_nf2.norm(dim=-1).mean().item(),
        "seconds": round(time.monotonic() - start, 1),
    }
    print(row, flush=True)
    return row, video_n1fhw


def save_grid(video_n1fhw: Tensor, path: Path) -> None:
    """Write the first 10 videos, one a row, frames from left to right."""
    rows = video_n1fhw[:10, 0].permute(0, 2, 1, 3)
    grid_hw = rows.reshape(rows.shape[0] * FRAME_SIZE, FRAME_COUNT * FRAME_SIZE)
    grid_hw = grid_hw.repeat_interleave(3, dim=0).repeat_interleave(3, dim=1)
    plt.imsave(path, grid_hw.numpy(), cmap="gray", vmin=-1, vmax=1)


def main() -> None:
    """Measure and write the record and the grid."""
    parser = argparse.ArgumentParser(description="Measure the video diffusion transformer of moving digits.")
    parser.add_argument("--count", type=int, default=100, help="videos of each guidance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 3.0, 1.0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, rows = load_video_dit(), []
    options.results.mkdir(parents=True, exist_ok=True)
    for guidance in options.guidance:
        row, video_n1fhw = figures(model, options, guidance)
        rows.append(row)
        if len(rows) == 1:
            save_grid(video_n1fhw, options.results / "video_dit_samples.png")
    record = {
        "steps": options.steps,
        "videos": options.count,
        "seed": options.seed,
        "quality": rows,
        "hardware": describe_hardware(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }
    (options.results / "video_dit_evaluation.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
