"""Weight grids compared: error, seconds and memory of min-max, of BGR's bounds alone, and of BGR with either stop rule.

    PYTHONPATH=. python benchmarks/grids.py [--width 256] [--depth 3072] [--no-speed] [--out FILE]; then with --dense
    and with --numpy: samples of numpy's default_rng(0), in the order above

Synthetic weights: Gaussian; the same with 0.3% of the values times 6; Student-t of 4 degrees. Each at 4 and 8 bits, one
grid a row and one for each 128 input channels. "mse" is |W - What|^2 / |W|^2 and "ratio" is the squared error over
that of min-max in the same layout; "samples" has its spread over eight seeds. Seconds are of this process's CPU
time on one thread, which others disturb least.

Speed and memory are of one weight of 3072 x 12288 at 4 bits, each in a process of its own: "wall_s" with one thread and
with two (that sleep while they wait: OMP_WAIT_POLICY=passive), how much its peak of resident memory rose, the result
(int8 and scales) included, and the load of the machine at its end: above the number of CPUs, "wall_s" says little.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu import _commit, _cpu  # the script beside this one
from torch import Tensor

from viditq_fx.ops.bgr import Refinement
from viditq_fx.ops.grid import dequantize_weight_grid, fit_weight_grid

METHODS: dict[str, Refinement | None] = {
    "min-max": None,
    "bounds alone": Refinement(steps=0, neighbours=0),
    "BGR, printed stop": Refinement(stop="printed", neighbours=0),
    "BGR, no neighbours": Refinement(neighbours=0),
    "BGR": Refinement(),
    "BGR, 40 steps": Refinement(steps=40),
    "BGR, 1 bound, 40 steps": Refinement(bounds=1, steps=40),
}
SEEDS = 8
FIGURES = {"gaussian": 0.63, "outliers": 0.39, "student": 0.44}
"""What was asked of n = 10, per row: one numpy sample each, rounded, of the same distributions and size."""
LARGE = (3072, 12288)


def drawn(kind: str, width: int, depth: int, seed: int = 0) -> Tensor:
    """w [width, depth] of one distribution; the same at every call."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(width, depth, generator=gen)
    if kind == "outliers":
        return torch.where(torch.rand(width, depth, generator=gen) < 0.003, w * 6, w)
    if kind == "student":
        return w / torch.randn(4, width, depth, generator=gen).square().mean(dim=0).sqrt()
    return w


def errors(width: int, depth: int) -> list[dict[str, Any]]:
    """One row for each distribution, width in bits, layout and method."""
    rows = []
    for kind in ("gaussian", "outliers", "student"):
        w = drawn(kind, width, depth)
        for bits in (4, 8):
            for group in (0, 128):
                base = None
                for method, refinement in METHODS.items():
                    start = time.process_time()
                    q, scale, zero = fit_weight_grid(w, bits, group, refinement)
                    seconds = time.process_time() - start
                    near = dequantize_weight_grid(q, scale, zero, group, torch.float32)
                    error = float((w.double() - near.double()).square().sum())
                    base = base or error
                    row = {"weights": kind, "bits": bits, "group": group, "method": method}
                    row |= {"mse": error / float(w.double().square().sum()), "ratio": error / base}
                    rows.append(row | {"cpu_s": round(seconds, 4)})
                    print(
                        f"{kind:9} {bits} bits group {group:3}  {method:24} {row['ratio']:.3f}  {seconds:.2f} s"
                    )
    return rows


def spread(width: int, depth: int) -> list[dict[str, Any]]:
    """Squared error over min-max's at 4 bits per row, over samples: mean, standard deviation, least and largest."""
    rows = []
    for kind, figure in FIGURES.items():
        ratios: dict[str, list[float]] = {"BGR, no neighbours": [], "BGR": []}
        for seed in range(SEEDS):
            w = drawn(kind, width, depth, seed)
            base = squared_error(w, 4, 0, None)
            for method, found in ratios.items():
                found.append(squared_error(w, 4, 0, METHODS[method]) / base)
        for method, found in ratios.items():
            row = {"weights": kind, "method": method, "asked": figure, "seeds": SEEDS}
            row |= {"mean": statistics.mean(found), "std": statistics.stdev(found)}
            rows.append(row | {"least": min(found), "largest": max(found)})
            print(rows[-1], flush=True)
    return rows


def dense(width: int, depth: int) -> list[dict[str, Any]]:
    """BGR beside the best of all zero points -8 .. 7 and 50 steps from min-max's down to a seventh, each least-squares
    fitted once more: what a grid that crosses zero can reach. 4 bits per row, the first 64 rows of a sample."""
    rows = []
    for kind in FIGURES:
        w = drawn(kind, width, depth)[:64]
        least_R = torch.full((w.shape[0],), torch.inf)
        range_R1 = (w.amax(dim=1) - w.amin(dim=1)).unsqueeze(-1)
        for part in torch.logspace(0, -0.85, 50):
            for zero in range(-8, 8):
                scale_R1 = range_R1 / 15 * part
                d = (w / scale_R1 + zero).round().clamp(-8, 7) - zero
                fitted_R1 = ((d * w).sum(dim=1) / (d * d).sum(dim=1).clamp(min=1e-9)).unsqueeze(-1)
                least_R = torch.minimum(least_R, (w - fitted_R1 * d).square().sum(dim=1))
        base, found = squared_error(w, 4, 0, None), squared_error(w, 4, 0, METHODS["BGR"])
        row = {"weights": kind, "BGR": found / base, "dense search": float(least_R.double().sum()) / base}
        rows.append(row)
        print(row, flush=True)
    return rows


def squared_error(w: Tensor, bits: int, group: int, refinement: Refinement | None) -> float:
    """|W - What|^2."""
    q, scale, zero = fit_weight_grid(w, bits, group, refinement)
    near = dequantize_weight_grid(q, scale, zero, group, torch.float32)
    return float((w.double() - near.double()).square().sum())


def by_numpy(width: int, depth: int) -> list[dict[str, Any]]:
    """Squared error over min-max's at 4 bits per row of three numpy samples, which others can draw too."""
    random = np.random.default_rng(0)
    gaussian = random.standard_normal((width, depth))
    outliers = np.where(random.random((width, depth)) < 0.003, gaussian * 6, gaussian)
    samples = {"gaussian": gaussian, "outliers": outliers, "student": random.standard_t(4, (width, depth))}
    rows = []
    for kind, sample in samples.items():
        w = torch.from_numpy(sample.astype(np.float32))
        base = squared_error(w, 4, 0, None)
        ratios = {name: squared_error(w, 4, 0, METHODS[name]) / base for name in METHODS}
        rows.append({"weights": kind, "min-max, groups": squared_error(w, 4, 128, None) / base, **ratios})
        print(rows[-1], flush=True)
    return rows


def large_in_this_process(method: str, group: int, threads: int) -> dict[str, Any]:
    """Seconds and memory of one large weight."""
    torch.set_num_threads(threads)
    fit_weight_grid(torch.randn(64, 256), 4, group, METHODS[method])
    w = torch.randn(*LARGE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, start_cpu = time.perf_counter(), time.process_time()
    fit_weight_grid(w, 4, group, METHODS[method])
    took = {
        "wall_s": round(time.perf_counter() - start, 2),
        "cpu_s": round(time.process_time() - start_cpu, 2),
    }
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return took | {"peak_rise_mib": rise // 1024, "load": round(os.getloadavg()[0], 1)}


def speed() -> list[dict[str, Any]]:
    """`large_in_this_process` in a process for each."""
    rows = []
    for method in ("min-max", "BGR"):
        for group in (0, 128):
            for threads in (1, 2):
                case = [method, str(group), str(threads)]
                done = subprocess.run(
                    [sys.executable, __file__, "--large", *case],
                    env={**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                row = {"method": method, "group": group, "threads": threads, **json.loads(done.stdout)}
                rows.append(row)
                print(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=3072)
    parser.add_argument("--no-speed", action="store_true", help="leave out the large weight")
    parser.add_argument(
        "--dense", action="store_true", help="only compare with a dense search; added to --out"
    )
    parser.add_argument("--numpy", action="store_true", help="only numpy's samples; added to --out")
    parser.add_argument("--large", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "grids.json")
    options = parser.parse_args()
    with torch.no_grad():
        if options.large:
            method, group, threads = options.large
            print(json.dumps(large_in_this_process(method, int(group), int(threads))))
            return 0
        torch.set_num_threads(1)
        if options.dense or options.numpy:
            record = json.loads(options.out.read_text(encoding="utf-8"))
            name, measure = ("dense", dense) if options.dense else ("numpy", by_numpy)
            record[name] = measure(options.width, options.depth)
            options.out.write_text(json.dumps(record, indent=1), encoding="utf-8")
            return 0
        rows = errors(options.width, options.depth)
        samples = spread(options.width, options.depth)
    record = {
        "command": f"python benchmarks/grids.py --width {options.width} --depth {options.depth}",
        "weights": [options.width, options.depth],
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
        "samples": samples,
        "large": {
            "weight": LARGE,
            "bits": 4,
            "rows": [] if options.no_speed else speed(),
        },
    }
    options.out.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
