"""The demo's table: its columns, what each number means in one sentence, and its cells as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from viditq_fx.demo.result import DemoResult, VariantFigures, signed, speed_in_words


@dataclass(frozen=True, kw_only=True)
class Column:
    """One figure of every variant."""

    title: str
    meaning: str
    """One sentence."""
    cell: Callable[[VariantFigures, DemoResult], str]


def _decibels(value: float | None) -> str:
    if value is None:
        return "–"
    return "identical" if value == float("inf") else f"{value:.1f} dB"


def _speed(figures: VariantFigures, result: DemoResult) -> str:
    return "1.00x" if figures is result.baseline else speed_in_words(figures, result)


def _fd(figures: VariantFigures, result: DemoResult) -> str:
    if figures.fd_mean is None:
        return "–"
    if figures is result.baseline:
        return f"{figures.fd_mean:.1f}" + (
            f" ± {result.fd_spread:.1f}" if result.fd_spread is not None else ""
        )
    assert result.baseline.fd_mean is not None
    return f"{figures.fd_mean:.1f} ({signed(figures.fd_mean - result.baseline.fd_mean)})"


def _sites(figures: VariantFigures, result: DemoResult) -> str:
    if figures is result.baseline:
        return "–"
    return f"{figures.quantized} / {figures.kept} / {figures.refused}"


COLUMNS = (
    Column(title="variant", meaning="Full precision first, then each scheme.", cell=lambda f, _: f.name),
    Column(
        title="linears MB",
        meaning="Memory that the weights of the quantized linears take while the model runs (10^6 bytes).",
        cell=lambda f, _: f"{f.linear_bytes / 1e6:.2f}",
    ),
    Column(
        title="model MB",
        meaning="Memory of all weights of the model, including those kept in full precision.",
        cell=lambda f, _: f"{f.model_bytes / 1e6:.2f}",
    ),
    Column(
        title="ms/step",
        meaning="Median time of one sampling step after compilation, all variants timed in turn.",
        cell=lambda f, _: f"{f.step_ms:.0f}" if f.step_ms >= 10 else f"{f.step_ms:.1f}",
    ),
    Column(
        title="speed",
        meaning="Step time of full precision divided by this one's, median of the rounds: above 1 is faster.",
        cell=_speed,
    ),
    Column(
        title="compile s",
        meaning="Time of the first call, which compiles the repeated block (full precision: by plain Inductor); a "
        "second run on this machine finds part of it cached.",
        cell=lambda f, _: f"{f.compile_seconds:.1f}",
    ),
    Column(
        title="SQNR",
        meaning="Signal over quantization noise of single steps on full precision's own inputs: +20 dB is a "
        "tenth of the error.",
        cell=lambda f, _: _decibels(f.sqnr_db),
    ),
    Column(
        title="PSNR",
        meaning="How near the finished images are to full precision's from the same noise.",
        cell=lambda f, _: _decibels(f.psnr_db),
    ),
    Column(
        title="FD-digits",
        meaning="Distance of the images' features from those of real digits, mean over the seeds (lower is "
        "better); ± is full precision's own spread from seed to seed.",
        cell=_fd,
    ),
    Column(
        title="accuracy",
        meaning="Share of images in which a classifier sees the digit that was asked for.",
        cell=lambda f, _: f"{100 * f.accuracy:.1f}%",
    ),
    Column(
        title="quantized / kept / refused",
        meaning="Linears that run in integers, that the policy keeps in full precision, and that were planned "
        "but could not be done.",
        cell=_sites,
    ),
)


def cells(result: DemoResult) -> list[list[str]]:
    """The table's text, one row a variant."""
    return [[column.cell(figures, result) for column in COLUMNS] for figures in result.variants]
