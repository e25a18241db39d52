"""What is kept of the rows that reach one linear: ranges, moments and a histogram; no activations.

Everything merges exactly, in any order (moments: up to the rounding of fp64 sums), so that samples can be counted
apart, on other machines or before an interruption.

Shapes: x_MK [M, K] rows of a linear's input; statistics of channels [K]; histogram [BINS] int64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from viditq_fx.calibration.kept import kept_zeros
from viditq_fx.cpu_kernels import reduce_rows

BINS_PER_OCTAVE = 8
LOWEST_EXPONENT, HIGHEST_EXPONENT = -24, 40
BINS = BINS_PER_OCTAVE * (HIGHEST_EXPONENT - LOWEST_EXPONENT)
"""Tokens are counted by their abs-max in bins 9% wide, from 2^-24 to 2^40; what lies outside is in the last ones."""
_CACHED_ELEMENTS = 262144


def cached_rows(x_MK: Tensor) -> tuple[Tensor, ...]:
    """x [M, K] in pieces that a CPU core's cache holds while several reductions read them; whole on other devices."""
    fits = _CACHED_ELEMENTS // x_MK.shape[1]
    return x_MK.split(max(1, fits)) if x_MK.device.type == "cpu" else (x_MK,)


@dataclass(eq=False, kw_only=True)
class Statistics:
    """Of all rows that reached one linear in one bucket of timesteps (and one branch of the batch)."""

    count: int
    """Rows."""
    low: Tensor
    """Least value of each channel, fp32 [K]."""
    high: Tensor
    """Largest value of each channel, fp32 [K]."""
    total: Tensor
    """Sum of each channel, fp64 [K]."""
    square: Tensor
    """Sum of squares of each channel, fp64 [K]."""
    token_low: Tensor
    """Least abs-max of a row, fp32 []."""
    histogram: Tensor
    """Rows by abs-max, int64 [BINS]."""

    @classmethod
    def empty(cls, depth: int, device: torch.device | str = "cpu") -> Statistics:
        """Of no rows of K = `depth` channels."""
        channels, exact = ((depth,), torch.float32), ((depth,), torch.float64)
        total, square, histogram, low, high, token_low = kept_zeros(
            [exact, exact, ((BINS,), torch.int64), channels, channels, ((), torch.float32)], device
        )
        return cls(
            count=0,
            low=low.fill_(math.inf),
            high=high.fill_(-math.inf),
            total=total,
            square=square,
            token_low=token_low.fill_(math.inf),
            histogram=histogram,
        )

    @property
    def amax(self) -> Tensor:
        """Largest magnitude of each channel, fp32 [K]."""
        return torch.maximum(self.high, -self.low)

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, fp64 [K]."""
        return self.total / max(self.count, 1)

    @property
    def variance(self) -> Tensor:
        """Variance of each channel, fp64 [K]."""
        return (self.square / max(self.count, 1) - self.mean.square()).clamp(min=0.0)

    def token_ranges(self) -> tuple[float, float, float]:
        """Least, median and largest abs-max of a row; the median to within 5%, from the histogram."""
        largest = float(self.amax.max())
        below = torch.cumsum(self.histogram, 0)
        middle = int(torch.searchsorted(below, (self.count + 1) // 2))
        median = 2.0 ** ((middle + 0.5) / BINS_PER_OCTAVE + LOWEST_EXPONENT)
        return float(self.token_low), min(max(median, float(self.token_low)), largest), largest

    def add(self, x_MK: Tensor) -> None:
        """Count the rows of x_MK [M, K], of any float dtype; at least one."""
        if x_MK.device.type == "cpu" and reduce_rows.unavailable() is None:
            ranges = self.low, self.high, self.total, self.square
            parts = (x_MK,) if x_MK.dtype == torch.float32 else cached_rows(x_MK)
            amax_M = torch.cat([reduce_rows.reduce_rows(part.to(torch.float32), *ranges) for part in parts])
        else:
            amax_M = self._reduce(x_MK)
        self._count_tokens(amax_M)
        self.count += x_MK.shape[0]

    def _reduce(self, x_MK: Tensor) -> Tensor:
        """Count the channels of rows by torch's ops -> abs-maxima of the rows, fp32 [M]."""
        parts = cached_rows(x_MK)
        (rows, depth), device = x_MK.shape, x_MK.device
        # Pieces only reduce, into one row of these each: what is made of them is made once for all.
        low_PK, high_PK, total_PK, square_PK = torch.empty(4, len(parts), depth, device=device)
        low_M, high_M = torch.empty(2, rows, device=device)
        scratch_MK = torch.empty(len(parts[0]), depth, device=device)
        first = 0
        for index, part in enumerate(parts):
            part = part.to(torch.float32)
            here = slice(first, first := first + len(part))
            torch.amin(part, 0, out=low_PK[index])
            torch.amax(part, 0, out=high_PK[index])
            torch.sum(part, 0, out=total_PK[index])
            torch.sum(torch.mul(part, part, out=scratch_MK[: len(part)]), 0, out=square_PK[index])
            torch.amin(part, 1, out=low_M[here])
            torch.amax(part, 1, out=high_M[here])
        torch.minimum(self.low, low_PK.amin(0), out=self.low)
        torch.maximum(self.high, high_PK.amax(0), out=self.high)
        self.total += total_PK.sum(0, dtype=torch.float64)
        self.square += square_PK.sum(0, dtype=torch.float64)
        return torch.maximum(high_M, low_M.neg_())

    def _count_tokens(self, amax_M: Tensor) -> None:
        """Count abs-maxima of rows; in place, as this runs for every input of every call."""
        torch.minimum(self.token_low, amax_M.amin(), out=self.token_low)
        # Eight bins for each power of two from 2^LOWEST_EXPONENT up; rows of zeros are at -inf.
        position = amax_M.log2_().sub_(LOWEST_EXPONENT).mul_(BINS_PER_OCTAVE)
        bins = position.nan_to_num_(nan=0.0).clamp_(0, BINS - 1).to(torch.int64)
        self.histogram.index_add_(0, bins, torch.ones_like(bins))

    def merge(self, other: Statistics) -> None:
        """Count what another counted."""
        device = self.low.device
        self.count += other.count
        torch.minimum(self.low, other.low.to(device), out=self.low)
        torch.maximum(self.high, other.high.to(device), out=self.high)
        self.total += other.total.to(device)
        self.square += other.square.to(device)
        torch.minimum(self.token_low, other.token_low.to(device), out=self.token_low)
        self.histogram += other.histogram.to(device)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor on the CPU) of all of it."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            # A copy: each would be pickled with the whole block that it is a part of.
            yield entry.name, value.cpu().clone() if isinstance(value, Tensor) else torch.tensor(value)

    @classmethod
    def of_tensors(cls, found: dict[str, Tensor], depth: int) -> Statistics:
        """What `tensors` gave of K = `depth` channels. Raises KeyError, ValueError for what it would not give."""
        values = {entry.name: found[entry.name] for entry in fields(cls)}
        shapes = dict.fromkeys(("low", "high", "total", "square"), (depth,)) | {"histogram": (BINS,)}
        for name, value in values.items():
            if tuple(value.shape) != shapes.get(name, ()):
                raise ValueError(f"{name} has shape {tuple(value.shape)}, not {shapes.get(name, ())}")
        mine = cls.empty(depth)
        mine.count = int(values.pop("count"))
        for name, value in values.items():
            getattr(mine, name).copy_(value)  # in place: other parts are counted into it
        return mine


def merged(
    parts: Iterator[Statistics] | list[Statistics], depth: int, device: torch.device | str = "cpu"
) -> Statistics:
    """All of `parts` together, on one device; of no rows where there are none."""
    whole = Statistics.empty(depth, device)
    for part in parts:
        whole.merge(part)
    return whole
