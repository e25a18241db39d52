"""Measure the features of real moving digits, which FD-digits over frames and FD-digits-video compare with.

One command, from the repository root, in the environment of the trainings; it takes a minute on one core:

    python training/video_statistics.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from digits import describe_hardware
from moving_digits import FRAME_COUNT, MovingDigits
from safetensors.torch import save_file

from viditq_fx.demo.model import load_classifier
from viditq_fx.demo.video_metrics import (
    BACKGROUND,
    INK,
    VIDEO_STATISTICS_ASSET,
    class_loss,
    fd_digits_frames,
    fd_digits_video,
    frame_accuracy,
    frame_features,
    video_features,
)
from viditq_fx.quality import displacement, frame_difference, gaussian_statistics

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    """Write the statistics, and what real videos score against them: the floor of every generator."""
    parser = argparse.ArgumentParser(description="Measure the features of real moving digits.")
    parser.add_argument("--count", type=int, default=5000, help="videos behind the statistics")
    parser.add_argument("--floor-count", type=int, default=50, help="videos of each draw of the floor")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--assets", type=Path, default=REPOSITORY / "viditq_fx" / "demo" / "assets")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "training" / "results")
    options = parser.parse_args()
    classifier, digits = load_classifier(), MovingDigits.load()
    generator = torch.Generator().manual_seed(options.seed)
    video_n1fhw, label_n = digits.draw(options.count, FRAME_COUNT, generator)
    tensors = {}
    for kind, rows in (
        ("frame", frame_features(video_n1fhw, classifier).flatten(0, 1)),
        ("video", video_features(video_n1fhw, classifier)),
    ):
        mean_d, covariance_dd = gaussian_statistics(rows)
        tensors |= {f"{kind}_mean": mean_d.float(), f"{kind}_covariance": covariance_dd.float().contiguous()}
    save_file(tensors, options.assets / VIDEO_STATISTICS_ASSET)
    (options.assets / VIDEO_STATISTICS_ASSET).chmod(0o644)
    floor = [digits.draw(options.floor_count, FRAME_COUNT, generator)[0] for _ in range(3)]
    record = {
        "videos": options.count,
        "seed": options.seed,
        "frame_accuracy": frame_accuracy(video_n1fhw, label_n, classifier),
        "class_loss": class_loss(video_n1fhw, label_n, classifier),
        "frame_difference": frame_difference(video_n1fhw),
        "speed": displacement(video_n1fhw, BACKGROUND, INK).norm(dim=-1).mean().item(),
        "floor": {
            "videos": options.floor_count,
            "fd_digits_frames": [fd_digits_frames(part, classifier) for part in floor],
            "fd_digits_video": [fd_digits_video(part, classifier) for part in floor],
        },
        "hardware": describe_hardware(),
    }
    (options.results / "video_statistics.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
