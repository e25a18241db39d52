"""Which bits a denoising step runs at: delta-guided bit switching of DVD-Quant (section 3.4, equation 11).

    B(t_i) = low   while  sum of L1(F, t) over the steps since the last high one  <  delta
             high  else, and the sum starts anew;      L1(F, t) = |F_t - F_(t-1)|_1 / |F_(t-1)|_1

F is the model's output, a step is all calls at one timestep (classifier-free guidance may make two, a branch each). Of
a step's outputs only this one number is used, one step later: it comes to the host together with the timestep, so a
step waits for the device once. The calls of a step's other branches wait only where they bring a timestep tensor of
their own: the one that was read before, unwritten since, is known again without its value. Until two outputs are
there, and for the first `high_first` steps, bits are high.

A generation is told from the next by its timestep turning back, and from others by thread, shapes and
`generation(...)`. Where an output is not finite, or grew from nothing, the change counts as infinite: high bits.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from viditq_fx.errors import OptionError

BRANCHES = 4
"""Most calls at one timestep: guidance makes two, guidance with perturbed attention three."""
GENERATIONS = 8
"""Most generations that are followed at once; the one that was idle longest gives way."""
LOW, HIGH = "low", "high"
_GENERATION: ContextVar[object] = ContextVar("viditq_generation", default=None)


@dataclass(frozen=True, kw_only=True)
class SwitchRule:
    """When a step runs at low bits."""

    delta: float = 0.09
    """The sum of changes from which a step runs at high bits; 0 is always. DVD-Quant has 0.09 for 50 steps."""
    high_first: int = 2
    """Steps at the beginning that run at high bits whatever changes; two outputs are needed for a change anyhow."""
    high_last: int = 0
    """Steps at the end that do; `steps` has to be given with it."""
    steps: int | None = None
    """Steps of a generation."""
    schedule: tuple[str, ...] | None = None
    """Bits of each step, "low" or "high", in place of the rule: for comparisons. The last one holds for all later."""

    def __post_init__(self) -> None:
        if not isinstance(self.delta, int | float) or isinstance(self.delta, bool) or not self.delta >= 0:
            raise OptionError(f"option 'delta' is a number from 0 (always high bits) up, not {self.delta!r}")
        for name in ("high_first", "high_last", "steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise OptionError(f"option {name!r} is a number of steps, 0 or more, not {value!r}")
        if self.high_last and self.steps is None:
            raise OptionError(
                "option 'high_last' counts from the end: give 'steps', a generation's number of steps"
            )
        if self.schedule is not None and (not self.schedule or set(self.schedule) - {LOW, HIGH}):
            raise OptionError(
                f"option 'bits_schedule' lists {LOW!r} and {HIGH!r} by step, not {self.schedule!r}"
            )

    def bits(self, step: int, since_high: float, changes: int) -> str:
        """Bits of step number `step`, with `since_high` summed over steps since a high one, of `changes` known ones."""
        if self.schedule is not None:
            return self.schedule[min(step, len(self.schedule) - 1)]
        late = self.steps is not None and step >= self.steps - self.high_last
        if step < self.high_first or late or changes == 0:
            return HIGH
        return LOW if since_high < self.delta else HIGH


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step of one generation, as it was decided."""

    generation: int
    step: int
    timestep: float
    bits: str
    change: float | None
    """L1 change of the output in the step before; None where there is none yet."""
    since_high: float
    """The sum that was compared with delta."""


class _Told(NamedTuple):
    """A timestep that was read from a device: the tensor, kept so that its memory is no other's, and its state."""

    tensor: Tensor
    version: int

    @classmethod
    def by(cls, timestep: Tensor) -> _Told | None:
        """None where reading again is free (on the host), or a write would go unseen (under inference_mode)."""
        return None if _on_host(timestep) or timestep.is_inference() else cls(timestep, timestep._version)

    def again(self, timestep: Tensor) -> bool:
        """Whether this is the same tensor, or the same view of one, with the values that it had."""
        mine, base = self.tensor, timestep._base
        view = base is not None and base is mine._base and timestep.data_ptr() == mine.data_ptr()
        alike = (timestep.shape, timestep.stride()) == (mine.shape, mine.stride())
        return (timestep is mine or (view and alike)) and timestep._version == self.version


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


@dataclass(kw_only=True)
class _Generation:
    number: int
    key: object
    step: int = -1
    timestep: float = math.nan
    told: _Told | None = None
    direction: int = 0
    branch: int = 0
    bits: str = HIGH
    since_high: float = 0.0
    changes: int = 0
    outputs: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    change: list[Tensor] = field(default_factory=list)
    """|F_t - F_(t-1)|_1 and |F_(t-1)|_1 of each branch in the step that runs, fp32 [2], on the device."""


class BitSwitch:
    """Follows the generations of one model, or of one compiled graph, and decides each step's bits."""

    def __init__(self, rule: SwitchRule, keep_records: int = 10_000) -> None:
        self.rule = rule
        self._keep = keep_records
        self._lock = threading.Lock()
        self._live: OrderedDict[object, _Generation] = OrderedDict()
        self._count = 0
        self.records: list[StepRecord] = []
        """Steps in the order in which they began, the oldest forgotten after `keep_records`."""

    def reset(self) -> None:
        """Begin a new generation with the next call, whatever its timestep."""
        with self._lock:
            self._live.clear()

    @property
    def average_high(self) -> float:
        """Share of steps that ran at high bits, of those recorded; nan before the first."""
        records = list(self.records)
        return sum(r.bits == HIGH for r in records) / len(records) if records else math.nan

    def begin(self, timestep: Tensor, shapes: object) -> tuple[str, _Generation]:
        """(bits of a call, its generation).

        Waits for the device once, for the timestep and the last change; not at all where this timestep was just read.
        """
        key = (threading.get_ident(), _GENERATION.get(), shapes)
        with self._lock:
            known = self._live.get(key)
            if known is not None and known.told is not None and known.told.again(timestep):
                now, change = known.timestep, []
            else:
                now, *change = _to_host(timestep, known.change if known is not None else [])
            if known is None or self._is_over(known, now):
                known = self._new(key)
                change = []
            known.told = _Told.by(timestep)
            self._live.move_to_end(key)
            if now == known.timestep:
                known.branch += 1
            else:
                self._next_step(known, now, change)
            return known.bits, known

    def end(self, generation: _Generation, outputs: Sequence[Tensor]) -> None:
        """Note what a call returned: its floating-point tensors."""
        kept = tuple(value.detach().clone() for value in outputs if value.is_floating_point())
        with self._lock:
            before = generation.outputs.get(generation.branch)
            same = before is not None and [b.shape for b in before] == [k.shape for k in kept]
            if before is not None and same and kept:
                generation.change.append(_change(before, kept))
            generation.outputs[generation.branch] = kept

    def _is_over(self, known: _Generation, now: float) -> bool:
        if now == known.timestep:
            return known.branch + 1 >= BRANCHES
        turned = (now > known.timestep) - (now < known.timestep)
        return math.isnan(now) or (known.direction != 0 and turned != known.direction)

    def _new(self, key: object) -> _Generation:
        self._live[key] = fresh = _Generation(number=self._count, key=key)
        self._count += 1
        while len(self._live) > GENERATIONS:
            self._live.popitem(last=False)
        return fresh

    def _next_step(self, known: _Generation, now: float, change: list[float]) -> None:
        if known.step >= 0:
            known.direction = (now > known.timestep) - (now < known.timestep)
        known.step, known.timestep, known.branch, known.change = known.step + 1, now, 0, []
        ratio = _ratio(change) if change else None
        if ratio is not None:
            known.changes += 1
            known.since_high += ratio
        known.bits = self.rule.bits(known.step, known.since_high, known.changes)
        self.records.append(
            StepRecord(
                generation=known.number,
                step=known.step,
                timestep=now,
                bits=known.bits,
                change=ratio,
                since_high=known.since_high,
            )
        )
        del self.records[: -self._keep]
        if known.bits == HIGH:
            known.since_high = 0.0


def _change(before: Sequence[Tensor], now: Sequence[Tensor]) -> Tensor:
    """fp32 [2]: |now - before|_1 and |before|_1 over all tensors."""
    moved = sum((n.float() - b.float()).abs().sum() for b, n in zip(before, now, strict=True))
    size = sum(b.float().abs().sum() for b in before)
    return torch.stack([torch.as_tensor(moved), torch.as_tensor(size)])


def _to_host(timestep: Tensor, pending: Sequence[Tensor]) -> list[float]:
    """[the timestep, change and size of each branch ...]: one transfer, and none for a timestep that is on the host."""
    now = timestep.detach().amax().reshape(1).to(torch.float64)
    parts = [part.to(pending[0].device, torch.float64) for part in pending]
    if parts and parts[0].device != now.device and _on_host(now):
        return [*now.tolist(), *torch.cat(parts).tolist()]
    return torch.cat([now, *(part.to(now.device) for part in parts)]).tolist()


def _ratio(change: Sequence[float]) -> float:
    """Relative L1 change over all branches; 0 where nothing moved from nothing, infinite where it has no value."""
    moved, size = sum(change[0::2]), sum(change[1::2])
    if moved == 0 and size == 0:
        return 0.0
    ratio = moved / size if size > 0 else math.inf
    return ratio if math.isfinite(ratio) else math.inf


@contextmanager
def generation(name: object) -> Iterator[None]:
    """Tell one generation from others of the same shapes that are interleaved with it in one thread."""
    token = _GENERATION.set(name)
    try:
        yield
    finally:
        _GENERATION.reset(token)
