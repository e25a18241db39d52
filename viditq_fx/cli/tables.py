"""The command line's tables: the explain report, the doctor's findings, the demo's figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from viditq_fx.cli.doctor import Finding

if TYPE_CHECKING:
    from viditq_fx.demo.result import DemoResult
    from viditq_fx.inspection import ExplainedSite, ExplainReport

_OUTCOME_STYLES = {"quantized": "green", "simulated": "yellow", "kept": "", "refused": "red"}
_STATE_STYLES = {"ok": "green", "note": "yellow", "missing": "red"}


def explain_table(report: ExplainReport) -> Table:
    """One row a site: what was planned and done, by which kernel, or why not."""
    from viditq_fx.inspection.answers import count_of
    from viditq_fx.inspection.breakdown import everything
    from viditq_fx.inspection.render import EXPECTED, expected, has_expected, shape_of, why

    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("site", overflow="fold", ratio=5)
    times = [EXPECTED] if has_expected(report) else []
    for title in ("role", "M×K×N", "planned", "done", "kernel", "FLOPs", *times, "MB before", "MB now"):
        numeric = title.startswith("MB") or title in ("FLOPs", EXPECTED)
        table.add_column(title, justify="right" if numeric else "left", no_wrap=True)
    table.add_column("why", overflow="fold", ratio=4)
    for site in everything(report):
        before, now = _megabytes(site)
        table.add_row(
            Text(site.fqn or "(root)"),
            site.role,
            shape_of(site).replace("x", "×"),
            site.planned or "–",
            Text(site.done or site.outcome, style=_OUTCOME_STYLES[site.outcome]),
            site.kernel or "",
            count_of(site.flops),
            *([expected(site)] if times else []),
            before,
            now,
            Text(why(site)),
        )
    return table


def _megabytes(site: ExplainedSite) -> tuple[str, str]:
    """MB of a quantized site's weight: in full precision, and all that is in memory of it now."""
    if site.done is None:
        return "", ""
    return f"{site.bytes_full / 1e6:.2f}", f"{(site.resident_packed + site.resident_full) / 1e6:.2f}"


def total_tables(report: ExplainReport) -> list[Table]:
    """Totals by role, by kernel and by pass; the sites of the largest errors, if they were measured."""
    from viditq_fx.inspection.render import tables, worst_tables

    made, worst = [], worst_tables(report)
    for source in (*tables(report), *worst):
        table = Table(box=SIMPLE, pad_edge=False)
        if source in worst:
            table.title, table.title_justify = source.title, "left"
        for index, column in enumerate(source.columns):
            right = column in source.numeric
            table.add_column(
                column, justify="right" if right else "left", no_wrap=index == 0, overflow="fold"
            )
        for row in source.rows:
            table.add_row(*(Text(cell) for cell in row))
        made.append(table)
    return made


def doctor_table(findings: list[Finding]) -> Table:
    """One row a finding."""
    table = Table(box=SIMPLE, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        state = Text(finding.state, style=_STATE_STYLES[finding.state])
        table.add_row(finding.name, state, Text(finding.detail))
    return table


def demo_table(result: DemoResult) -> Table:
    """Figures down, variants across: it fits a narrow terminal."""
    from viditq_fx.demo.table import COLUMNS, cells

    rows = cells(result)
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row[0], justify="right", overflow="fold")
    for index, column in enumerate(COLUMNS[1:], start=1):
        table.add_row(column.title, *(Text(row[index]) for row in rows))
    return table
