"""Measure the demo's variants: step time in rotation, weights in memory, and the figures of their images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from viditq_fx.demo.config import DemoConfig
from viditq_fx.demo.metrics import class_accuracy, fd_digits
from viditq_fx.demo.model import load_classifier
from viditq_fx.demo.result import VariantFigures
from viditq_fx.demo.variants import Variant, tensor_bytes
from viditq_fx.inspection import ExplainReport, explain
from viditq_fx.quality import psnr, sqnr_db

Advance = Callable[[], None]
"""Called after each unit of work."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Step time of one variant over the rounds."""

    step_ms: float
    """Median over the rounds."""
    step_ms_quartiles: tuple[float, float]
    speed: float
    """Median over the rounds of the first variant's time over this one's in the same round."""
    speed_quartiles: tuple[float, float]


def time_in_rotation(
    variants: Sequence[Variant], inputs: Mapping[str, Any], rounds: int, advance: Advance
) -> dict[str, Timing]:
    """Time one step of every variant in turn, `rounds` times over, each round starting with another.

    A machine that others use drifts: in turn, the drift meets every variant alike.
    """
    taken: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for turn in range(rounds):
        shift = turn % len(variants)
        for variant in (*variants[shift:], *variants[:shift]):
            _synchronize(variant.device)
            start = time.perf_counter()
            variant.step(inputs)  # the copy of the result to the CPU waits for a GPU
            taken[variant.name].append(1e3 * (time.perf_counter() - start))
            advance()
    return {name: _timing(times, taken[variants[0].name]) for name, times in taken.items()}


def _timing(times: list[float], base_times: list[float]) -> Timing:
    low, middle, high = _quartiles(times)
    slow, speed, fast = _quartiles([base / time for base, time in zip(base_times, times, strict=True)])
    return Timing(step_ms=middle, step_ms_quartiles=(low, high), speed=speed, speed_quartiles=(slow, fast))


def _quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return 3 * values
    return statistics.quantiles(values, n=4, method="inclusive")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def inspect(variants: Sequence[Variant], inputs: Mapping[str, Any]) -> dict[str, ExplainReport]:
    """The explain report of every quantized variant, taken from one run on recorded inputs."""
    placed = {v.name: {k: v.placed(value) for k, value in inputs.items()} for v in variants}
    return {v.name: explain(v.model, **placed[v.name]) for v in variants if v.scheme is not None}


def gather_figures(
    config: DemoConfig,
    variants: Sequence[Variant],
    images: Mapping[str, list[Tensor]],
    labels: Tensor,
    timings: Mapping[str, Timing],
    steps: Sequence[Mapping[str, Any]],
) -> list[VariantFigures]:
    """Everything that the table says of each variant.

    images: by variant, one tensor [n, 1, 32, 32] for each seed. labels: [n], of one seed.
    steps: recorded inputs, on which one step of every variant is compared.
    """
    classifier = load_classifier()
    reports = inspect(variants, steps[0])
    references = [variants[0].step(inputs) for inputs in steps]
    base_images = torch.cat(images[variants[0].name])
    gathered = []
    for variant in variants:
        drawn = images[variant.name]
        together = torch.cat(drawn)
        enough = len(labels) > 1
        figures = VariantFigures(
            name=variant.name,
            scheme=variant.scheme,
            compile_seconds=variant.compile_seconds,
            **asdict(timings[variant.name]),
            linear_bytes=_linear_bytes(variant, reports),
            model_bytes=tensor_bytes(variant.model),
            accuracy=class_accuracy(together, labels.repeat(len(drawn)), classifier),
            fd_by_seed=[fd_digits(part, classifier) for part in drawn] if enough else [],
            fd_all=fd_digits(together, classifier) if enough else None,
        )
        if variant.scheme is not None:
            predictions = [variant.step(inputs) for inputs in steps]
            figures.sqnr_db = sqnr_db(torch.cat(references), torch.cat(predictions))
            figures.psnr_db = psnr(base_images, together)
            _add_sites(figures, reports[variant.name])
        gathered.append(figures)
    return gathered


def _linear_bytes(variant: Variant, reports: Mapping[str, ExplainReport]) -> int:
    """Memory of the quantized linears' weights; for full precision, of the same linears."""
    report = reports.get(variant.name)
    if report is None:
        other = next(iter(reports.values()), None)
        return 0 if other is None else other.totals()["quantized_weight_bytes_before"]
    totals = report.totals()
    return totals["quantized_weight_bytes_packed"] + totals["quantized_weight_bytes_full_resident"]


def _add_sites(figures: VariantFigures, report: ExplainReport) -> None:
    totals, data = report.totals(), report.to_dict()
    figures.model_bytes = totals["model_bytes"]
    figures.quantized, figures.kept, figures.refused = (totals[k] for k in ("quantized", "kept", "refused"))
    figures.kernels = sorted({site.kernel for site in report.sites if site.kernel})
    figures.sites = data["sites"]
