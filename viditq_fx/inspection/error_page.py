"""The page's sections on errors and on the bits of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from viditq_fx.calibration.analysis import EVEN, SiteErrors
from viditq_fx.inspection.answers import named
from viditq_fx.inspection.breakdown import everything
from viditq_fx.inspection.collect import ExplainReport
from viditq_fx.inspection.error_chart import chosen, error_chart
from viditq_fx.inspection.errors import ErrorReport, advice_in_words, ratio, share
from viditq_fx.inspection.render import SOURCES, SOURCES_NOTE
from viditq_fx.inspection.step_chart import step_chart


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table that can be sorted."""

    text: str
    value: float | None = None
    """What it is sorted by; None: by its text."""


@dataclass(frozen=True, kw_only=True)
class ErrorSection:
    """What the page shows of an ErrorReport."""

    seen: str
    """What was run for it."""
    advice: tuple[tuple[str, str, str], ...]
    """(how many sites, what they ask for, which)."""
    chart: str
    left_out: int
    """Inputs that are not in the chart."""
    columns: tuple[str, ...]
    numeric: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str


def error_section(report: ExplainReport) -> ErrorSection | None:
    """None where errors were not measured."""
    found = report.errors
    if found is None:
        return None
    drawn = chosen(found.inputs, [site.fqn for site in everything(report)])
    weights = ("4-bit weight", "after BGR", "rotated", "rotated, BGR")
    columns = ("site", *SOURCES, *weights, "what it asks for")
    calls = f"{found.calls} call{'s' if found.calls != 1 else ''} of the model"
    return ErrorSection(
        seen=f"{found.samples} sample{'s' if found.samples != 1 else ''}, {calls}, in full precision",
        advice=tuple(_advice(found.sites)),
        chart=error_chart(drawn, found.timestep),
        left_out=len(found.inputs) - len(drawn),
        columns=columns,
        numeric=columns[1:-1],
        rows=tuple(_row(entry, found) for entry in found.sites),
        note=SOURCES_NOTE,
    )


def _advice(entries: Sequence[SiteErrors]) -> list[tuple[str, str, str]]:
    return [
        (f"{len(sites)} of {len(entries)} sites", advice or EVEN, named(sites))
        for advice, sites in advice_in_words(entries)
    ]


def _row(entry: SiteErrors, found: ErrorReport) -> tuple[Cell, ...]:
    values = [getattr(entry, name) for name in SOURCES]
    weight = found.weight(entry.site)
    losses = (None,) * 4
    if weight is not None:
        losses = (weight.minmax, weight.bgr, weight.rotated_minmax, weight.rotated_bgr)
    return (
        Cell(text=entry.site or "(root)"),
        *(Cell(text=ratio(value), value=-1.0 if value is None else value) for value in values),
        *(Cell(text="" if v is None else share(v), value=-1.0 if v is None else v) for v in losses),
        Cell(text=entry.recommendation),
    )


def step_sections(report: ExplainReport) -> list[tuple[str, str]]:
    """(what the steps ran at in words, the picture), for each history."""
    return [(str(history), step_chart(history)) for history in report.steps]
