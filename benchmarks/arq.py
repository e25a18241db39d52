"""ARQ's two forms: the printed one (a simulation in floating point) and the block-wise one, which runs on integers.

    PYTHONPATH=. python benchmarks/arq.py [--samples 4] [--out FILE]

Every linear that `dvd-w4a4` quantizes in the digits DiT and the video DiT, as trained and stressed (`stress.py`), with
its own inputs of five timesteps, a scale being of one call's live tensor. SQNR in dB of its output against fp32: of
4-bit inputs alone (the weight as it is) and with 4-bit BGR weights; as they are and rotated; median over linears, and
worst.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu import _commit  # the script beside this one
from stress_error import MODELS, TIMESTEPS  # likewise
from torch import Tensor, nn

import viditq_fx as vq
from benchmarks.stress import stress_
from viditq_fx.ops.arq_simulation import simulate_printed_input
from viditq_fx.ops.grid import dequantize_weight_grid, quantize_weight_grid
from viditq_fx.ops.quantize import dequantize_per_token, quantize_per_token
from viditq_fx.ops.rotate import rotate, rotate_quantize, rotation_block, transform_weight
from viditq_fx.ops.static_scale import dequantize_per_block
from viditq_fx.quality import sqnr_db
from viditq_fx.scheme import BLOCK

BITS = 4


def by_block(x: Tensor, block: int) -> Tensor:
    """What `linear_w4a4` reads, dequantized."""
    q, scale = rotate_quantize(x, None, block, BITS, BLOCK)
    return dequantize_per_block(q, scale, BLOCK, torch.float32)


def by_token(x: Tensor, block: int) -> Tensor:
    """A scale for each token, for comparison."""
    return dequantize_per_token(*quantize_per_token(rotate(x, None, block), BITS), torch.float32)


FORMS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "printed, simulated": lambda x, block: simulate_printed_input(x, block=block, bits=BITS),
    "printed, and by token, simulated": lambda x, block: simulate_printed_input(
        x, block=block, bits=BITS, levels="token"
    ),
    "block-wise": by_block,
    "by token": by_token,
}


def keep_input(into: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that notes a linear's input as [M, K]."""
    return lambda _, args: into.append(args[0].detach().flatten(0, -2))


def captured(
    name: str, samples: int, *, stressed: bool
) -> tuple[dict[str, nn.Linear], dict[str, list[Tensor]]]:
    """(linears that are quantized, by path; the input [M, K] of each at every timestep)."""
    model, step = MODELS[name](samples)
    if stressed:
        stress_(model)
    calls: list[tuple[Any, Any]] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return model(*args, **kwargs)

    step(noting, TIMESTEPS[0])
    report = vq.quantize_(copy.deepcopy(model), *calls[0], scheme="w4a8")
    paths = {site.fqn for site in report.sites if site.done}
    linears = {path: m for path, m in model.named_modules() if path in paths and isinstance(m, nn.Linear)}
    seen: dict[str, list[Tensor]] = defaultdict(list)
    for path, linear in linears.items():
        linear.register_forward_pre_hook(keep_input(seen[path]))
    for timestep in TIMESTEPS:
        step(model, timestep)
    return linears, seen


def errors_of(linear: nn.Linear, given: list[Tensor]) -> dict[tuple[str, bool, bool], float]:
    """SQNR by (form, rotated, with 4-bit weights)."""
    found = {}
    truth = torch.cat([x @ linear.weight.t() for x in given])
    for rotated, block in ((False, 1), (True, rotation_block(linear.in_features))):
        w = transform_weight(linear.weight, None, block)
        near = dequantize_weight_grid(*quantize_weight_grid(w, 4, 0, "bgr"), 0, torch.float32)
        for form, simulate in FORMS.items():
            x_hat = torch.cat([simulate(x, block) for x in given])
            for four, weight in ((False, w), (True, near)):
                found[form, rotated, four] = sqnr_db(truth, x_hat @ weight.t())
    return found


def measure(name: str, samples: int, *, stressed: bool) -> list[dict[str, Any]]:
    """A row for each form, rotation and kind of weight."""
    linears, seen = captured(name, samples, stressed=stressed)
    each = [errors_of(linear, seen[path]) for path, linear in linears.items()]
    rows = []
    for form, rotated, four in each[0]:
        values = [found[form, rotated, four] for found in each]
        row = {"model": name, "weights": "stressed" if stressed else "plain", "form": form}
        row |= {"rotated": rotated, "weight_bits": 4 if four else 32, "linears": len(values)}
        row |= {"median_db": round(statistics.median(values), 2), "worst_db": round(min(values), 2)}
        rows.append(row)
        print(row, flush=True)
    return rows


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "arq.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    record: dict[str, Any] = {
        "command": f"python benchmarks/arq.py --samples {options.samples}",
        "input_bits": BITS,
        "timesteps": TIMESTEPS,
        "torch": torch.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": [],
    }
    for name in MODELS:
        for stressed in (False, True):
            record["rows"] += measure(name, options.samples, stressed=stressed)
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
