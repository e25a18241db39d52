"""Measure the trained digits model: class accuracy, FD-digits over seeds, sampling time, a grid to look at.

One command, from the repository root, in the environment of the trainings:

    python training/evaluate_digits_dit.py

The figures go to training/results/digits_dit_evaluation.json, the grid to digits_dit_samples.png beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import diffusers
import matplotlib
import torch
from digits import describe_hardware, load_digits
from torch import Tensor

from viditq_fx.demo.metrics import class_accuracy, fd_digits
from viditq_fx.demo.model import load_classifier, load_digits_dit
from viditq_fx.demo.sampling import balanced_labels, sample

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parents[1] / "training" / "results"


def quality(model: Any, options: argparse.Namespace, guidance: float) -> tuple[dict[str, Any], Tensor]:
    """Return accuracy and FD-digits of every seed at one guidance, and the last seed's images."""
    labels_n = balanced_labels(options.count)
    classifier = load_classifier()
    accuracies, distances, images_n1hw = [], [], torch.empty(0)
    for seed in range(options.seeds):
        images_n1hw = sample(
            model,
            labels=labels_n,
            seed=seed,
            steps=options.steps,
            guidance=guidance,
            batch_size=options.batch_size,
        )
        accuracies.append(class_accuracy(images_n1hw, labels_n, classifier))
        distances.append(fd_digits(images_n1hw, classifier))
        print(
            f"guidance {guidance}  seed {seed}  accuracy {accuracies[-1]:.4f}  FD-digits {distances[-1]:.2f}",
            flush=True,
        )
    return {
        "guidance": guidance,
        "images_per_seed": options.count,
        "accuracy": accuracies,
        "accuracy_mean": statistics.mean(accuracies),
        "fd_digits": distances,
        "fd_digits_mean": statistics.mean(distances),
        "fd_digits_standard_deviation": statistics.stdev(distances) if len(distances) > 1 else None,
    }, images_n1hw


def seconds_to_sample(model: Any, options: argparse.Namespace) -> dict[str, float]:
    """Return the wall and CPU time of sampling 200 images, after one warm-up step of the same shape.

    The CPU time, summed over threads, says what the wall time would be on a machine with nothing else to do.
    """
    settings = {"seed": 0, "guidance": 2.0, "batch_size": options.batch_size}
    sample(model, labels=balanced_labels(1), steps=1, **settings)
    start, cpu_start = time.monotonic(), time.process_time()
    sample(model, labels=balanced_labels(200), steps=options.steps, **settings)
    return {"wall": time.monotonic() - start, "cpu": time.process_time() - cpu_start}


def nearest_real_distances(images_n1hw: Tensor) -> dict[str, float]:
    """Return how far images lie from the nearest training image, and real ones from the nearest other one.

    Root-mean-square pixel distances, medians. Generated images much nearer than real ones would be copies.
    """
    real_n1hw, _ = load_digits()
    pixels = images_n1hw[0].numel() ** 0.5
    generated_nm = torch.cdist(images_n1hw.flatten(1), real_n1hw.flatten(1)) / pixels
    among_real_nm = torch.cdist(real_n1hw[::10].flatten(1), real_n1hw.flatten(1)) / pixels
    return {
        "generated_to_real": generated_nm.min(dim=1).values.median().item(),
        "smallest_generated_to_real": generated_nm.min().item(),
        "real_to_other_real": among_real_nm.kthvalue(2, dim=1).values.median().item(),
    }


def save_grid(images_n1hw: Tensor, path: Path) -> None:
    """Write the first 100 images as 10 rows of the digits 0 to 9."""
    rows = images_n1hw[:100].reshape(-1, 10, 32, 32)
    grid_hw = rows.permute(0, 2, 1, 3).reshape(rows.shape[0] * 32, 320)
    grid_hw = grid_hw.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
    plt.imsave(path, grid_hw.numpy(), cmap="gray", vmin=-1, vmax=1)


def main() -> None:
    """Measure and write the record and the grid."""
    parser = argparse.ArgumentParser(description="Measure the demo's digits diffusion transformer.")
    parser.add_argument("--count", type=int, default=300, help="images per seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 3.0, 1.0])
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_digits_dit()
    eager_seconds = seconds_to_sample(model, options)
    start = time.monotonic()
    compiled = torch.compile(model)
    sample(compiled, labels=balanced_labels(1), seed=0, steps=1, batch_size=options.batch_size)
    compile_seconds = time.monotonic() - start
    compiled_seconds = seconds_to_sample(compiled, options)
    print(f"200 images: eager {eager_seconds}, compiled {compiled_seconds}", flush=True)
    qualities, images_n1hw = [], torch.empty(0)
    for guidance in options.guidance:
        figures, drawn_n1hw = quality(compiled, options, guidance)
        qualities.append(figures)
        if guidance == 2.0 or not len(images_n1hw):
            images_n1hw = drawn_n1hw
    record = {
        "steps": options.steps,
        "quality": qualities,
        "nearest_training_image": nearest_real_distances(images_n1hw),
        "seconds_for_200_images": {
            "eager_fp32": eager_seconds,
            "torch_compile_fp32": compiled_seconds,
            "compilation_and_first_step": compile_seconds,
            "batch_size": options.batch_size,
            "load_average": os.getloadavg()[0],
        },
        "hardware": describe_hardware(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "digits_dit_evaluation.json").write_text(json.dumps(record, indent=1) + "\n")
    save_grid(images_n1hw, options.results / "digits_dit_samples.png")


if __name__ == "__main__":
    main()
