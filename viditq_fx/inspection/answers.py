"""What a reader wants to know first, in sentences: what is quantized, what is not and why, what it saves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from viditq_fx.inspection.breakdown import by_declined, by_reason, by_role, everything, total
from viditq_fx.inspection.collect import ExplainReport
from viditq_fx.inspection.vocabulary import scheme_in_words

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
        return [f"Nothing: none of the {linears} linears of {report.model} runs {_numbers(report)}."]
    rows = by_role(report)
    everything_row, linear_row = total(rows), total(r for r in rows if r.role != "attention")
    schemes = "; ".join(f"{scheme}: {scheme_in_words(scheme)}" for scheme in report.schemes)
    share = f"{percent(linear_row.flops_quantized, linear_row.flops)} of the FLOPs of linears"
    if linear_row.flops != everything_row.flops:
        share += f", {percent(everything_row.flops_quantized, everything_row.flops)} counting attention too"
    roles = ", ".join(f"{row.quantized} {row.role}" for row in rows if row.quantized)
    return [
        f"{done} of {linears} linears of {report.model} run {_numbers(report)} ({schemes}).",
        f"They do {share}.",
        f"By role: {roles}.",
    ]


def _numbers(report: ExplainReport) -> str:
    return "in 8-bit floating point" if report.schemes == ("fp8",) else "in integers"


def _not_quantized(report: ExplainReport) -> list[str]:
    flops = total(by_role(report)).flops
    sentences = [f"Refused: {reason}." for reason in report.rejects]
    for row in by_reason(report):
        count = len(row.sites)
        what = "attention call" if row.roles == ["attention"] else "linear"
        share = f", {percent(row.flops, flops)} of all FLOPs" if row.flops else ""
        sentences.append(
            f"{count} {what}{'s' if count > 1 else ''} {row.outcome}{share}: {row.reason}. Where: {named(row.sites)}."
        )
    if report.unseen:
        sentences.append(
            f"{len(report.unseen)} linears are in no compiled graph (dead for this input, or run eagerly: outside the "
            f"compiled blocks, or after a graph break): {named(report.unseen)}."
        )
    return sentences or ["Every linear is quantized."]


def named(paths: Sequence[str]) -> str:
    """Paths, those of repeated blocks told once: "blocks.*.attn (12)".

    Only the block's number becomes a star, so that the text is a pattern that `keep` takes.
    """
    patterns: dict[str, list[str]] = {}
    for path in paths:
        pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path, count=1)
        patterns.setdefault(pattern, []).append(path)
    most_first = sorted(patterns.items(), key=lambda item: -len(item[1]))
    words = [same[0] if len(same) == 1 else f"{pattern} ({len(same)})" for pattern, same in most_first]
    left = sum(len(same) for _, same in most_first[_SHOWN:])
    return ", ".join(words[:_SHOWN]) + (f" and {left} more" if left else "")


def _saves(report: ExplainReport) -> list[str]:
    totals = report.totals()
    before, packed = totals["quantized_weight_bytes_before"], totals["quantized_weight_bytes_packed"]
    if not before:
        return ["Nothing: no weight is packed."]
    sentences = [
        f"Weights of quantized linears: {size(packed)} packed (integers and scales) instead of {size(before)} in full "
        f"precision, {packed / before:.2f}x.",
        *_memory(report, totals["quantized_weight_bytes_full_resident"]),
    ]
    row = total(by_role(report))
    if row.flops:
        sentences.append(
            f"Work: {count_of(row.flops_quantized)}FLOPs of {count_of(row.flops)}FLOPs a call are integer products "
            f"({percent(row.flops_quantized, row.flops)}). How much faster that is depends on the machine; no speed is "
            "measured here."
        )
    times = report.expected_times()
    if times is not None:
        sentences.append(
            f"Expected time of the linears of a call: {times['us'] / 1e3:.3g} ms instead of "
            f"{times['full_us'] / 1e3:.3g} ms, an estimate from written-down rates, made before compiling."
        )
    return sentences


def _memory(report: ExplainReport, resident: int) -> list[str]:
    """What the whole model takes now; `resident`: bytes of full-precision copies beside packed weights."""
    now, before = report.model_bytes, report.model_bytes_before
    if not before:
        return []
    if resident:
        return [
            f"Memory now: nothing is saved yet. The full-precision copies ({size(resident)}) stay beside the packed "
            f"weights: the whole model takes {size(now)} instead of {size(before)} ({now / before:.2f}x). "
            f'options={{"weights": "release"}}, or vq.quantize_, frees them: {size(now - resident)} '
            f"({(now - resident) / before:.2f}x)."
        ]
    return [f"Memory now: the whole model takes {size(now)} instead of {size(before)} ({now / before:.2f}x)."]


def _notes(report: ExplainReport) -> list[str]:
    notes = [*report.notes]
    if any(site.flops_hinted for site in everything(report)):
        notes.append(
            "Shapes are dynamic: FLOPs, and the decisions that hang on M, are those of the sizes seen at compile time."
        )
    hidden = [site.fqn or "(root)" for site in report.sites if not site.width]
    if hidden:
        notes.append(f"FLOPs and bytes of what these calls hide are not counted: {named(hidden)}.")
    for row in by_declined(report):
        if row.extra:
            places = f"{len(row.sites)} place{'s' if len(row.sites) > 1 else ''}"
            notes.append(
                f"Extra pass {row.step!r} declined {places}: {row.reason}. Where: {named(row.sites)}."
            )
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
