"""Memory of quantized weights over that of bf16, scales and zero points included: measured, by scheme and model.

    PYTHONPATH=. python benchmarks/weights_memory.py [--out FILE]

The digits DiT and the video DiT as `vq.quantize_` leaves them: bytes of the storages that their quantized linears hold,
over two bytes for each weight of those linears. For large models the linears of one block with random weights, 256 rows
of each: a row is stored in the same way whatever their number is. `dvd-w4a8` and `dvd-w4a6` store what `dvd-w4a4` does,
`dvd-w4a6` once for both of its widths; inputs have no part in it. Biases stay in full precision and are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from cpu import _commit  # the script beside this one
from torch import nn

import viditq_fx as vq
from viditq_fx.demo.model import load_digits_dit
from viditq_fx.demo.sampling import initial_noise
from viditq_fx.demo.video import initial_video_noise, load_video_dit
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.scheme import QuantScheme

SCHEMES = ("w8a8", "w4a8", "w4a8-asym", "dvd-w4a4", "w4a8-g128", "w4a8-g128-asym", "w4a4-bgr-svd16")
ROWS = 256
BLOCKS: dict[str, tuple[tuple[int, int], ...]] = {
    "PixArt-Sigma (1152)": (*[(1152, 1152)] * 8, (1152, 4608), (4608, 1152)),
    "SD 3.5 large (2432)": (*[(2432, 2432)] * 8, *[(2432, 9728), (9728, 2432)] * 2),
    "FLUX.1 (3072), two streams": (*[(3072, 3072)] * 8, *[(3072, 12288), (12288, 3072)] * 2),
    "FLUX.1 (3072), one stream": (*[(3072, 3072)] * 3, (3072, 12288), (15360, 3072)),
    "Wan 14B (5120)": (*[(5120, 5120)] * 8, (5120, 13824), (13824, 5120)),
}
"""(K, N) of each linear of a block that is quantized."""


def digits(scheme: str) -> nn.Module:
    """The digits DiT in integers."""
    model = load_digits_dit()
    label = torch.zeros(2, dtype=torch.long)
    given = {"timestep": torch.full((2,), 500.0), "class_labels": label}
    vq.quantize_(model, args=(initial_noise(2, seed=0),), kwargs=given, scheme=scheme)
    return model


def video(scheme: str) -> nn.Module:
    """The video DiT in integers."""
    model = load_video_dit()
    caption = model.captions(torch.zeros(2, dtype=torch.long))
    given = {"timestep": torch.full((2,), 500.0), "encoder_hidden_states": caption}
    vq.quantize_(model.transformer, args=(initial_video_noise(2, seed=0),), kwargs=given, scheme=scheme)
    return model.transformer


def of_model(model: nn.Module) -> tuple[int, int]:
    """(bytes held for quantized linears, weights in them)."""
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    weights = sum(m.in_features * m.out_features for m in layers)
    return sum(m.resident_bytes() for m in layers), weights


def of_block(shapes: tuple[tuple[int, int], ...], scheme: str) -> tuple[int, int]:
    """The same of one block's linears, each counted with all of its rows."""
    parsed, total, weights = QuantScheme.parse(scheme), 0, 0
    measured: dict[int, int] = {}
    for depth, width in shapes:
        if depth not in measured:
            linear = nn.Linear(depth, ROWS, bias=False)
            measured[depth] = QuantLinear.from_linear(linear, parsed).resident_bytes()
        branch = 2 * parsed.rank * depth  # one factor of the low-rank branch goes with K, not with rows
        total += (measured[depth] - branch) * width // ROWS + branch
        weights += depth * width
    return total, weights


def measure(scheme: str) -> list[dict[str, Any]]:
    """A row for each model."""
    subjects = {
        "digits DiT (128)": lambda: of_model(digits(scheme)),
        "video DiT": lambda: of_model(video(scheme)),
    }
    subjects |= {name: lambda shapes=shapes: of_block(shapes, scheme) for name, shapes in BLOCKS.items()}
    rows = []
    for name, count in subjects.items():
        held, weights = count()
        row = {"scheme": scheme, "model": name, "bytes": held, "weights": weights}
        rows.append(row | {"of_bf16": round(held / (2 * weights), 4)})
        print(f"{scheme:16} {name:28} {held / (2 * weights):.4f}", flush=True)
    return rows


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "weights-memory.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    record = {
        "command": "python benchmarks/weights_memory.py",
        "torch": torch.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": [row for scheme in SCHEMES for row in measure(scheme)],
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
