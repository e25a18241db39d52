"""What calibration costs, in time and in memory, against the same sampling in plain eager fp32.

    PYTHONPATH=. python benchmarks/calibration.py [--model digits|video] [--count 10] [--steps 20] [--batch 10]
        [--rounds 5] [--schemes w8a8,w4a8-asym] [--out FILE]

Time. A round takes turns: watched cold (a new watch: tracing included) and again under the same watch (warm), then the
whole of `vq.calibrate` for each scheme: tracing, watching, the search of balance and rotation, and for a static scheme
with rotated sites a second run. Before and after each of these stands a plain run, and a ratio is over the mean of
these two: the machine's speed drifts by more in a round than what is measured. It is of CPU seconds of this process,
user and system, one thread: other processes on the machine then count less than in wall seconds, which stand beside
them. The search is also told apart, in seconds. Medians over the rounds, with the least and the largest.

Memory. `ru_maxrss`, the largest resident memory of a whole process: a new process loads the model and samples
plainly, another calibrates over the same samples. Nothing is subtracted, so both hold Python, torch, diffusers and
the weights; what was there before the first sample is told apart, and so is the size of what calibration keeps.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cpu import RESULTS, _commit, _cpu  # the script beside this one

import viditq_fx as vq
from viditq_fx.calibration import run as calibration_run
from viditq_fx.calibration.findings import Findings, observe
from viditq_fx.calibration.options import read_options
from viditq_fx.calibration.progress import progress_of
from viditq_fx.calibration.samples import Samples
from viditq_fx.calibration.watch import Watch
from viditq_fx.demo.model import load_digits_dit
from viditq_fx.demo.sampling import balanced_labels, sample
from viditq_fx.demo.video import load_video_dit, sample_videos

SCHEMES = "w8a8,w4a8-asym,w8a8-timestep"
MODELS = {"digits": "digits DiT of the demo, fp32", "video": "video DiT (Latte) of moving digits, fp32"}
MEGABYTE = 1 << 20


def subject(options: argparse.Namespace) -> tuple[torch.nn.Module, Callable[[], Any]]:
    """(the network, a function that draws `count` samples with it)."""
    labels = balanced_labels(options.count)
    asked = {"labels": labels, "seed": 0, "steps": options.steps, "batch_size": options.batch}
    if options.model == "video":
        video = load_video_dit()
        return video.transformer, lambda: sample_videos(video, **asked)
    digits = load_digits_dit()
    return digits, lambda: sample(digits, **asked)


def cost(work: Callable[[], Any]) -> tuple[float, float]:
    """(CPU seconds of this process, wall seconds) of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def nbytes(found: Findings) -> tuple[int, int]:
    """(bytes of statistics, bytes of kept rows)."""
    records = [record for group in found.groups for record in group.inputs]
    parts = [part for record in records for part in record.parts.values()]
    rows = [rows for record in records if (rows := record.reservoir.rows_RK) is not None]
    counted = sum(t.numel() * t.element_size() for part in parts for _, t in part.tensors())
    return counted, sum(t.numel() * t.element_size() for t in rows)


def one_round(
    model: torch.nn.Module, run: Callable[[], Any], schemes: list[str]
) -> tuple[dict[str, float], Findings]:
    """Seconds by what was done and of the plain runs around it, and what the watch found."""
    row: dict[str, float] = {}
    before = cost(run)

    def beside_plain(name: str, measured: Callable[[], dict[str, tuple[float, float]]]) -> None:
        """Note what `measured` found, and the mean of the plain runs before and after it."""
        nonlocal before
        torch._dynamo.reset()
        costs, after = measured(), cost(run)
        for index, clock in enumerate(("cpu", "wall")):
            row[f"{name}_plain_{clock}_s"] = (before[index] + after[index]) / 2
            row.update({f"{part}_{clock}_s": seconds[index] for part, seconds in costs.items()})
        before = after

    found: list[Findings] = []

    def watching() -> dict[str, tuple[float, float]]:
        asked = read_options("w8a8", (), None, None)
        with Watch(model, keep=()) as watch:

            def watched() -> None:
                found.append(observe(watch, Samples(model, run), asked, progress_of(False), None))

            return {"cold": cost(watched), "warm": cost(watched)}

    beside_plain("watching", watching)
    for scheme in schemes:
        with planning_timed() as spent:
            beside_plain(scheme, lambda s=scheme: {s: cost(lambda: vq.calibrate(model, run, scheme=s))})
        row[f"{scheme}_planning_cpu_s"] = sum(spent)
    return row, found[-1]


@contextmanager
def planning_timed() -> Iterator[list[float]]:
    """The CPU seconds that the search takes for each group of sites."""
    plan_transform = calibration_run.plan_transform
    spent: list[float] = []

    def planned(*args: Any) -> Any:
        start = time.process_time()
        chosen = plan_transform(*args)
        spent.append(time.process_time() - start)
        return chosen

    calibration_run.plan_transform = planned
    try:
        yield spent
    finally:
        calibration_run.plan_transform = plan_transform


def peak(options: argparse.Namespace, what: str) -> dict[str, float]:
    """Megabytes that a new process held before sampling and at most; `what` is "plain" or a scheme."""
    command = [sys.executable, "-W", "ignore", __file__, "--peak", what, "--model", options.model]
    for name in ("count", "steps", "batch"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report_peak(options: argparse.Namespace) -> None:
    """What `peak` starts: sample or calibrate once, and print this process's memory."""
    model, run = subject(options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE
    if options.peak == "plain":
        run()
    else:
        vq.calibrate(model, run, scheme=options.peak)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE
    print(json.dumps({"before_MB": round(before, 1), "peak_MB": round(most, 1)}))


def ratios(rounds: list[dict[str, float]], name: str, beside: str) -> dict[str, float]:
    """Of a part's CPU and wall seconds over the plain runs' beside it: median, least and largest of the rounds."""
    found: dict[str, float] = {}
    for clock in ("cpu", "wall"):
        values = [row[f"{name}_{clock}_s"] / row[f"{beside}_plain_{clock}_s"] for row in rounds]
        for word, pick in (("median", statistics.median), ("least", min), ("largest", max)):
            found[f"{clock}_{word}"] = round(pick(values), 3)
    return found


def record_of(
    options: argparse.Namespace,
    schemes: list[str],
    rounds: list[dict[str, float]],
    memory: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """The result file after these rounds."""
    return {
        "command": f"python benchmarks/calibration.py --model {options.model} --count {options.count} --steps "
        f"{options.steps} --batch {options.batch} --rounds {len(rounds)} --schemes {options.schemes}",
        "model": MODELS[options.model],
        "baseline": "the same sampling, eager fp32",
        "cpu": _cpu(),
        "threads": 1,
        "load": options.load,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "time_ratio": {
            "watching, tracing included": ratios(rounds, "cold", "watching"),
            "watching, traced before": ratios(rounds, "warm", "watching"),
            **{f"calibrate {scheme}, everything": ratios(rounds, scheme, scheme) for scheme in schemes},
        },
        "planning_cpu_s": {
            scheme: round(statistics.median(row[f"{scheme}_planning_cpu_s"] for row in rounds), 3)
            for scheme in schemes
        },
        "memory_MB": memory,
        "memory_ratio": {
            scheme: round(memory[scheme]["peak_MB"] / memory["plain"]["peak_MB"], 3) for scheme in schemes
        },
        "rounds": [{name: round(value, 3) for name, value in row.items()} for row in rounds],
    }


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="digits")
    parser.add_argument("--count", type=int, default=10, help="samples, as many as the paper's prompts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=10, help="samples in a call; guidance doubles its rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--load", default="nothing else ran on the machine", help="said in the results")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = read_arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if options.peak:
        report_peak(options)
        return 0
    schemes = options.schemes.split(",")
    memory = {what: peak(options, what) for what in ("plain", *schemes)}
    print(memory, flush=True)
    _, warm_up = subject(argparse.Namespace(**{**vars(options), "steps": 1}))
    warm_up()
    model, run = subject(options)
    out = options.out or RESULTS / f"calibration-{options.model}.json"
    rounds: list[dict[str, float]] = []
    for _ in range(options.rounds):
        row, found = one_round(model, run, schemes)
        rounds.append(row)
        print({name: round(value, 2) for name, value in row.items()}, flush=True)
        record = record_of(options, schemes, rounds, memory)
        counted, rows = nbytes(found)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        record["bytes"] = {"weights": weights, "statistics": counted, "rows": rows}
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
