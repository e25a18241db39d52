"""Draw what the GEMMs of a result of `benchmarks/gpu.py` reach under the roofs of their device, as a PNG.

    PYTHONPATH=. python benchmarks/roofline.py RESULT.json [--out roofline.png]

x: FLOPs for each byte that must be moved (operands read once, result written once), y: TFLOP/s of the median call.
The roofs are those of the architecture's reference card in `viditq_fx/cost_model.py`: the data sheet's bandwidth, and
the rates that are taken to be reachable. A point above one of them says that the table is too low.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from viditq_fx.cost_model import RATES, Rates

KINDS = {"bf16": "#5b6b7a", "int8": "#1f8a4c", "w4a8": "#b06a00", "fp8": "#7a3fb0"}
"""What the name of a method begins with -> its colour."""
_WEIGHT_BYTES = {"bf16": 2.0, "int8": 1.0, "w4a8": 0.5, "fp8": 1.0}
_INPUT_BYTES = {"bf16": 2.0, "int8": 1.0, "w4a8": 1.0, "fp8": 1.0}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One method at one shape."""

    kind: str
    method: str
    model: str
    intensity: float
    """FLOP/byte."""
    tflops: float


def points(record: Mapping[str, Any]) -> list[Point]:
    """Every method that was timed and computes a GEMM alone, or bf16; sweeps and what was tuned are left out."""
    found: list[Point] = []
    for entry in record["shapes"]:
        for method, times in entry.get("times", {}).items():
            kind = next((kind for kind in KINDS if method.startswith(kind)), None)
            if kind is None or not ("GEMM only" in method or kind == "bf16"):
                continue
            rows, width, depth = entry["rows"], entry["width"], entry["depth"]
            moved = rows * depth * _INPUT_BYTES[kind] + width * depth * _WEIGHT_BYTES[kind] + 2 * rows * width
            found.append(
                Point(
                    kind=kind,
                    method=method,
                    model=entry["model"],
                    intensity=2 * rows * width * depth / moved,
                    tflops=2 * rows * width * depth / times["p50"] / 1e6,
                )
            )
    return found


def rates_of(record: Mapping[str, Any]) -> Rates:
    """The rates of the device that was measured. Raises ValueError for an architecture that the table lacks."""
    capability = record["environment"].get("capability", "none")
    number = int(re.sub(r"\D", "", capability) or 0)
    if number not in RATES:
        known = ", ".join(f"sm_{n}" for n in RATES)
        raise ValueError(f"no rates for {capability}: viditq_fx/cost_model.py has {known}")
    return RATES[number]


def roofs(rates: Rates) -> Iterator[tuple[str, float]]:
    """(kind, TFLOP/s) of each flat roof."""
    yield "bf16", rates.half
    yield "int8", rates.int8
    if rates.fp8 is not None:
        yield "fp8", rates.fp8


def draw(record: Mapping[str, Any], out: Path) -> int:
    """Write the picture; how many points it shows. Raises ValueError where there is nothing to show."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown, rates = points(record), rates_of(record)
    if not shown:
        raise ValueError("the result holds no timed GEMM: run benchmarks/gpu.py first")
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    knees = [rate / rates.bandwidth for _, rate in roofs(rates)]
    low = 0.5 * min(*knees, *(p.intensity for p in shown))
    high = 2.0 * max(*knees, *(p.intensity for p in shown))
    for (kind, rate), knee in zip(roofs(rates), knees, strict=True):
        axes.plot([low, knee, high], [low * rates.bandwidth, rate, rate], color=KINDS[kind], lw=1, alpha=0.6)
        axes.annotate(
            f"{kind} {rate:.0f}", (high, rate), ha="right", va="bottom", color=KINDS[kind], fontsize=8
        )
    markers = dict(zip(dict.fromkeys(p.model for p in shown), "osD^vP*", strict=False))
    for method in dict.fromkeys(p.method for p in shown):
        mine = [p for p in shown if p.method == method]
        hollow = "viditq" not in method
        for model, marker in markers.items():
            of_model = [p for p in mine if p.model == model]
            axes.scatter(
                [p.intensity for p in of_model],
                [p.tflops for p in of_model],
                marker=marker,
                color="none" if hollow else KINDS[mine[0].kind],
                edgecolors=KINDS[mine[0].kind],
                label=f"{method}, {model}",
                s=36,
            )
    axes.set(xscale="log", yscale="log", xlabel="FLOP/byte", ylabel="TFLOP/s", title=title(record))
    axes.grid(True, which="both", alpha=0.15)
    figure.legend(fontsize=7, loc="outside lower center", ncols=3)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)
    return len(shown)


def title(record: Mapping[str, Any]) -> str:
    """What was measured, where and with what."""
    where = record["environment"]
    return f"{where.get('device')}, torch {where.get('torch')}, commit {str(where.get('commit'))[:8]}"


def main() -> int:
    """0: written. 2: nothing to draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, help="a result file of benchmarks/gpu.py")
    parser.add_argument("--out", type=Path, help="PNG to write; by default beside the result")
    options = parser.parse_args()
    out = options.out or options.result.with_suffix(".png")
    try:
        count = draw(json.loads(options.result.read_text(encoding="utf-8")), out)
    except (OSError, ValueError, KeyError) as error:
        print(f"roofline: {options.result}: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}: {count} points")
    return 0


if __name__ == "__main__":
    sys.exit(main())
