"""The bits of a sampler's steps as a picture: the sum of changes against delta, and which steps ran at few bits."""

from __future__ import annotations

import math

from viditq_fx.inspection.chart import CHAR, box, frame, rule, text
from viditq_fx.inspection.steps import StepHistory
from viditq_fx.switching import HIGH, StepRecord

MOST_STRIPS = 8
"""Generations whose bits are drawn, the latest ones."""
_LEFT, _RIGHT, _TOP, _PLOT, _STRIP = 104.0, 90.0, 40.0, 150.0, 18.0
_WIDTH, _LEAST = 1000.0, 440.0


def step_chart(history: StepHistory) -> str:
    """The latest generation's sums, and a strip of bits for each of the latest generations, as SVG."""
    generations = history.generations[-MOST_STRIPS:]
    count = max(record.step for steps in generations for record in steps) + 1
    room = _WIDTH - _LEFT - _RIGHT
    pitch = min(room / count, max(28.0, _LEAST / count))
    right = _LEFT + pitch * count
    strips = _TOP + _PLOT + 30
    title = f"The sum of changes since the last step at {history.high_bits} bits"
    parts = [text(_LEFT, 20, title, kind="head"), *_sums(history, generations[-1], pitch, right)]
    parts.append(text(_LEFT - 10, strips - 8, "step", kind="soft", anchor="end"))
    every = max(1, math.ceil(30 / pitch))
    parts += [
        text(_LEFT + pitch * (step + 0.5), strips - 8, str(step), kind="soft", anchor="middle")
        for step in range(0, count, every)
    ]
    for index, steps in enumerate(generations):
        y = strips + _STRIP * index
        label = f"generation {steps[0].generation + 1}"
        parts.append(text(_LEFT - 10, y + 12, label, kind="soft", anchor="end"))
        for record in steps:
            tip = f"step {record.step}, timestep {record.timestep:g}: {history.bits(record)} bits; {_told(record)}"
            parts.append(box(_LEFT + pitch * record.step, y, pitch - 1, _STRIP - 3, record.bits, tip))
    y = strips + _STRIP * len(generations) + 16
    x = _LEFT
    for kind, bits in (("high", history.high_bits), ("low", history.low_bits)):
        words = f"{bits} bits"
        parts += [box(x, y - 10, 12, 12, kind), text(x + 17, y, words, kind="soft")]
        x += 17 + CHAR * len(words) + 16
    return frame(title, right + _RIGHT, y + 12, parts)


def _sums(history: StepHistory, steps: list[StepRecord], pitch: float, right: float) -> list[str]:
    """Axes, the line of delta, and the sum that was compared with it at each step of one generation."""
    delta, shown = history.rule.delta, history.rule.schedule is None and math.isfinite(history.rule.delta)
    sums = [record.since_high for record in steps if math.isfinite(record.since_high)]
    largest: float = max([*sums, delta] if shown else sums, default=0.0)
    top = 1.12 * largest or 1.0
    floor = _TOP + _PLOT

    def at(record: StepRecord) -> tuple[float, float]:
        height = min(record.since_high, top) if not math.isnan(record.since_high) else top
        return _LEFT + pitch * (record.step + 0.5), floor - _PLOT * height / top

    parts = [rule(_LEFT, floor, right, floor), rule(_LEFT, _TOP, _LEFT, floor)]
    for value in (0.0, top / 2, top):
        y = floor - _PLOT * value / top
        parts.append(text(_LEFT - 10, y + 4, f"{value:.2g}", kind="soft", anchor="end"))
    if shown:
        y = floor - _PLOT * delta / top
        parts += [rule(_LEFT, y, right, y, "limit"), text(right + 6, y + 4, f"delta {delta:g}", kind="limit")]
    line = " L".join(f"{x:.1f} {y:.1f}" for x, y in map(at, steps))
    parts.append(f'<path class="sum" d="M{line}"/>')
    for record in steps:
        x, y = at(record)
        kind = "high" if record.bits == HIGH else "low"
        tip = f"step {record.step}, timestep {record.timestep:g}: {_told(record)}"
        parts.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{tip}</title></circle>'
        )
    return parts


def _told(record: StepRecord) -> str:
    """What the decision was made from; only numbers, so nothing to escape."""
    change = (
        "no change known yet" if record.change is None else f"change of the step before {record.change:.3g}"
    )
    return f"sum {record.since_high:.3g}, {change}"
