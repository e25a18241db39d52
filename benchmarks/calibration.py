"""What calibration costs, in time and in memory, against the same sampling in plain eager fp32.

    PYTHONPATH=. python benchmarks/calibration.py [--model digits|video] [--count 10] [--steps 20] [--batch 10]
        [--processes 2] [--repeats 3] [--schemes w8a8,w4a8-asym] [--out FILE]

Time. Two processes share one core: one samples plainly over and over, the other calibrates. So both run at the speed
that the machine has at that moment, which may drift by a quarter within minutes (plain runs and calibrations by turns
gave ratios from 1.0 to 1.4). A ratio is of CPU seconds, user and system: of a whole `vq.calibrate` (tracing, watching,
the search of balance and rotation, and for a static scheme with rotated sites a second run), over the plain process's
mean seconds for a call of the model meanwhile, times the calls that the samples make. Each process calibrates several
times. Its first calibration stands apart: it holds what torch.compile imports and builds once for a process. "watching"
has no search: a new watch, tracing included, and the same samples again under the same watch. Both processes keep the
memory that they free (KEPT): else glibc gives it back and faults it in again, or not, by what happens to lie at the end
of its heap, and one plain run takes 0.9 to 1.1 times another.

Memory. `ru_maxrss`, the largest resident memory of a whole process: a new one loads the model and samples plainly,
another calibrates over the same samples, both with glibc as it is. Nothing is subtracted, so both hold Python, torch,
diffusers and the weights; what was there before the first sample is told apart, and so is what calibration keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
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
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
"""Environment of processes whose time is measured."""


def subject(options: argparse.Namespace) -> tuple[torch.nn.Module, Callable[[], Any]]:
    """(the network, a function that draws `count` samples with it)."""
    labels = balanced_labels(options.count)
    asked = {"labels": labels, "seed": 0, "steps": options.steps, "batch_size": options.batch}
    if options.model == "video":
        video = load_video_dit()
        return video.transformer, lambda: sample_videos(video, **asked)
    digits = load_digits_dit()
    return digits, lambda: sample(digits, **asked)


def say(**found: Any) -> None:
    """Tell the parent process, a line at a time."""
    print(json.dumps(found), flush=True)


def memory() -> float:
    """Megabytes that this process held at most."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE, 1)


def cost(work: Callable[[], Any]) -> dict[str, float]:
    """When one call began and ended, and its CPU seconds."""
    began, cpu = time.monotonic(), time.process_time()
    work()
    return {"cpu_s": time.process_time() - cpu, "began": began, "ended": time.monotonic()}


def sample_plainly(model: torch.nn.Module, run: Callable[[], Any]) -> None:
    """The plain process: sample until the parent ends it or is gone, and tell when each call of the model began."""
    parent = os.getppid()
    model.register_forward_pre_hook(lambda *_: say(at=time.monotonic(), cpu_s=time.process_time()))
    while os.getppid() == parent:
        run()


def calibrate_again(model: torch.nn.Module, run: Callable[[], Any], scheme: str, repeats: int) -> None:
    """A calibrating process."""
    for _ in range(repeats):
        torch._dynamo.reset()
        recipes: list[vq.Recipe] = []
        with planning_timed() as spent:
            found = cost(lambda: recipes.append(vq.calibrate(model, run, scheme=scheme)))  # noqa: B023
        calls = recipes[0].provenance["calls"]
        say(**found, part="calibrate", calls=calls, planning_cpu_s=sum(spent))


def watch_again(model: torch.nn.Module, run: Callable[[], Any], repeats: int) -> None:
    """A process that only watches."""
    asked = read_options("w8a8", (), None, None)
    for _ in range(repeats):
        torch._dynamo.reset()
        with Watch(model, keep=()) as watch:
            for part in ("tracing included", "traced before"):
                calls, found = watch.calls, []

                def watched() -> None:
                    found.append(observe(watch, Samples(model, run), asked, progress_of(False), None))  # noqa: B023

                times = cost(watched)
                counted, rows = nbytes(found[-1])
                say(**times, part=part, calls=watch.calls - calls, statistics_bytes=counted, rows_bytes=rows)


def nbytes(found: Findings) -> tuple[int, int]:
    """(bytes of statistics, bytes of kept rows)."""
    records = [record for group in found.groups for record in group.inputs]
    parts = [part for record in records for part in record.parts.values()]
    rows = [rows for record in records if (rows := record.reservoir.rows_RK) is not None]
    counted = sum(t.numel() * t.element_size() for part in parts for _, t in part.tensors())
    return counted, sum(t.numel() * t.element_size() for t in rows)


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


def be_child(options: argparse.Namespace) -> None:
    """What `child` starts."""
    if options.only_memory:
        model, run = subject(options)
        before = memory()
        vq.calibrate(model, run, scheme=options.child) if options.child != "plain" else run()
        say(before_MB=before, peak_MB=memory())
        return
    os.sched_setaffinity(0, {options.core})
    model, run = subject(options)
    _, warm_up = subject(argparse.Namespace(**{**vars(options), "steps": 1}))
    warm_up()
    if options.child == "plain":
        sample_plainly(model, run)
    elif options.child == "watching":
        watch_again(model, run, options.repeats)
    else:
        calibrate_again(model, run, options.child, options.repeats)


def child(options: argparse.Namespace, what: str, to: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start a process that does "plain", "watching" or a scheme and tells of it in a file."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", what, "--model", options.model, *more]
    for name in ("count", "steps", "batch", "repeats", "core"):
        command += [f"--{name}", str(getattr(options, name))]
    with to.open("wb") as out:
        return subprocess.Popen(command, stdout=out, env=os.environ | ({} if more else KEPT))


def memory_of(options: argparse.Namespace, what: str) -> dict[str, float]:
    """Megabytes that a new process held before sampling and at most; `what` is "plain" or a scheme."""
    with TemporaryDirectory() as folder:
        told = Path(folder) / "told"
        if child(options, what, told, "--only-memory").wait():
            raise RuntimeError(f"the process of {what} failed; its error is above")
        return read_lines(told)[-1]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What a process has told so far; its last line may be half written."""
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines if line.startswith("{")]


def beside_plain(options: argparse.Namespace, what: str) -> dict[str, Any]:
    """Run one process beside a plain one: its repeats with their ratios."""
    with TemporaryDirectory() as folder:
        plain, other = Path(folder) / "plain", Path(folder) / "other"
        sampling = child(options, "plain", plain)
        try:
            while len(read_lines(plain)) < options.steps:
                if sampling.poll() is not None:
                    raise RuntimeError("the plain process ended; its error is above")
                time.sleep(1.0)
            if child(options, what, other).wait():
                raise RuntimeError(f"the process of {what} failed; its error is above")
        finally:
            sampling.kill()
            sampling.wait()
        told, repeats = read_lines(plain), read_lines(other)
    for each in repeats:
        inside = [line["cpu_s"] for line in told if each["began"] <= line["at"] <= each["ended"]]
        call = statistics.mean(later - sooner for sooner, later in pairwise(inside))
        each |= {"plain_call_cpu_s": call, "ratio": each["cpu_s"] / (call * each["calls"])}
    return {"what": what, "repeats": repeats}


def summary(processes: list[dict[str, Any]], part: str) -> dict[str, Any]:
    """Ratios of a part: the first of each process, and of all others the median, the least and the largest."""
    each = [[line["ratio"] for line in one["repeats"] if line["part"] == part] for one in processes]
    later = [ratio for ratios in each for ratio in ratios[1:]]
    found: dict[str, Any] = {"first_in_a_process": [round(ratios[0], 3) for ratios in each]}
    if later:
        picks = {"median": statistics.median(later), "least": min(later), "largest": max(later)}
        found |= {name: round(value, 3) for name, value in picks.items()}
    return found


def record_of(
    options: argparse.Namespace, held: dict[str, dict[str, float]], processes: list[dict[str, Any]]
) -> dict[str, Any]:
    """The result file after these processes."""
    names = ("model", "count", "steps", "batch", "processes", "repeats", "schemes")
    record: dict[str, Any] = {
        "command": "python benchmarks/calibration.py "
        + " ".join(f"--{name} {getattr(options, name)}" for name in names),
        "model": MODELS[options.model],
        "baseline": "the same sampling, eager fp32, on the same core at the same time",
        "cpu": _cpu(),
        "threads": 1,
        "load": options.load,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "time_ratio": {},
        "planning_cpu_s": {},
        "memory_MB": held,
        "memory_ratio": {
            what: round(each["peak_MB"] / held["plain"]["peak_MB"], 3)
            for what, each in held.items()
            if what != "plain"
        },
    }
    for what in dict.fromkeys(one["what"] for one in processes):
        same = [one for one in processes if one["what"] == what]
        if what == "watching":
            for part in ("tracing included", "traced before"):
                record["time_ratio"][f"watching, {part}"] = summary(same, part)
            last = same[-1]["repeats"][-1]
            record["bytes"] = {name: last[f"{name}_bytes"] for name in ("statistics", "rows")}
            continue
        record["time_ratio"][f"calibrate {what}, everything"] = summary(same, "calibrate")
        spent = [line["planning_cpu_s"] for one in same for line in one["repeats"]]
        record["planning_cpu_s"][what] = round(statistics.median(spent), 3)
    return record | {"each": processes}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="digits")
    parser.add_argument("--count", type=int, default=10, help="samples, as many as the paper's prompts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=10, help="samples in a call; guidance doubles its rows")
    parser.add_argument(
        "--processes", type=int, default=2, help="processes for each of watching and the schemes"
    )
    parser.add_argument("--repeats", type=int, default=3, help="calibrations in each")
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--load", default="nothing else ran on the machine", help="said in the results")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="which both share")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--only-memory", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = read_arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if options.child:
        be_child(options)
        return 0
    out = options.out or RESULTS / f"calibration-{options.model}.json"
    schemes = options.schemes.split(",")
    held = {what: memory_of(options, what) for what in ("plain", *schemes)}
    print(held, flush=True)
    processes: list[dict[str, Any]] = []
    for _ in range(options.processes):
        for what in ("watching", *schemes):
            processes.append(beside_plain(options, what))
            print(what, [round(line["ratio"], 3) for line in processes[-1]["repeats"]], flush=True)
            out.write_text(json.dumps(record_of(options, held, processes), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
