"""The rows of benchmarks/quality.py: equal bits, a delta that is half low, and what its tables say."""

from __future__ import annotations

import pytest

from benchmarks.quality import bits_of
from benchmarks.quality_rows import FP32, SECTIONS, choose_delta, rows, schedule_options
from benchmarks.quality_table import table
from viditq_fx.options import split_options
from viditq_fx.report import CompileReport, SiteReport
from viditq_fx.switching import LOW

CHANGES = [0.3, 0.2, 0.1, 0.06, 0.05, 0.04, 0.03, 0.03, 0.03]


def test_the_chosen_delta_makes_half_of_the_steps_low() -> None:
    delta = choose_delta(CHANGES)
    assert delta.steps == 10
    assert delta.low == 5
    assert 0.03 < delta.value < 0.2


@pytest.mark.parametrize("schedule", ["low-first", "high-first", "alternating", "random"])
def test_schedules_have_as_many_low_steps_as_delta(schedule: str) -> None:
    delta = choose_delta(CHANGES)
    order = schedule_options(schedule, delta)["bits_schedule"]
    assert len(order) == delta.steps
    assert order.count(LOW) == delta.low


def test_every_row_is_taken_by_the_backend() -> None:
    delta = choose_delta(CHANGES)
    names = [row.name for row in rows()]
    assert len(set(names)) == len(names)
    assert {letter for row in rows() for letter in row.sections} == set(SECTIONS)
    for row in rows():
        options, rest = split_options({"scheme": row.scheme, **schedule_options(row.schedule, delta)})
        assert not rest
        assert (options.low_scheme is not None) == (row.schedule is not None), row.name


def _site(scheme: str | None, kernel: str = "any") -> SiteReport:
    return SiteReport(
        fqn="a", role="ffn.up", rows="4", depth=128, width=64, planned="w4a8", done=scheme, kernel=kernel,
        bytes_packed=128 * 64 // 2, flops=10,
    )  # fmt: skip


def _report(site: SiteReport) -> CompileReport:
    return CompileReport(scheme="w4a8", device="cpu", sites=[site])


def test_bits_are_those_of_the_steps_that_ran() -> None:
    found = bits_of([_report(_site("dvd-w4a8")), _report(_site("dvd-w4a4"))], share_high=0.25)
    assert (found["weight_bits"], found["input_bits"], found["bytes_of_bf16"]) == (4, 5, 0.25)


@pytest.mark.parametrize("site", [_site(None), _site("w4a8", kernel="simulation: fp32")])
def test_a_planned_site_in_floating_point_is_an_error(site: SiteReport) -> None:
    with pytest.raises(RuntimeError, match="a: "):
        bits_of([_report(site)])


def test_a_table_has_the_rows_that_were_measured() -> None:
    figures = {"fd": [1.0, 2.0, 3.0], "accuracy": [1.0, 0.5, 0.0], "sqnr_db": [10.0, 20.0, 30.0]}
    row = {
        **figures,
        "fd": [2.0, 4.0, 6.0],
        "step_db": [5.0],
        "weight_bits": 4.0,
        "input_bits": 8.0,
        "bytes_of_bf16": 0.27,
    }
    full = {**figures, "sqnr_db": [None] * 3, "step_db": [None]}
    record = {"model": "digits", "rows": {"plain": {FP32: full, "w4a8-minmax": row}, "stressed": {}}}
    lines = table(record, rows()).splitlines()
    assert "| fp32 | 32 / 32 | exact | exact | 2 ± 1 | 0.500 |  |  |  |  |" in lines
    assert "| dynamic per token | 4 / 8 | 5.0 | 20.0 | 4 ± 2 (+100.0 ± 0.0%) | 0.500 |  |  |  |  |" in lines
    assert sum("w4a8" in line.lower() and "MinMax" in line for line in lines) == 2
