"""What varies at each input, as a picture: a heat map of channels over the timesteps, and bars of the four sources.

A row is one input, read by one site or by several at once; both parts have the same rows. Bars are on a logarithmic
scale from 1, where nothing varies; a dashed line is where a source is named in the recommendation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from viditq_fx.calibration.analysis import BRANCHES, CHANNELS, STEPS, TOKENS, SiteErrors
from viditq_fx.inspection.chart import CHAR, LEVELS, box, frame, level, rule, text
from viditq_fx.inspection.errors import ratio

MOST_ROWS = 64
"""Of more inputs, those are drawn in which a source stands out most."""
SOURCES = (("token", TOKENS), ("condition", BRANCHES), ("timestep", STEPS), ("channel", CHANNELS))
"""The four sources of variation (ViDiT-Q section 3.2), and from where each is named."""
_ROW, _MARGIN, _GAP, _TOP = 17.0, 14.0, 22.0, 62.0
_HEAT, _LEAST_HEAT, _BAR, _VALUE = 380.0, 170.0, 104.0, 38.0
_CELL = (7.0, 40.0)
_SWATCH = 34.0
_LONGEST = 40
_LEAST_SPAN = 10.0
"""A scale of bars goes to this ratio at least, so that small ones look small."""


def chosen(inputs: Sequence[SiteErrors], order: Sequence[str]) -> list[SiteErrors]:
    """The inputs that are drawn, in the order in which `order` names their sites."""
    loudest = sorted(inputs, key=lambda entry: -max(_logs(entry)))[:MOST_ROWS]
    place = {site: index for index, site in enumerate(order)}
    return sorted(loudest, key=lambda entry: (place.get(entry.site, len(place)), entry.site))


def error_chart(rows: Sequence[SiteErrors], timestep: str | None) -> str:
    """The picture of these inputs, top to bottom, as SVG; the same for the same rows."""
    ranges = sorted({entry[:2] for row in rows for entry in row.by_range})
    labels = [_label(row) for row in rows]
    left = _MARGIN + max((len(label) for label in labels), default=0) * (CHAR + 0.7) + 10
    cell = min(_CELL[1], max(_CELL[0], _HEAT / max(len(ranges), 1)))
    heat = max(cell * len(ranges), _LEAST_HEAT)
    width = left + heat + len(SOURCES) * (_GAP + _BAR + _VALUE) + _MARGIN
    height = _TOP + _ROW * len(rows) + 48
    parts = [
        text(_MARGIN, _TOP + _ROW * index + 12, label, kind="path", tip="\n".join(row.group))
        for index, (row, label) in enumerate(zip(rows, labels, strict=True))
    ]
    parts += _heat_map(rows, ranges, left, cell, timestep)
    for index, (source, limit) in enumerate(SOURCES):
        x = left + heat + _GAP + index * (_GAP + _BAR + _VALUE)
        parts += _bars(rows, source, limit, x)
    return frame("Variation of the inputs", width, height, parts + _legend(left, height - 12))


def _label(row: SiteErrors) -> str:
    """The end of a path says more than its beginning."""
    more = f" +{len(row.group) - 1}" if len(row.group) > 1 else ""
    name = row.site or "(root)"
    kept = _LONGEST - len(more)
    return (name if len(name) <= kept else f"…{name[1 - kept :]}") + more


def _heat_map(
    rows: Sequence[SiteErrors],
    ranges: Sequence[tuple[float, float]],
    left: float,
    cell: float,
    timestep: str | None,
) -> list[str]:
    parts = [text(left, 20, "largest over mean channel", kind="head")]
    if timestep is None:
        parts.append(text(left, 36, "over all calls", kind="soft"))
    else:
        parts.append(text(left, 36, f"at each {timestep}", kind="soft"))
        right = left + cell * len(ranges)
        parts.append(text(left, _TOP - 5, f"{ranges[0][0]:g}", kind="soft"))
        if len(ranges) > 1 and right - left > 60:
            parts.append(text(right, _TOP - 5, f"{ranges[-1][1]:g}", kind="soft", anchor="end"))
    for index, row in enumerate(rows):
        found = {entry[:2]: entry for entry in row.by_range}
        for column, span in enumerate(ranges):
            if span not in found:
                continue
            low, high, largest, imbalance = found[span]
            where = (
                f"{timestep} {low:g}" + (f" to {high:g}" if high != low else "") if timestep else "all calls"
            )
            tip = f"{row.site}, {where}: largest over mean channel {imbalance:.3g}, max|x| {largest:.3g}"
            x, y = left + cell * column, _TOP + _ROW * index
            parts.append(box(x, y, cell - 1, _ROW - 1, f"heat{level(imbalance)}", tip))
    return parts


def _bars(rows: Sequence[SiteErrors], source: str, limit: float, x: float) -> list[str]:
    """One source's bars, with its name above and its value behind each."""
    values = [getattr(row, source) for row in rows]
    known = [value for value in values if value is not None and math.isfinite(value)]
    parts = [text(x, 20, source, kind="head")]
    if not known:
        what = "not kept apart" if source == "condition" else "not finite"
        return [*parts, text(x, 36, what, kind="soft")]
    largest = max(_LEAST_SPAN, *known)
    parts.append(text(x, 36, f"1 to {ratio(largest)}, logarithmic", kind="soft"))
    for index, (row, value) in enumerate(zip(rows, values, strict=True)):
        y = _TOP + _ROW * index
        parts.append(box(x, y + 2, _BAR, _ROW - 5, "track"))
        if value is None:
            continue
        part = 1.0 if value > largest else math.log(max(value, 1.0)) / math.log(largest)
        kind = "loud" if value >= limit else "bar"
        parts.append(
            box(x, y + 2, max(part * _BAR, 1.0), _ROW - 5, kind, f"{row.site}, {source}: {ratio(value)}")
        )
        parts.append(text(x + _BAR + 5, y + 12, ratio(value)))
    at = x + _BAR * math.log(limit) / math.log(largest)
    return [*parts, rule(at, _TOP - 2, at, _TOP + _ROW * len(rows), "dashed"), _limit(at, limit)]


def _limit(x: float, limit: float) -> str:
    return text(x, _TOP - 5, f"{limit:g}", kind="soft", anchor="middle")


def _legend(x: float, y: float) -> list[str]:
    """Swatches side by side, with the ratios at which one colour gives way to the next."""
    parts = []
    for index in range(len(LEVELS) + 1):
        parts.append(box(x, y - 22, _SWATCH - 1, 10, f"heat{index}"))
        x += _SWATCH
        if index < len(LEVELS):
            parts.append(text(x, y, f"{LEVELS[index]:g}", kind="soft", anchor="middle"))
    return parts


def _logs(entry: SiteErrors) -> list[float]:
    """How far each source stands out: its logarithm relative to that of the ratio at which it is named."""
    values = [(getattr(entry, source), limit) for source, limit in SOURCES]
    return [math.log(value) / math.log(limit) for value, limit in values if value is not None]
