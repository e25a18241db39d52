"""The rows of `quality.py`: which method runs at which bits, and how it is asked for.

A row is a scheme, what calibration does first (if anything), and options of the backend. Weights are asymmetric, a
scale and a zero point for each output channel, as in both papers, unless BGR refines them or groups share
them (-g64).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from viditq_fx.switching import HIGH, LOW, SwitchRule

FP32 = "fp32"
MIXED_BITS = 5.0
"""Average bits of a weight in the rows of mixed precision, as in the paper."""
SECTIONS = {
    "A": "ViDiT-Q's ladder at W4A8 (table 2 of the paper)",
    "B": "Methods at W8A8, W6A6 and W4A8",
    "C": "Methods at 4-bit weights, DVD-Quant without data",
    "D": "DVD-Quant's parts at W4A4 (table 3) and its schedule at equal average bits (table 2)",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the tables; a row may stand in several sections."""

    name: str
    """Key of the row in the result file."""
    scheme: str
    labels: Mapping[str, str]
    """Section -> what the row is called there."""
    calibration: Mapping[str, Any] | None = None
    """Arguments of viditq_fx.calibrate besides the scheme; None: no data."""
    mixed: str | None = None
    """How 4 and 8 bits are spread over the sites: "decoupled" (by each group's own metric) or "squared" (by error)."""
    schedule: str | None = None
    """How steps of low bits are spread: "delta", "low-first", "high-first", "alternating" or "random"."""

    @property
    def sections(self) -> str:
        """Letters of its sections."""
        return "".join(self.labels)


def _four(bits: str, section_of: Mapping[str, str]) -> list[Row]:
    """MinMax, SmoothQuant, QuaRot and ViDiT-Q at one width; SVDQuant where weights have 4 bits."""
    titles: dict[str, tuple[str, str, Mapping[str, Any] | None]] = {
        "minmax": ("MinMax", f"{bits}-asym", None),
        "smooth": ("SmoothQuant (alpha 0.5)", f"{bits}-asym", {"balance": 0.5, "rotation": "off"}),
        "quarot": ("QuaRot", f"{bits}-asym-rot", None),
        "svdquant": (
            "SVDQuant's branch, rank 16",
            f"{bits}-asym-svd16",
            {"balance": 0.5, "rotation": "off"},
        ),
        "viditq": ("ViDiT-Q", f"{bits}-asym", {"balance": "search", "rotation": "search"}),
    }
    return [
        Row(
            name=f"{bits}-{key}",
            scheme=scheme,
            labels={letter: f"{bits.upper()} {title}" for letter in section_of},
            calibration=calibration,
        )
        for key, (title, scheme, calibration) in titles.items()
        if key != "svdquant" or bits.startswith("w4")
    ]


def rows() -> list[Row]:
    """All rows, the most telling first."""
    ladder = {
        "w4a8-minmax": "dynamic per token",
        "w4a8-quarot": "+ rotation only",
        "w4a8-viditq": "+ both, searched by site (the default)",
    }
    w4a8 = [_also(row, "A", ladder.get(row.name)) for row in _four("w4a8", dict.fromkeys("BC", ""))]
    static = Row(
        name="w4a8-static",
        scheme="w4a8-asym-static",
        labels={"A": "static per tensor"},
        calibration={"balance": "off", "rotation": "off"},
    )
    scaled = Row(
        name="w4a8-scale",
        scheme="w4a8-asym",
        labels={"A": "+ scale only"},
        calibration={"balance": "search", "rotation": "off"},
    )
    both = Row(
        name="w4a8-both",
        scheme="w4a8-asym-rot",
        labels={"A": "+ both, at every site"},
        calibration={"balance": "search", "rotation": "on"},
    )
    mixed = [
        Row(
            name=f"w4a8-mixed-{kind}",
            scheme="w4a8-asym",
            labels={"A": f"+ mixed precision of {MIXED_BITS:g} bits, {title}"},
            calibration={"balance": "search", "rotation": "search"},
            mixed=kind,
        )
        for kind, title in (("decoupled", "metric-decoupled"), ("squared", "by squared error"))
    ]
    w4a4 = [*_four("w4a4", {"C": ""}), _plain("dvd-w4a4", C="W4A4 DVD-Quant", D="W4A4 both")]
    parts = [
        _plain("w4a4-bgr", D="W4A4 BGR only"),
        _plain("w4a4-asym-rot-block", D="W4A4 ARQ only"),
    ]
    gbs = [_switched("delta", C="W4A6 DVD-Quant", D="delta-GBS")]
    schedules = [
        _switched("low-first", D="4 then 8"),
        _switched("high-first", D="8 then 4"),
        _switched("alternating", D="alternating"),
        _switched("random", D="random"),
    ]
    groups = [
        Row(
            name=f"w4a8-g64-{key}",
            scheme=scheme,
            labels={"B": f"W4A8-g64 {title}"},
            calibration={"balance": "search", "rotation": "search"},
        )
        for key, title, scheme in (
            ("viditq", "ViDiT-Q", "w4a8-g64-asym"),
            ("bgr-viditq", "BGR ViDiT-Q", "w4a8-g64-bgr"),
        )
    ]
    ordered = [static, w4a8[0], scaled, w4a8[2], both, w4a8[4], w4a8[1], w4a8[3], *groups]
    ordered += [_plain("dvd-w4a8", C="W4A8 DVD-Quant"), *w4a4, *parts, *_four("w8a8", {"B": ""}), *gbs]
    return [*ordered, *schedules, *mixed, *_four("w6a6", {"B": ""}), *_four("w4a6", {"C": ""})]


def _also(row: Row, section: str, label: str | None) -> Row:
    if label is None:
        return row
    return Row(
        name=row.name,
        scheme=row.scheme,
        labels={section: label, **row.labels},
        calibration=row.calibration,
    )


def _plain(scheme: str, **labels: str) -> Row:
    return Row(name=scheme, scheme=scheme, labels=labels)


def _switched(schedule: str, **labels: str) -> Row:
    return Row(name=f"dvd-w4a6-{schedule}", scheme="dvd-w4a6", labels=labels, schedule=schedule)


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A delta at which about half of a generation's steps are low, and how many those were."""

    value: float
    low: int
    steps: int
    changes: Sequence[float] = field(default_factory=tuple)
    """L1 change of fp32's output before each step but the first."""


def choose_delta(changes: Sequence[float]) -> Delta:
    """The delta at which the share of low steps comes closest to one half, by replay of fp32's own changes."""
    steps = len(changes) + 1
    tried = [(0.001 * 1.1**n) for n in range(100)]
    low, delta = min(
        ((_replay(changes, delta), delta) for delta in tried),
        key=lambda found: (abs(found[0] - steps / 2), found[1]),
    )
    return Delta(value=round(delta, 5), low=low, steps=steps, changes=tuple(changes))


def _replay(changes: Sequence[float], delta: float) -> int:
    """How many steps are low."""
    rule, since, low = SwitchRule(delta=delta), 0.0, 0
    for step in range(len(changes) + 1):
        since += changes[step - 1] if step else 0.0
        bits = rule.bits(step, since, step)
        low += bits == LOW
        since = 0.0 if bits == HIGH else since
    return low


def schedule_options(schedule: str | None, delta: Delta) -> dict[str, Any]:
    """Options of the backend that give `delta.low` of `delta.steps` steps low bits, in one order or another."""
    if schedule is None:
        return {}
    if schedule == "delta":
        return {"delta": delta.value}
    low, steps = delta.low, delta.steps
    if schedule == "low-first":
        order = [LOW] * low + [HIGH] * (steps - low)
    elif schedule == "high-first":
        order = [HIGH] * (steps - low) + [LOW] * low
    elif schedule == "alternating":
        order = [LOW if (i + 1) * low // steps > i * low // steps else HIGH for i in range(steps)]
    else:
        order = [LOW] * low + [HIGH] * (steps - low)
        random.Random(0).shuffle(order)
    return {"bits_schedule": order}
