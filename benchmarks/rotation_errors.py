"""Why rotation alone does not save the stressed digits model at W4A8: its error, of weights and of inputs apart.

    PYTHONPATH=. python benchmarks/rotation_errors.py [--samples 4]

Every linear of the blocks gets its own inputs at five timesteps; only its weight (4 bits, asymmetric) or only its input
(8 bits, by token) is rounded, as it is and rotated. Median SQNR over linears in dB, by what they read.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict

import torch
from torch import Tensor, nn

from benchmarks.stress import stress_
from viditq_fx.demo.model import load_digits_dit
from viditq_fx.demo.sampling import initial_noise
from viditq_fx.ops.rotate import rotate, rotation_block, transform_weight
from viditq_fx.ops.weight_forms import dequantize_weight, quantize_input, quantize_weight
from viditq_fx.quality import sqnr_db
from viditq_fx.scheme import QuantScheme

TIMESTEPS = (50.0, 250.0, 500.0, 750.0, 950.0)
SCHEME = QuantScheme.parse("w4a8-asym")


def kind_of(path: str) -> str:
    """What a linear of the digits DiT reads; "" for those outside of blocks and the modulation."""
    ends = {
        "to_q": "norm",
        "to_k": "norm",
        "to_v": "norm",
        "proj": "norm",
        "to_out.0": "values",
        "net.2": "GELU",
    }
    found = [kind for end, kind in ends.items() if path.endswith(end)]
    return found[0] if found and path.startswith("transformer_blocks") else ""


def errors(linear: nn.Linear, x_MK: Tensor) -> dict[str, float]:
    """SQNR with one of weight and input rounded, as it is and rotated."""
    block, truth = rotation_block(linear.in_features), x_MK @ linear.weight.t()
    found = {}
    for name, turn in (("", 1), (" rotated", block)):
        x, w = rotate(x_MK, None, turn), transform_weight(linear.weight, None, turn)
        q, scale = quantize_input(x, SCHEME)
        form = SCHEME.weight_form
        rounded = dequantize_weight(quantize_weight(w, form), w.shape[1], form, torch.float32)
        found["weight" + name] = sqnr_db(truth, x @ rounded.t())
        found["input" + name] = sqnr_db(truth, (q.float() * scale) @ w.t())
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=4)
    options = parser.parse_args()
    for weights in ("plain", "stressed"):
        model = load_digits_dit()
        if weights == "stressed":
            stress_(model)
        seen: dict[str, list[Tensor]] = defaultdict(list)
        linears = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear) and kind_of(p)}
        for path, linear in linears.items():
            linear.register_forward_pre_hook(
                lambda _, args, into=seen[path]: into.append(args[0].flatten(0, -2))
            )
        noise, label = initial_noise(options.samples, seed=0), torch.arange(options.samples) % 10
        for timestep in TIMESTEPS:
            model(noise, timestep=torch.full((options.samples,), timestep), class_labels=label)
        rows: dict[str, list[dict[str, float]]] = defaultdict(list)
        for path, linear in linears.items():
            rows[kind_of(path)].append(errors(linear, torch.cat(seen[path])))
        for kind, found in rows.items():
            medians = {name: round(statistics.median(f[name] for f in found), 1) for name in found[0]}
            print(f"{weights:9} {kind:7} {medians}")


if __name__ == "__main__":
    main()
