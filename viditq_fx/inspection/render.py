"""The explain report as plain text: one line a site, totals by role, kernel and pass, then the answers."""

from __future__ import annotations

from dataclasses import dataclass

from viditq_fx.calibration.analysis import EVEN
from viditq_fx.inspection.answers import count_of, lines, named, percent, size
from viditq_fx.inspection.breakdown import (
    RoleRow,
    block_of,
    by_declined,
    by_kernel,
    by_pass,
    by_role,
    everything,
    total,
)
from viditq_fx.inspection.collect import ExplainedSite, ExplainReport
from viditq_fx.inspection.errors import advice_in_words, ratio, share
from viditq_fx.inspection.vocabulary import role_in_words


@dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table of text; the terminal, the plain text and the page each draw it in their own way."""

    title: str
    columns: tuple[str, ...]
    numeric: tuple[str, ...]
    """Columns of numbers, to be aligned to the right."""
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    """What a reader must know to read it."""


def tables(report: ExplainReport) -> tuple[Table, ...]:
    """Totals by role, by kernel and by pass; what passes declined, if there is something that no site tells."""
    made = (_role_table(report), _kernel_table(report), _pass_table(report), _declined_table(report))
    return tuple(table for table in made if table.rows)


def site_table(report: ExplainReport) -> Table:
    """One row for each site and attention call; the expected times where any is known."""
    columns = ("site", "role", "MxKxN", "outcome", "kernel", "FLOPs", EXPECTED, "weight", "why")
    rows = tuple(_site_row(site) for site in everything(report))
    if not has_expected(report):
        at = columns.index(EXPECTED)
        columns, rows = columns[:at] + columns[at + 1 :], tuple(row[:at] + row[at + 1 :] for row in rows)
    return Table(title="sites", columns=columns, numeric=("FLOPs", EXPECTED), rows=rows)


EXPECTED = "us (in full)"
"""Title of the column of expected times."""


def has_expected(report: ExplainReport) -> bool:
    """Whether the cost model knows the time of any site: not on CPUs."""
    return any(site.expected_full_us is not None for site in report.sites)


def expected(site: ExplainedSite) -> str:
    """Microseconds that a site should take as planned, then in full precision; "" where they are not known."""
    full = "" if site.expected_full_us is None else f"({site.expected_full_us:.1f})"
    return full if site.expected_us is None else f"{site.expected_us:.1f} {full}"


def render_text(report: ExplainReport) -> str:
    """Every site, the totals and the answers, for a terminal or a log."""
    parts = [_text(table) for table in (site_table(report), *tables(report))]
    parts += [f"{table.title}\n{_text(table)}" for table in worst_tables(report)]
    return "\n\n".join([*parts, "\n".join([*lines(report), *error_lines(report)])])


WORST = 10
"""How many inputs the text shows of those that errors were measured on."""


def worst_tables(report: ExplainReport) -> tuple[Table, ...]:
    """The most incoherent inputs with what 4 bits do to their weights, if errors were measured."""
    if report.errors is None:
        return ()
    inputs = report.errors.inputs
    rows = []
    for entry in inputs[:WORST]:
        weight = report.errors.weight(entry.site)
        plain, rotated = ("", "")
        if weight is not None:
            plain = f"{share(weight.minmax)} -> {share(weight.bgr)}"
            rotated = f"{share(weight.rotated_minmax)} -> {share(weight.rotated_bgr)}"
        others = f" (+{len(entry.group) - 1})" if len(entry.group) > 1 else ""
        values = (entry.token, entry.condition, entry.timestep, entry.channel, entry.drift, entry.incoherence)
        rows.append((entry.site + others, *map(ratio, values), plain, rotated, entry.recommendation))
    columns = ("site", *SOURCES, "4-bit weight, BGR", "rotated, BGR", "what it asks for")
    title = f"errors: the {len(rows)} most incoherent of {len(inputs)} inputs"
    return (Table(title=title, columns=columns, numeric=columns[1:-1], rows=tuple(rows), note=SOURCES_NOTE),)


SOURCES = ("token", "condition", "timestep", "channel", "drift", "incoherence")
"""Titles of the columns of `SiteErrors`."""
SOURCES_NOTE = (
    "Of the largest magnitudes that a site reads: token: the largest row's over the median row's; condition: between "
    "the branches of guidance; timestep: between the ranges of the timestep; channel: the largest channel's over the "
    "mean one's; drift: how far the profile of the channels moves, 0 to 1; incoherence: max|X| √count / ‖X‖. "
    "Weights: relative squared error at 4 bits, a grid for each row by its minimum and maximum, then "
    "refined by BGR; and both after a rotation."
)


def error_lines(report: ExplainReport) -> list[str]:
    """What the sites ask for, and the bits of steps, as sentences."""
    lines = []
    if report.errors is not None:
        count = len(report.errors.sites)
        for advice, sites in advice_in_words(report.errors.sites):
            lines.append(f"Errors: {len(sites)} of {count} sites: {advice or EVEN}. Where: {named(sites)}.")
    return [*lines, *(f"Steps: {history}." for history in report.steps)]


def _text(table: Table) -> str:
    rows = [table.columns, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns) - 1)]
    text = [
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
    text.insert(1, "-" * min(118, max(map(len, text))))
    return "\n".join(text)


def _site_row(site: ExplainedSite) -> tuple[str, ...]:
    weight = f"{size(site.bytes_full)} -> {size(site.resident_packed)}" if site.done else ""
    return (
        site.fqn or "(root)",
        site.role,
        shape_of(site),
        f"{site.outcome} {site.done}" if site.done else site.outcome,
        site.kernel or "",
        count_of(site.flops),
        expected(site),
        weight,
        why(site),
    )


def why(site: ExplainedSite) -> str:
    """Why a site ran as it did, and what it was fused with."""
    words = [site.reason] if site.reason else []
    if site.joined is not None and site.joined != site.fqn:
        words.append(f"one GEMM with {site.joined.removeprefix(block_of(site.fqn) + '.')}")
    if site.prologue is not None and site.role == "attention":
        words.append(f"form: {site.prologue}")
    elif site.prologue is not None:
        words.append(f"input quantized together with {site.prologue}")
    if site.unfused is not None:
        words.append(site.unfused)
    return "; ".join(words)


def shape_of(site: ExplainedSite) -> str:
    """M x K x N, and how often it ran."""
    calls = f" x{site.calls}" if site.calls > 1 else ""
    return f"{site.rows}x{site.depth}x{site.width}{calls}"


def _role_table(report: ExplainReport) -> Table:
    rows = by_role(report)
    columns = (
        "role",
        "sites",
        "quantized",
        "simulated",
        "kept",
        "refused",
        "FLOPs",
        "of all FLOPs",
        "quantized FLOPs",
    )
    columns += ("weights", "quantized weights", "packed", "what it is")
    everything_row = total(rows)
    cells = tuple(_role_cells(row, everything_row) for row in [*rows, everything_row])
    note = (
        "FLOPs are multiplies and adds of one call of the model: 2·M·K·N of a linear, 2·B·H·Lq·Lk·(D + Dv) of an "
        "attention; element-wise work is not counted. Weights are bytes in full precision, packed ones integers and "
        "scales; one that several sites share counts once."
    )
    return Table(title="by role", columns=columns, numeric=columns[1:-1], rows=cells, note=note)


def _role_cells(row: RoleRow, whole: RoleRow) -> tuple[str, ...]:
    weights = (size(row.weight_bytes), percent(row.weight_bytes_quantized, row.weight_bytes))
    return (
        *(
            row.role,
            *(str(n or "") for n in (row.sites, row.quantized, row.simulated, row.kept, row.refused)),
        ),
        *(count_of(row.flops), percent(row.flops, whole.flops), percent(row.flops_quantized, row.flops)),
        *(weights if row.weight_bytes else ("", "")),
        size(row.weight_bytes_packed) if row.weight_bytes_packed else "",
        role_in_words(row.role),
    )


def _kernel_table(report: ExplainReport) -> Table:
    rows = by_kernel(report)
    flops = sum(row.flops for row in rows)
    columns = ("kernel", "sites", "of all FLOPs", "roles", "why this one")
    cells = [
        (row.kernel, str(row.sites), percent(row.flops, flops), ", ".join(row.roles), "; ".join(row.reasons))
        for row in rows
    ]
    shown = len(columns) if any(row.reasons for row in rows) else -1
    return Table(
        title="by kernel",
        columns=columns[:shown],
        numeric=("sites", "of all FLOPs"),
        rows=tuple(row[:shown] for row in cells),
        note="What computes the sites on this machine.",
    )


def _pass_table(report: ExplainReport) -> Table:
    columns = ("pass", "ms", "graphs", "matches", "rejects", "nodes before", "nodes after")
    rows = by_pass(report)
    cells = [
        (
            *(row.name, f"{1e3 * row.seconds:.1f}", str(row.graphs), str(row.matches), str(row.rejects)),
            *(str(row.nodes_before), str(row.nodes_after)),
        )
        for row in rows
    ]
    cells.append(("all", f"{1e3 * sum(row.seconds for row in rows):.1f}", "", "", "", "", ""))
    note = (
        "A pass is one rewrite of the graph; they run in this order, before Inductor. Matches: places where it did its "
        "work; rejects: places that it left as they were, with a reason."
    )
    return Table(title="by pass", columns=columns, numeric=columns[1:], rows=tuple(cells), note=note)


def _declined_table(report: ExplainReport) -> Table:
    """Rejects that no site's own line tells, those of passes from outside among them."""
    rows = tuple(
        (f"{row.step} (extra)" if row.extra else row.step, str(len(row.sites)), row.reason, named(row.sites))
        for row in by_declined(report)
    )
    return Table(
        title="what passes declined",
        columns=("pass", "places", "why", "where"),
        numeric=("places",),
        rows=rows,
        note="Beside what the sites say themselves: the site runs as it did, this pass alone did nothing there.",
    )
