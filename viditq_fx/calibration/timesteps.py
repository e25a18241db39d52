"""Which timestep a call of the model is at, and the buckets that calibration sorts calls into.

Scales and directions differ by model (0..1000 or 0..1, rising or falling), so nothing is assumed of them: a bucket
is a closed range of values that were seen, in the units of the model's own argument.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from viditq_fx.errors import RecipeError
from viditq_fx.timestep import timestep_name, timestep_value


@dataclass(frozen=True, kw_only=True)
class TimestepArgument:
    """Reads the timestep of one call from the arguments of a model's forward."""

    name: str | None
    """None: the model has none."""
    model: nn.Module

    @classmethod
    def of(cls, model: nn.Module, name: str | None = None) -> TimestepArgument:
        """Find it in the signature of `model.forward`. Raises RecipeError for a `name` that is not there."""
        return cls(name=timestep_name(model, name), model=model)

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float | None:
        """The largest timestep of a call; None where it has none. Raises RecipeError for what is no number.

        It may be a number, or a tensor of any shape and dtype: per sample, per frame or per token.
        """
        if self.name is None:
            return None
        value = timestep_value(self.model, self.name, args, kwargs)
        if value is None:
            return None
        try:
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
            largest = float(tensor.detach().max().to(torch.float32))  # as the compiled model compares it
        except (TypeError, ValueError, RuntimeError) as error:
            raise RecipeError(
                f"calibrate: argument {self.name!r} holds no timestep ({type(value).__name__}: {error}); "
                "name the one that does: timestep='...'"
            ) from error
        if not math.isfinite(largest):
            raise RecipeError(f"calibrate: argument {self.name!r} is {largest}; a timestep is finite")
        return largest


@dataclass(eq=False)
class Bucket:
    """Calls at timesteps `low` to `high`, both seen."""

    low: float
    high: float


@dataclass(eq=False)
class Buckets:
    """Buckets in rising order, at most `limit`: one for each distinct timestep while they fit.

    One more value than fits merges the two neighbours that span least; so do the ranks of a distributed run.
    """

    limit: int
    items: list[Bucket] = field(default_factory=list)
    timed: bool | None = None
    """Whether calls have timesteps; None before the first. Without, there is one bucket."""

    def find(self, value: float | None) -> tuple[Bucket, tuple[Bucket, Bucket] | None]:
        """(the bucket of a call, (bucket that grew, bucket that it took in) or None), made when it is new.

        Raises RecipeError where some calls have a timestep and others have none.
        """
        timed = value is not None
        if self.timed not in (None, timed):
            raise RecipeError(
                "calibrate: some calls of the model have a timestep and others have none; calibrate with those "
                "that have one, or name the argument that all have: timestep='...'"
            )
        self.timed, value = timed, 0.0 if value is None else value
        for bucket in self.items:
            if bucket.low <= value <= bucket.high:
                return bucket, None
        made = Bucket(value, value)
        self.items.append(made)
        merged = self.settle()
        if merged and merged[0][1] is made:
            made = merged[0][0]
        return made, merged[0] if merged else None

    def settle(self) -> list[tuple[Bucket, Bucket]]:
        """Merge what overlaps, then what spans least until the limit holds; (grew, taken in), in order."""
        merged: list[tuple[Bucket, Bucket]] = []
        self.items.sort(key=lambda b: (b.low, b.high))
        index = 0
        while index + 1 < len(self.items):
            if self.items[index + 1].low <= self.items[index].high:
                merged.append(self._merge(index))
            else:
                index += 1
        while len(self.items) > self.limit:
            spans = [b.high - a.low for a, b in pairwise(self.items)]
            merged.append(self._merge(spans.index(min(spans))))
        return merged

    def _merge(self, index: int) -> tuple[Bucket, Bucket]:
        grew, taken = self.items[index], self.items.pop(index + 1)
        grew.high = max(grew.high, taken.high)
        return grew, taken

    def edges(self) -> tuple[float, ...]:
        """The fp32 values between neighbours: bucket i holds what has i edges at or below it."""
        edges = []
        for a, b in pairwise(self.items):
            ends = torch.tensor([a.high, b.low], dtype=torch.float32)
            middle = float(ends.mean())
            edges.append(middle if float(ends[0]) < middle else float(ends[1]))
        return tuple(edges)


def range_of(edges: Sequence[float], value: float | None) -> int:
    """Index of the range that a timestep belongs to; 0 without one."""
    if value is None:
        return 0
    return sum(edge <= value for edge in edges)
