"""Error of every scheme at every linear of the demo's model that is quantized, and of one whole step.

    PYTHONPATH=. python benchmarks/schemes.py [--samples 16] [--out FILE]

The trained digits DiT runs at five timesteps in fp32; each linear's own inputs then go through the scheme's ops (their
references: the same numbers on every device), and the result is compared with fp64. SQNR in dB, higher is better.
Weights are rounded to nearest, nothing is calibrated. Whole steps are compiled, for the schemes that this device runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from cpu import _commit, _sqnr  # the script beside this one
from torch import Tensor, nn
from torch.nn import functional as F

from viditq_fx.demo.model import load_digits_dit
from viditq_fx.ops.fp8 import why_no_fp8
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.runtime import executions
from viditq_fx.scheme import QuantScheme, available_schemes

TIMESTEPS = (50.0, 250.0, 500.0, 750.0, 950.0)


def inputs(samples: int, timestep: float) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, timestep and label of one step."""
    gen = torch.Generator().manual_seed(int(timestep))
    noise = torch.randn(samples, 1, 32, 32, generator=gen)
    return noise, torch.full((samples,), timestep), torch.arange(samples) % 10


def captured(samples: int) -> tuple[dict[str, nn.Linear], dict[str, list[Tensor]]]:
    """(the linears that are quantized, by path; what each is given at every timestep)."""
    model = load_digits_dit()
    with executions() as ran:
        torch.compile(model, backend="viditq")(*inputs(samples, 500.0))
    paths = {site.fqn for site in ran[0].report.sites if site.done}
    linears = {name: m for name, m in model.named_modules() if name in paths and isinstance(m, nn.Linear)}
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].detach()))
    for timestep in TIMESTEPS:
        model(*inputs(samples, timestep))
    return linears, seen


def error_of_linear(linear: nn.Linear, given: list[Tensor], scheme: QuantScheme) -> float:
    """SQNR of one linear over all that it is given."""
    x = torch.cat([g.reshape(-1, g.shape[-1]) for g in given])
    got = QuantLinear.from_linear(linear, scheme)(x)
    bias = None if linear.bias is None else linear.bias.double()
    return _sqnr(F.linear(x.double(), linear.weight.double(), bias), got)


def error_of_steps(name: str, samples: int) -> float | None:
    """Mean SQNR of whole steps, or None for a scheme that this device does not run."""
    if QuantScheme.parse(name).floating and why_no_fp8(torch.device("cpu")):
        return None
    torch._dynamo.reset()
    plain = load_digits_dit()
    fast = torch.compile(load_digits_dit(), backend="viditq", options={"scheme": name})
    calls = [inputs(samples, timestep) for timestep in TIMESTEPS]
    return statistics.mean(_sqnr(plain(*call).sample, fast(*call).sample) for call in calls)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "schemes-digits.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        linears, seen = captured(options.samples)
        for name in available_schemes():
            scheme = QuantScheme.parse(name)
            each = {path: error_of_linear(m, seen[path], scheme) for path, m in linears.items()}
            row = {
                "scheme": name,
                "worst_db": min(each.values()),
                "median_db": statistics.median(each.values()),
            }
            row |= {"step_db": error_of_steps(name, options.samples), "linears_db": each}
            rows.append(row)
            print(
                f"{name:10} worst {row['worst_db']:5.1f}  median {row['median_db']:5.1f}  step {row['step_db']}"
            )
    record = {
        "command": f"python benchmarks/schemes.py --samples {options.samples}",
        "model": "digits DiT of the demo",
        "timesteps": TIMESTEPS,
        "torch": torch.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
