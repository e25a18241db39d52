"""The explain report as plain text: one line a site, then the totals."""

from __future__ import annotations

from viditq_fx.inspection.collect import ExplainedSite, ExplainReport

_SHOWN = 6
_HEADER = ("site", "role", "MxKxN", "outcome", "kernel", "weight", "why")


def render_text(report: ExplainReport) -> str:
    """A table of every site and the totals, for a terminal or a log."""
    rows = [_HEADER, *(_row(site) for site in report.sites)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER) - 1)]
    lines = [
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * min(118, max(map(len, lines))))
    return "\n".join([*lines, "", *summary_lines(report)])


def summary_lines(report: ExplainReport) -> list[str]:
    """Totals in sentences."""
    totals = report.totals()
    before, packed = totals["quantized_weight_bytes_before"], totals["quantized_weight_bytes_packed"]
    lines = [
        f"{report.model}: {totals['quantized']} sites quantized ({', '.join(report.schemes)}), "
        f"{totals['kept']} kept in full precision, {totals['refused']} refused; "
        f"{report.graphs} graphs, {report.graph_runs} runs on {report.device}"
    ]
    if before:
        resident = totals["quantized_weight_bytes_full_resident"]
        lines.append(
            f"weights of quantized sites: {megabytes(before)} in full precision -> {megabytes(packed)} packed "
            f"({packed / before:.2f}x); full precision still in memory: {megabytes(resident)}"
        )
    if report.model_bytes_before:
        ratio = report.model_bytes / report.model_bytes_before
        lines.append(
            f"model in memory: {megabytes(report.model_bytes_before)} before -> "
            f"{megabytes(report.model_bytes)} now ({ratio:.2f}x)"
        )
    lines += [f"refused: {reason}" for reason in report.rejects]
    if report.unseen:
        shown = ", ".join(report.unseen[:_SHOWN]) + (", ..." if len(report.unseen) > _SHOWN else "")
        lines.append(
            f"{len(report.unseen)} linears are in no compiled graph (dead for this input, or run eagerly after a "
            f"graph break): {shown}"
        )
    return lines


def megabytes(nbytes: int) -> str:
    """Bytes as MB (10^6) with two decimals."""
    return f"{nbytes / 1e6:.2f} MB"


def _row(site: ExplainedSite) -> tuple[str, ...]:
    weight = f"{megabytes(site.bytes_full)} -> {megabytes(site.resident_packed)}" if site.done else ""
    calls = f" x{site.calls}" if site.calls > 1 else ""
    shape = f"{site.rows}x{site.depth}x{site.width}{calls}"
    outcome = f"{site.outcome} {site.done}" if site.done else site.outcome
    return (site.fqn or "(root)", site.role, shape, outcome, site.kernel or "", weight, site.reason or "")
