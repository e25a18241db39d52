"""What a choice of schemes costs, and which part of the budget each group gets.

A group's share follows from the error e_g that it makes when all its n_g weights have few bits, as rate-distortion
theory has it: at b bits the error is about e_g 4^-b, and the sum over groups at a given number of bits is least where

    b_g = clamp(level + 1/2 log2(e_g / n_g), fewest, most)          level: what the budget as a whole allows

(reverse water-filling). ViDiT-Q, section 4.3, derives bits from the same error and does not print how.

With ranges of the timestep, bits and latency are those of a call, averaged over the calls of a run. Bytes are not: all
forms of a weight that some range runs with stay in memory, so that two cost more than the larger one alone. Under a
budget of bytes a unit therefore gets one scheme for all ranges, by the sum of its losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from viditq_fx.calibration.sensitivity_table import SensitivityTable
from viditq_fx.calibration.units import Unit
from viditq_fx.errors import RecipeError
from viditq_fx.scheme import QuantScheme

Costs = Mapping[str, Mapping[str, float]] | Callable[[str, str], float]
"""Site -> scheme -> latency, or a function of both."""
KINDS = ("bits", "bytes", "latency")
Key = tuple[str, int]
"""Name of a unit, and the first range of the timestep that a choice is for."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One candidate of one unit."""

    scheme: str
    cost: float
    """In the budget's unit: bits of weight over all calls, bytes, or latency; whole numbers but for latency."""
    loss: float


Ladder = tuple[Choice, ...]
"""Candidates of a unit worth choosing: each costs more than the one before it, and loses less."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What gets one scheme: a unit in one range of the timestep, in several, or, without ranges, in all steps."""

    unit: Unit
    parts: tuple[int, ...]
    """Which of the table's parts."""
    calls: int
    """How many of a run's calls; 1 in a table without ranges, which counts none."""

    @property
    def key(self) -> Key:
        """What it is called: no two have one."""
        return self.unit.name, self.parts[0]

    def loss(self, table: SensitivityTable, scheme: str) -> float:
        """Its loss at a scheme, over its ranges. Raises RecipeError for what was not measured, or is no number."""
        losses = [table.loss(self.unit, scheme, part) for part in self.parts]
        for part, loss in zip(self.parts, losses, strict=True):
            if not math.isfinite(loss):
                where = f" in range {part} of the timestep" if table.edges else ""
                raise RecipeError(
                    f"unit {self.unit.name!r} has a {self.unit.group!r} loss of {loss} at {scheme}{where}: it has to "
                    "be a finite number; measure it again"
                )
        return sum(losses)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much all units together may cost."""

    kind: str
    asked: float
    """As it was given: average bits of a weight, bytes, or latency."""
    total: float
    """In the unit of an Entry's cost: for bits, those of all calls of a run; for bytes and latency, as asked."""
    calls: int
    """Of a run; 1 without ranges."""

    @classmethod
    def of(cls, given: float | Mapping[str, float], table: SensitivityTable) -> Budget:
        """A number is average bits of a weight. Raises RecipeError for anything that is no budget."""
        pairs = list(given.items()) if isinstance(given, Mapping) else [("bits", given)]
        kind, value = pairs[0] if len(pairs) == 1 else (None, None)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind not in KINDS or not number or not 0.0 < float(value or 0) < math.inf:
            raise RecipeError(
                f"budget={given!r}; give average bits of a weight, 5.0 or {{'bits': 5.0}}, {{'bytes': 1_500_000_000}} "
                "or {'latency': 0.25} in the unit of costs="
            )
        assert isinstance(value, int | float)
        calls = sum(table.calls) or 1
        weights = sum(unit.weights for unit in table.units) * calls
        total = {"bits": math.floor(value * weights + 1e-6), "bytes": math.floor(value)}.get(kind, value)
        return cls(kind=kind, asked=float(value), total=total, calls=calls)

    def entries(self, table: SensitivityTable) -> tuple[Entry, ...]:
        """What a scheme is chosen for."""
        calls = table.calls or (1,)
        apart = [(part,) for part in range(len(calls))]
        parts = [tuple(range(len(calls)))] if self.kind == "bytes" else apart
        return tuple(
            Entry(unit=unit, parts=own, calls=sum(calls[part] for part in own))
            for unit in table.units
            for own in parts
        )

    def average(self, cost: float, weights: int) -> float:
        """A cost in the unit that was asked for."""
        return cost / (weights * self.calls) if self.kind == "bits" else cost

    def shown(self, cost: float, weights: int) -> str:
        """A cost in the unit that was asked for, with its name."""
        value = self.average(cost, weights)
        if self.kind == "bits":
            return f"{value:.4g} bits a weight"
        return f"{value:.6g} {self.kind if self.kind == 'bytes' else 'of latency'}"


def ladders(
    table: SensitivityTable, entries: Sequence[Entry], budget: Budget, costs: Costs | None
) -> dict[Key, Ladder]:
    """The ladder of each entry. Raises RecipeError for a loss or a cost that is no finite number."""
    if (costs is not None) != (budget.kind == "latency"):
        raise RecipeError(
            "a latency budget needs costs={site: {scheme: latency}}, and no other budget reads them; got "
            f"budget in {budget.kind} and costs={costs!r}"
        )
    found: dict[Key, Ladder] = {}
    for entry in entries:
        choices = [
            Choice(scheme=name, loss=entry.loss(table, name), cost=_cost(entry, name, budget, costs))
            for name in table.schemes
        ]
        found[entry.key] = _front(choices)
    return found


def _cost(entry: Entry, name: str, budget: Budget, costs: Costs | None) -> float:
    scheme, unit = QuantScheme.parse(name), entry.unit
    if budget.kind == "bits":
        return scheme.weight_bits * unit.weights * entry.calls
    if budget.kind == "bytes":
        return sum(scheme.weight_form.nbytes(width, depth) for width, depth in unit.shapes)
    assert costs is not None
    return sum(_latency(site, name, costs) for site in unit.sites) * entry.calls / budget.calls


def _latency(site: str, scheme: str, costs: Costs) -> float:
    value: Any = None
    if callable(costs):
        value = costs(site, scheme)
    elif isinstance(costs, Mapping):
        value = costs.get(site, {}).get(scheme)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 <= value < math.inf:
        raise RecipeError(
            f"costs: site {site!r} at {scheme!r} takes {value!r}; give a number from 0 up for every site and candidate"
        )
    return float(value)


def _front(choices: list[Choice]) -> Ladder:
    """Leave out what costs no less than another that loses no more."""
    rungs: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.cost, c.loss)):
        if not rungs or choice.loss < rungs[-1].loss:
            rungs.append(choice)
    return tuple(rungs)


def shares(
    table: SensitivityTable, entries: Sequence[Entry], rungs: Mapping[Key, Ladder], budget: Budget
) -> dict[str, float]:
    """Group -> its part of the budget, whole numbers but for latency; their sum is at most the budget.

    In rising order of e_g / n_g.
    Raises RecipeError where even the cheapest candidates cost more.
    """
    offsets = {
        group: _offset(table, group, sum(u.weights for u in table.units if u.group == group))
        for group in table.groups()
    }
    groups = {
        group: [rungs[entry.key] for entry in entries if entry.unit.group == group]
        for group in sorted(offsets, key=lambda group: offsets[group])
    }
    least = {group: sum(ladder[0].cost for ladder in own) for group, own in groups.items()}
    most = {group: sum(ladder[-1].cost for ladder in own) for group, own in groups.items()}
    weights = sum(unit.weights for unit in table.units)
    if budget.total < sum(least.values()):
        raise RecipeError(
            f"budget {budget.shown(budget.total, weights)} cannot be met: the cheapest candidates take "
            f"{budget.shown(sum(least.values()), weights)} (the dearest {budget.shown(sum(most.values()), weights)}); "
            "raise it, or measure with a smaller low="
        )
    if budget.total >= sum(most.values()):
        return most
    parsed = [QuantScheme.parse(name) for name in table.schemes]
    widths = [scheme.weight_bits + scheme.input_bits for scheme in parsed]
    span = float(max(widths) - min(widths)) or 1.0

    def at(level: float) -> dict[str, float]:
        parts = {group: min(1.0, max(0.0, (level + offset) / span)) for group, offset in offsets.items()}
        return {group: least[group] + parts[group] * (most[group] - least[group]) for group in groups}

    low, high = -max(offsets.values()), span - min(offsets.values())
    for _ in range(200):
        middle = (low + high) / 2.0
        low, high = (middle, high) if sum(at(middle).values()) <= budget.total else (low, middle)
    return _whole(at(low), most, budget)


def _offset(table: SensitivityTable, group: str, weights: int) -> float:
    """1/2 log2(e / n) in bits. Raises RecipeError for a group that was not measured."""
    error = table.errors.get(group)
    if error is None or not math.isfinite(error) or error < 0.0:
        raise RecipeError(f"the table has the error {error} of group {group!r}: measure it again, to the end")
    return 0.5 * math.log2(max(error, 1e-30) / weights)


def _whole(parts: dict[str, float], most: Mapping[str, float], budget: Budget) -> dict[str, float]:
    """Round shares so that they are whole and spend the budget to the last bit or byte."""
    if budget.kind == "latency":
        over = sum(parts.values()) - budget.total
        largest = max(parts, key=lambda group: parts[group])
        return parts | {largest: min(most[largest], parts[largest] - over)}
    parts = {group: round(part) for group, part in parts.items()}
    for group in sorted(parts, key=lambda name: parts[name] - most[name]):
        room = most[group] - parts[group]
        parts[group] += min(room, budget.total - sum(parts.values()))
    return parts
