"""What a reader wants to know first, in sentences: what is quantized, what is not and why, what it saves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from viditq_fx.inspection.breakdown import by_reason, by_role, everything, total
from viditq_fx.inspection.collect import ExplainReport

_SHOWN = 4
_UNITS = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Sentences under three questions, and what else a reader must know."""

    quantized: tuple[str, ...]
    not_quantized: tuple[str, ...]
    saves: tuple[str, ...]
    notes: tuple[str, ...]


def answers(report: ExplainReport) -> Answers:
    """The three answers for a report."""
    return Answers(
        quantized=tuple(_quantized(report)),
        not_quantized=tuple(_not_quantized(report)),
        saves=tuple(_saves(report)),
        notes=tuple(_notes(report)),
    )


def _quantized(report: ExplainReport) -> list[str]:
    linears, done = len(report.sites), report.count("quantized")
    if not done:
        return [f"Nothing: none of the {linears} linears of {report.model} runs in integers."]
    rows = by_role(report)
    everything_row, linear_row = total(rows), total(r for r in rows if r.role != "attention")
    sentence = (
        f"{done} of {linears} linears of {report.model} run in integers ({', '.join(report.schemes)}): "
        f"{percent(linear_row.flops_quantized, linear_row.flops)} of the FLOPs of linears"
    )
    if linear_row.flops != everything_row.flops:
        sentence += (
            f", {percent(everything_row.flops_quantized, everything_row.flops)} counting attention too"
        )
    roles = ", ".join(f"{row.quantized} {row.role}" for row in rows if row.quantized)
    return [sentence + ".", f"By role: {roles}."]


def _not_quantized(report: ExplainReport) -> list[str]:
    flops = total(by_role(report)).flops
    sentences = [f"Refused: {reason}." for reason in report.rejects]
    for row in by_reason(report):
        count = len(row.sites)
        what = "attention call" if row.roles == ["attention"] else "linear"
        share = f" ({percent(row.flops, flops)} of all FLOPs)" if row.flops else ""
        sentences.append(
            f"{count} {what}{'s' if count > 1 else ''} {row.outcome}{share}: {row.reason}. {_named(row.sites)}."
        )
    if report.unseen:
        sentences.append(
            f"{len(report.unseen)} linears are in no compiled graph (dead for this input, or run eagerly: outside the "
            f"compiled blocks, or after a graph break): {_named(report.unseen)}."
        )
    return sentences or ["Every linear is quantized."]


def _named(paths: Sequence[str]) -> str:
    """Paths, those of repeated blocks told once: "blocks.*.attn (12)".

    Only the block's number becomes a star, so that the text is a pattern that `keep` takes.
    """
    patterns: dict[str, list[str]] = {}
    for path in paths:
        pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path, count=1)
        patterns.setdefault(pattern, []).append(path)
    named = [same[0] if len(same) == 1 else f"{pattern} ({len(same)})" for pattern, same in patterns.items()]
    return ", ".join(named[:_SHOWN]) + (f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else "")


def _saves(report: ExplainReport) -> list[str]:
    totals = report.totals()
    before, packed = totals["quantized_weight_bytes_before"], totals["quantized_weight_bytes_packed"]
    if not before:
        return ["Nothing: no weight is packed."]
    sentences = [
        f"Packed, the weights of quantized linears take {size(packed)} instead of {size(before)} "
        f"({packed / before:.2f}x)."
    ]
    resident = totals["quantized_weight_bytes_full_resident"]
    if resident:
        sentences.append(
            f"Their full-precision copies ({size(resident)}) are still in memory, so the model takes "
            f"{size(report.model_bytes)} instead of {size(report.model_bytes_before)}: compile with "
            'options={"weights": "release"}, or use vq.quantize_, to give them back.'
        )
    elif report.model_bytes_before:
        ratio = report.model_bytes / report.model_bytes_before
        sentences.append(
            f"The whole model takes {size(report.model_bytes)} instead of {size(report.model_bytes_before)} "
            f"({ratio:.2f}x)."
        )
    row = total(by_role(report))
    if row.flops:
        sentences.append(
            f"{count_of(row.flops_quantized)}FLOPs of {count_of(row.flops)}FLOPs a call are integer products; how much "
            "faster that is depends on the machine: this page measures no speed."
        )
    return sentences


def _notes(report: ExplainReport) -> list[str]:
    notes = [*report.notes]
    if any(site.flops_hinted for site in everything(report)):
        notes.append(
            "Shapes are dynamic: FLOPs, and the decisions that hang on M, are those of the sizes seen at compile time."
        )
    hidden = [site.fqn or "(root)" for site in report.sites if not site.width]
    if hidden:
        notes.append(f"FLOPs and bytes of what these calls hide are not counted: {_named(hidden)}.")
    if report.graph_runs > report.graphs:
        notes.append(
            f"{report.graphs} compiled graphs ran {report.graph_runs} times: one graph serves several blocks, or a "
            "block ran more than once."
        )
    elif report.graphs > 1:
        notes.append(f"The model was compiled in {report.graphs} graphs.")
    return notes


def lines(report: ExplainReport) -> list[str]:
    """The answers as plain lines, for a terminal or a log."""
    found = answers(report)
    titled = {"Quantized": found.quantized, "Not quantized": found.not_quantized}
    titled |= {"Saves": found.saves, "Note": found.notes}
    return [f"{title}: {sentence}" for title, sentences in titled.items() for sentence in sentences]


def percent(part: int, whole: int) -> str:
    """A share as text; only all of it reads as 100%."""
    if not whole:
        return "0%"
    share = 100 * part / whole
    if part != whole and share > 99.9:
        return "over 99.9%"
    return f"{share:.1f}%" if 0 < share < 100 else f"{share:.0f}%"


def size(nbytes: int) -> str:
    """Bytes as kB, MB or GB (powers of ten) with three digits."""
    return f"{count_of(nbytes)}B"


def count_of(number: int) -> str:
    """A number with three digits and the letter of its power of a thousand, e.g. "12.3 M"."""
    value, unit = float(number), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    digits = 0 if unit == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {_UNITS[unit]}"
