"""How well every method draws: the tables of ViDiT-Q and DVD-Quant, on two small trained models, in real integers.

    PYTHONPATH=. python benchmarks/quality.py --model digits|video [--stress plain|stressed|both] [--rows A,B,C,D]
        [--images 64] [--steps 20] [--minutes 30] [--dry-run]
    PYTHONPATH=. python benchmarks/quality.py --model digits --table        the tables, from the result file
    PYTHONPATH=. python benchmarks/quality.py --model digits --figure

Every row goes through torch.compile(model, backend="viditq") and is refused if any planned site ran in floating point.
Three seeds; the same noise for every row; guidance and steps as in the demo. The result file is rewritten after
each row, and rows that it has are skipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import viditq_fx as vq
from benchmarks.cpu import _commit
from benchmarks.quality_models import IMAGES, SUBJECTS, Subject
from benchmarks.quality_rows import FP32, MIXED_BITS, Row, choose_delta, rows, schedule_options
from benchmarks.quality_table import figure, table
from viditq_fx.calibration.sensitivity import relative_square
from viditq_fx.demo.run import describe_machine
from viditq_fx.quality import sqnr_db
from viditq_fx.report import CompileReport
from viditq_fx.runtime import executions
from viditq_fx.scheme import QuantScheme
from viditq_fx.switching import HIGH, LOW
from viditq_fx.switching_graph import step_records, switches

SEEDS = (0, 1, 2)
CALIBRATION_SEED = 1000
TIMESTEPS = (50.0, 250.0, 500.0, 750.0, 950.0)
"""Of the one-step errors."""
RESULTS = Path(__file__).parent / "results"


class Reference:
    """What fp32 draws, with the plain weights: every row is compared with it; and how its velocity changes by step."""

    def __init__(self, subject: Subject, steps: int) -> None:
        self.steps = steps
        velocities: list[Tensor] = []

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = subject.network(*args, **kwargs)
            velocities.append(result[0].clone())
            return result

        self.drawn = [subject.draw(watched, seed, steps) for seed in SEEDS]
        changes = [float((b - a).abs().sum() / a.abs().sum()) for a, b in pairwise(velocities[:steps])]
        self.delta = choose_delta(changes)
        self.velocity = [subject.step(subject.network, timestep) for timestep in TIMESTEPS]

    def judge(self, subject: Subject, forward: Callable[..., Any]) -> dict[str, Any]:
        """Every figure by seed, and the distance of all seeds' samples together."""
        return self.figures(subject, [subject.draw(forward, seed, self.steps) for seed in SEEDS])

    def figures(self, subject: Subject, drawn: Sequence[Tensor]) -> dict[str, Any]:
        """As `judge`, of what is drawn already."""
        seeds = [subject.judge(d, r) for d, r in zip(drawn, self.drawn, strict=True)]
        figures: dict[str, Any] = {key: [_number(s[key]) for s in seeds] for key in seeds[0]}
        return figures | {"fd_all": _number(subject.distance(torch.cat(drawn)))}

    def step_error(self, subject: Subject, forward: Callable[..., Any]) -> dict[str, Any]:
        """SQNR of the velocity at five timesteps."""
        found = [subject.step(forward, timestep) for timestep in TIMESTEPS]
        return {"step_db": [_number(sqnr_db(w, f)) for w, f in zip(self.velocity, found, strict=True)]}


def _number(value: float) -> float | None:
    """Rounded; None for infinity, which JSON lacks."""
    return round(value, 4) if abs(value) < float("inf") else None


def measure(row: Row, subject: Subject, reference: Reference) -> dict[str, Any]:
    """One row: calibrated if it wants to be, compiled, drawn and judged."""
    torch._dynamo.reset()
    start = time.perf_counter()
    options: dict[str, Any] = {
        "scheme": row.scheme,
        "strict": True,
        **schedule_options(row.schedule, reference.delta),
    }
    if row.calibration is not None:
        options["recipe"] = calibrated_recipe(row, subject, reference.steps)
        del options["scheme"]
    forward: Any = torch.compile(subject.network, backend="viditq", options=options)
    calibrated = time.perf_counter()
    with executions() as ran:
        errors = reference.step_error(subject, forward)
        compiled = time.perf_counter()
        earlier = len(step_records(forward))
        vq.reset(forward)  # the timesteps of the errors end where those of a generation begin
        delta = None
        if row.schedule == "delta":
            delta = balanced_delta(forward, subject, reference)
            earlier = len(step_records(forward))
        figures = reference.judge(subject, forward)
    reports = {id(call.report): call.report for call in ran}
    if row.schedule is None:
        integers = bits_of(list(reports.values()))
    else:
        errors = {"step_db": None}  # its bits change from step to step: those of both widths have rows
        highs = [record.bits == HIGH for record in step_records(forward)[earlier:]]
        integers = bits_of(list(reports.values()), share_high=sum(highs) / len(highs))
        figures["delta"] = delta
        figures["high_by_step"] = "".join("8" if high else "4" for high in highs[: reference.steps])
    seconds = {
        "calibrate": round(calibrated - start, 1),
        "compile": round(compiled - calibrated, 1),
        "all": round(time.perf_counter() - start, 1),
    }
    return {**errors, **figures, **integers, "seconds": seconds}


def calibrated_recipe(row: Row, subject: Subject, steps: int) -> vq.Recipe:
    """Calibrated on noise that no row is judged on; the bits of its sites searched where the row says so."""

    def draw(forward: Callable[..., Any]) -> Tensor:
        return subject.draw(forward, CALIBRATION_SEED, steps)

    found = vq.calibrate(
        subject.network, lambda: draw(subject.network), scheme=row.scheme, **(row.calibration or {})
    )
    if row.mixed is None:
        return found
    search: dict[str, Any] = {"metrics": {"visual": relative_square}, "groups": {"visual": "*"}}
    if row.mixed == "decoupled":
        search = {"metrics": subject.metrics(), "groups": subject.groups}
    low = vq.QuantScheme.parse(row.scheme)
    # Its own draws, a third of the steps: there is one for every unit and candidate.
    table = vq.measure_sensitivity(
        subject.network,
        lambda forward: subject.draw(forward, CALIBRATION_SEED + 1, -(-steps // 3)),
        found,
        low=low,
        high=replace(low, weight_bits=8),
        **search,
    )
    return vq.allocate(table, found, budget=MIXED_BITS)


def balanced_delta(forward: Callable[..., Any], subject: Subject, reference: Reference) -> float:
    """The delta at which half of the steps run at low bits, by what the compiled model itself draws.

    Quantized outputs move more from step to step than fp32's, by whose changes the search begins.
    """
    (switch,) = switches(forward)  # pyright: ignore[reportArgumentType]

    def share_low(delta: float) -> float:
        switch.rule = replace(switch.rule, delta=delta)
        earlier = len(switch.records)
        vq.reset(forward)  # pyright: ignore[reportArgumentType]
        subject.draw(forward, CALIBRATION_SEED, reference.steps)
        records = switch.records[earlier:]
        return sum(record.bits == LOW for record in records) / len(records)

    tried: dict[float, float] = {}
    below, above = reference.delta.value / 4, reference.delta.value * 16
    for _ in range(7):
        delta = (below * above) ** 0.5
        tried[delta] = share_low(delta)
        below, above = (delta, above) if tried[delta] < 0.5 else (below, delta)
    best = min(tried, key=lambda delta: abs(tried[delta] - 0.5))
    switch.rule = replace(switch.rule, delta=best)
    vq.reset(forward)  # pyright: ignore[reportArgumentType]
    return round(best, 5)


def bits_of(reports: Sequence[CompileReport], share_high: float | None = None) -> dict[str, Any]:
    """Average bits, by multiplications, and bytes of what ran.

    Raises RuntimeError where a planned site did not run on integers, or none did.
    """
    for report in reports:
        wrong = [
            f"{s.fqn}: {s.outcome}, {s.reason}"
            for s in report.sites
            if s.planned and s.outcome != "quantized"
        ]
        if wrong or report.rejects:
            raise RuntimeError(f"planned, and not run on integers: {[*wrong, *report.rejects]}")
    widest = [site for site in max(reports, key=_input_bits).sites if site.outcome == "quantized"]
    if not widest:
        raise RuntimeError("no site was quantized")
    work = sum(site.flops for site in widest)
    weight = sum(site.flops * QuantScheme.parse(site.done or "").weight_bits for site in widest) / work
    high = _input_bits(max(reports, key=_input_bits))
    low = _input_bits(min(reports, key=_input_bits))
    share = 1.0 if share_high is None else share_high
    return {
        "sites": len(widest),
        "kernels": sorted({site.kernel or "" for site in widest}),
        "weight_bits": round(weight, 3),
        "input_bits": round(share * high + (1.0 - share) * low, 3),
        "bytes_of_bf16": round(
            sum(site.bytes_packed for site in widest) / sum(2 * site.depth * site.width for site in widest), 4
        ),
    }


def _input_bits(report: CompileReport) -> float:
    sites = [site for site in report.sites if site.outcome == "quantized"]
    return sum(s.flops * QuantScheme.parse(s.done or "").input_bits for s in sites) / sum(
        s.flops for s in sites
    )


def fresh_record(options: argparse.Namespace) -> dict[str, Any]:
    """The result file's settings, without rows."""
    return {
        "model": options.model,
        "settings": {
            "images": options.images,
            "steps": options.steps,
            "seeds": list(SEEDS),
            "timesteps": list(TIMESTEPS),
            "calibration_seed": CALIBRATION_SEED,
        },
        "machine": describe_machine(torch.device("cpu")),
        "rows": {"plain": {}, "stressed": {}},
    }


def load_record(options: argparse.Namespace) -> dict[str, Any]:
    """The result file so far. Exits where it holds rows of other settings."""
    fresh = fresh_record(options)
    if not options.out.exists():
        return fresh
    record = json.loads(options.out.read_text(encoding="utf-8"))
    if record["settings"] != fresh["settings"]:
        sys.exit(
            f"{options.out} holds rows of {record['settings']}: give the same, another --out, or remove it"
        )
    return record


def write_record(options: argparse.Namespace, kind: str, name: str, row: Mapping[str, Any]) -> None:
    """Add one row to the file: read again first, so that two runs of different rows can share it."""
    record = load_record(options)
    record["rows"][kind][name] = {**row, "commit": _commit(), "date": time.strftime("%Y-%m-%d")}
    partial = options.out.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(options.out)


def run(options: argparse.Namespace, wanted: Sequence[Row], kinds: Sequence[str]) -> None:
    """Measure what the file lacks, until the time is up."""
    end = time.monotonic() + 60.0 * options.minutes
    load_record(options)  # exits now and not after the first row, where it would
    subject = SUBJECTS[options.model](options.images, stressed=False)
    reference = Reference(subject, options.steps)
    delta = reference.delta
    print(f"delta {delta.value}: {delta.low} of {delta.steps} steps low, by fp32's own changes", flush=True)
    for kind in kinds:
        if FP32 not in load_record(options)["rows"][kind]:
            subject = SUBJECTS[options.model](options.images, stressed=kind == "stressed")
            figures = reference.judge(subject, subject.network) | reference.step_error(
                subject, subject.network
            )
            write_record(options, kind, FP32, figures | {"delta": asdict(delta)})
    for row in wanted:
        for kind in kinds:
            if row.name in load_record(options)["rows"][kind]:
                continue
            if time.monotonic() > end:
                print(f"stopped before {row.name} ({kind}): {options.minutes} minutes are over")
                return
            subject = SUBJECTS[options.model](options.images, stressed=kind == "stressed")
            found = measure(row, subject, reference)
            write_record(options, kind, row.name, found)
            print(_line(kind, row, found), flush=True)


def _line(kind: str, row: Row, found: Mapping[str, Any]) -> str:
    steps = found["step_db"]
    step = f"{statistics.mean(steps):6.2f}" if steps else "   -  "
    return (
        f"{kind:8} {row.name:22} W{found['weight_bits']:g} A{found['input_bits']:<5g} step {step} dB  "
        f"samples {statistics.mean(found['sqnr_db']):6.2f} dB  FD {statistics.mean(found['fd']):8.3f} "
        f"+- {statistics.stdev(found['fd']):.3f}  accuracy {statistics.mean(found['accuracy']):.3f}  {found['seconds']}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(SUBJECTS), required=True)
    parser.add_argument("--stress", choices=("plain", "stressed", "both"), default="both")
    parser.add_argument("--rows", default="A,B,C,D", help="sections, or names of rows")
    parser.add_argument("--images", type=int, help="samples of each of the 3 seeds")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no row after this")
    parser.add_argument("--dry-run", action="store_true", help="list the rows and leave")
    parser.add_argument(
        "--table", action="store_true", help="print the tables of the result file, in Markdown"
    )
    parser.add_argument("--figure", action="store_true", help="draw the result file, to a .png beside it")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.images = options.images or IMAGES[options.model]
    options.out = options.out or RESULTS / f"quality-{options.model}.json"
    asked = set(options.rows.split(","))
    wanted = [row for row in rows() if asked & {row.name, *row.sections}]
    kinds = ["plain", "stressed"] if options.stress == "both" else [options.stress]
    if options.table or options.figure:
        record = json.loads(options.out.read_text(encoding="utf-8"))
        if options.table:
            print(table(record, rows()))
        if options.figure:
            print(f"wrote {figure(record, rows(), options.out.with_suffix('.png'))}")
    elif options.dry_run:
        for row in wanted:
            print(f"{row.sections:3} {row.name:22} {row.scheme:18} {row.calibration or row.schedule or ''}")
    else:
        warnings.filterwarnings("ignore")
        run(options, wanted, kinds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
