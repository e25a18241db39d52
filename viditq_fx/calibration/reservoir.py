"""A few rows of a linear's input, each row that ever came as likely as any other; the rest is forgotten.

Each row has a random key in [0, 1), and the rows with the smallest keys are kept. Keys come from the seed, the input,
the sample and the call, not from what came before: samples may be drawn apart, and merged in any order.

Shapes: x_MK [M, K]; rows_RK [R, K] in the dtype that they came in, R at most `size`.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from viditq_fx.calibration.kept import kept_zeros


@dataclass(eq=False, kw_only=True)
class Reservoir:
    """At most `size` rows, sorted by key, with the timestep that each came at (NaN: none)."""

    size: int
    keys: list[float] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    _held: Tensor | None = None
    """[size, K]: rows in the order that they came in."""
    _places: list[int] = field(default_factory=list)
    """Of each key its row in `_held`."""

    @classmethod
    def of_rows(cls, size: int, keys: list[float], timesteps: list[float], rows_RK: Tensor) -> Reservoir:
        """What `keys`, `timesteps` and `rows_RK` of another gave."""
        made = cls(size=size)
        made._take(keys, timesteps, rows_RK)
        return made

    @property
    def rows_RK(self) -> Tensor | None:
        """A copy of the rows, by key; None before the first."""
        if self._held is None or not self.keys:
            return None
        return self._held[torch.tensor(self._places, device=self._held.device)]

    def reserve(self, depth: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make room for rows of K = `depth`, if there is none yet."""
        if self._held is None:
            (self._held,) = kept_zeros([((self.size, depth), dtype)], device)

    def add(self, x_MK: Tensor, timestep: float | None, *identity: object) -> None:
        """Offer the rows of one call; `identity` tells this call from all others."""
        limit = self.keys[-1] if len(self.keys) == self.size else 1.0
        picked = _smallest(x_MK.shape[0], self.size, limit, identity)
        if picked:
            keys, indices = zip(*picked, strict=True)
            time = math.nan if timestep is None else timestep
            rows = x_MK[torch.tensor(indices, device=x_MK.device)]
            self._take(list(keys), [time] * len(keys), rows)

    def merge(self, other: Reservoir) -> None:
        """Keep the smallest keys of both."""
        rows = other.rows_RK
        if rows is not None:
            self._take(other.keys, other.timesteps, rows)

    def _take(self, keys: list[float], timesteps: list[float], rows: Tensor) -> None:
        """Put new rows where those stood that they drive out."""
        self.reserve(rows.shape[1], rows.dtype, rows.device)
        held = self._held
        assert held is not None
        old = len(self.keys)
        keys, timesteps = self.keys + keys, self.timesteps + timesteps
        order = sorted(range(len(keys)), key=keys.__getitem__)[: self.size]
        stay = {self._places[i] for i in order if i < old}
        free = (place for place in range(self.size) if place not in stay)
        come = [i - old for i in order if i >= old]
        places = dict(zip(come, free, strict=False))
        if come:
            device = rows.device
            target = torch.tensor(list(places.values()), device=held.device)
            chosen = rows[torch.tensor(come, device=device)]
            held[target] = chosen.to(held.device, held.dtype)
        self._places = [self._places[i] if i < old else places[i - old] for i in order]
        self.keys, self.timesteps = [keys[i] for i in order], [timesteps[i] for i in order]


def _smallest(count: int, size: int, limit: float, identity: tuple[object, ...]) -> list[tuple[float, int]]:
    """Of `count` rows with random keys those with the `size` smallest below `limit`: (key, row), by key.

    Only these are drawn: the next smallest of n uniform numbers above u is u + (1 - u) * (1 - v^(1/n)).
    """
    if size == 0:
        return []
    draw = random.Random(hashlib.blake2b(repr(identity).encode(), digest_size=16).digest())
    picked: list[tuple[float, int]] = []
    taken: set[int] = set()
    key = 0.0
    for left in range(count, max(count - size, 0), -1):
        key += (1.0 - key) * (1.0 - draw.random() ** (1.0 / left))
        if key >= limit:
            break
        row = draw.randrange(count)
        while row in taken:
            row = draw.randrange(count)
        taken.add(row)
        picked.append((key, row))
    return picked
