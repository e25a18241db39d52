"""Which bits the steps of a sampler ran at, and why: the records of DVD-Quant's delta-guided switching."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from viditq_fx.scheme import SWITCHED, QuantScheme
from viditq_fx.switching import HIGH, StepRecord, SwitchRule
from viditq_fx.switching_graph import high_schemes, switches


@dataclass(frozen=True, kw_only=True)
class StepHistory:
    """What one decider noted: of a model, or of one of its graphs."""

    rule: SwitchRule
    low_bits: int
    """Bits of an input in a low step."""
    high_bits: int
    records: tuple[StepRecord, ...]

    def bits(self, record: StepRecord) -> int:
        """Bits of an input in a step."""
        return self.high_bits if record.bits == HIGH else self.low_bits

    @property
    def average_bits(self) -> float:
        """Mean bits of an input over all steps."""
        return sum(map(self.bits, self.records)) / len(self.records)

    @property
    def generations(self) -> list[list[StepRecord]]:
        """The steps of each generation, in the order in which the generations began."""
        found: dict[int, list[StepRecord]] = {}
        for record in self.records:
            found.setdefault(record.generation, []).append(record)
        return list(found.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return {**asdict(self), "average_bits": self.average_bits}

    def __str__(self) -> str:
        low = sum(record.bits != HIGH for record in self.records)
        count, generations = len(self.records), len(self.generations)
        rule = f"delta {self.rule.delta:g}" if self.rule.schedule is None else "by a schedule"
        return (
            f"{self.average_bits:.2f} bits of an input on average: {low} of {count} steps at {self.low_bits}, "
            f"{count - low} at {self.high_bits} ({rule}, {generations} generation{'s' if generations > 1 else ''})"
        )


def step_histories(model: Any) -> list[StepHistory]:
    """What each decider of a model noted so far; nothing for one whose graphs switch no bits, or for a function."""
    if not isinstance(model, nn.Module):
        return []
    schemes = {QuantScheme.parse(name) for name in high_schemes(model)}
    pairs = [(QuantScheme.parse(low), QuantScheme.parse(high)) for low, high in SWITCHED.values()]
    widths = next(((low.input_bits, high.input_bits) for low, high in pairs if high in schemes), None)
    if widths is None:
        return []
    return [
        StepHistory(rule=switch.rule, low_bits=widths[0], high_bits=widths[1], records=tuple(switch.records))
        for switch in switches(model)
        if switch.records
    ]
