"""What calibration costs: the demo's sampling watched, against the same sampling in plain eager fp32.

    PYTHONPATH=. python benchmarks/calibration.py [--digits 20] [--steps 20] [--rounds 5] [--out FILE]

Rounds take turns: plain, watched cold (a new watch: tracing included), watched again under the same watch (warm). A
ratio is the median of the rounds' own ratios, of CPU seconds of this process with one thread: other processes on the
machine then count little. Planning (the search over alphas and rotations) runs once for each scheme and is told apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu import RESULTS, _commit, _cpu  # the script beside this one

import viditq_fx as vq
from viditq_fx.calibration.findings import Findings, observe
from viditq_fx.calibration.options import read_options
from viditq_fx.calibration.progress import progress_of
from viditq_fx.calibration.samples import Samples
from viditq_fx.calibration.watch import Watch
from viditq_fx.demo.model import load_digits_dit
from viditq_fx.demo.sampling import balanced_labels, sample

SCHEMES = ("w8a8", "w4a8", "w8a8-timestep")


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """(CPU seconds of this process, wall seconds) of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def nbytes(found: Findings) -> tuple[int, int]:
    """(bytes of statistics, bytes of kept rows)."""
    records = [record for group in found.groups for record in group.inputs]
    parts = [part for record in records for part in record.parts.values()]
    rows = [record.reservoir.rows_RK for record in records if record.reservoir.rows_RK is not None]
    counted = sum(t.numel() * t.element_size() for part in parts for _, t in part.tensors())
    return counted, sum(t.numel() * t.element_size() for t in rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--digits", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration-digits.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    model = load_digits_dit()

    def run() -> None:
        labels = balanced_labels(options.digits)
        sample(model, labels=labels, seed=0, steps=options.steps, batch_size=options.digits)

    asked = read_options("w8a8", (), None, None)
    rounds: list[dict[str, float]] = []
    counted = rows = 0
    run()
    for _ in range(options.rounds):
        torch._dynamo.reset()
        row: dict[str, float] = {}
        row["plain_cpu_s"], row["plain_wall_s"] = seconds(run)
        with Watch(model, keep=()) as watch:
            findings: list[Findings] = []

            def watched(watch: Watch = watch, findings: list[Findings] = findings) -> None:
                findings.append(observe(watch, Samples(model, run), asked, progress_of(False), None))

            row["cold_cpu_s"], row["cold_wall_s"] = seconds(watched)
            row["warm_cpu_s"], row["warm_wall_s"] = seconds(watched)
            counted, rows = nbytes(findings[-1])
        rounds.append(row)
        print({name: round(value, 2) for name, value in row.items()}, flush=True)
    whole = {}
    for scheme in SCHEMES:
        torch._dynamo.reset()
        whole[scheme] = seconds(lambda scheme=scheme: vq.calibrate(model, run, scheme=scheme))[0]

    def ratio(kind: str) -> float:
        return round(statistics.median(row[f"{kind}_cpu_s"] / row["plain_cpu_s"] for row in rounds), 3)

    plain = statistics.median(row["plain_cpu_s"] for row in rounds)
    record = {
        "command": f"python benchmarks/calibration.py --digits {options.digits} --steps {options.steps} "
        f"--rounds {options.rounds}",
        "model": "digits DiT of the demo, fp32",
        "baseline": "the same sampling, eager fp32",
        "cpu": _cpu(),
        "threads": 1,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "statistics_ratio_tracing_included": ratio("cold"),
        "statistics_ratio_warm": ratio("warm"),
        "calibrate_ratio_planning_included": {k: round(v / plain, 3) for k, v in whole.items()},
        "bytes": {
            "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
            "statistics": counted,
            "rows": rows,
        },
        "rounds": rounds,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in record.items() if k != "rounds"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
