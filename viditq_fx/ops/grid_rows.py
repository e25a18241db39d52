"""An asymmetric integer grid for each row of a matrix: the arithmetic that every way of choosing grids shares.

    w ~= s * (q - z)        q in [-2^(bits-1), 2^(bits-1) - 1], z an integer, both as stored (DVD-Quant Eqs. 1, 2)
    s = (high - low) / (2^bits - 1)        z = -2^(bits-1) - round(low / s)        q = clamp(round(w / s + z))

The paper's q and z are these plus 2^(bits-1). z is not clamped to the range of q, which a row that does not cross
zero would need two thirds of its levels for. Floors of s bound it instead, |low| / s and |high| / s <= `largest_zero`,
so that z fits in what it is stored as whatever the values: a compiled graph has one dtype for the weights of many.

Shapes: w_RL [R, L] are rows with one grid each, fp32 or fp64; s_R, z_R and all other statistics [R] are fp64, so that
the square of no finite fp32 number overflows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from viditq_fx.ops.quantize import EPS
from viditq_fx.scheme import ZERO_BITS

FARTHEST = 2.0**16
"""A step is at least this part of its row's largest magnitude: fp32 then tells 256 places apart inside it, and q - z is
exact."""


def zero_dtype(bits: int) -> torch.dtype:
    """What zero points of weights of `bits` are stored as: a byte up to 4 bits, where it counts; fp32 beside more."""
    return torch.int8 if bits <= ZERO_BITS else torch.float32


def largest_zero(bits: int) -> float:
    """Most steps between zero and either end of a grid.

    112 where z has a byte: |z| <= 112 + 2^(bits-1). Only a row whose values all lie within (2^bits - 1) / 112 of the
    largest (4 bits: 13%) has then a coarser step than it could have, 1/112 of that value, and errors of 1/224 of it,
    where those of a 4-bit row that crosses zero are up to 1/15.
    """
    return 112.0 if zero_dtype(bits) == torch.int8 else FARTHEST


class Grid(NamedTuple):
    """One grid for each of R rows: step s_R and zero point z_R, both fp64 [R]."""

    scale_R: Tensor
    zero_R: Tensor


class Span(NamedTuple):
    """What the values of R rows span: fp64 [R] each."""

    low_R: Tensor
    high_R: Tensor
    floor_R: Tensor
    """Smallest step that a grid of this row may have."""


def levels(bits: int) -> tuple[int, int]:
    """Smallest and largest stored integer: (-8, 7) for 4 bits."""
    half = 1 << (bits - 1)
    return -half, half - 1


def span_of_rows(w_RL: Tensor, bits: int) -> Span:
    """Least and greatest value of each row; NaN where a row holds NaN."""
    low_R, high_R = (bound.double() for bound in torch.aminmax(w_RL, dim=-1))
    largest_R = torch.maximum(low_R.abs(), high_R.abs())
    return Span(low_R, high_R, (largest_R / FARTHEST).clamp(min=EPS / (2**bits - 1)))


def grid_between(low_R: Tensor, high_R: Tensor, floor_R: Tensor, bits: int) -> Grid:
    """The grid whose first and last level are `low` and `high` to within half a step; Eqs. 1, 8."""
    # A power of two of steps to a row's one value: it is then exact.
    farthest_R = torch.where(
        low_R == high_R, 2.0 ** math.floor(math.log2(largest_zero(bits))), largest_zero(bits)
    )
    reach_R = torch.maximum(low_R.abs(), high_R.abs()) / farthest_R
    scale_R = torch.maximum((high_R - low_R) / (2**bits - 1), torch.maximum(reach_R, floor_R))
    return Grid(scale_R, levels(bits)[0] - torch.round(low_R / scale_R))


def snap_rows(w_RL: Tensor, grid: Grid, bits: int, exact_RL: Tensor, q_RL: Tensor) -> None:
    """Write w / s + z to `exact` and the integers nearest to it that `bits` hold to `q`, in w's dtype; Eq. 6."""
    inverse_R1 = grid.scale_R.reciprocal().to(w_RL.dtype).unsqueeze(-1)
    torch.mul(w_RL, inverse_R1, out=exact_RL).add_(grid.zero_R.to(w_RL.dtype).unsqueeze(-1))
    torch.round(exact_RL, out=q_RL).clamp_(*levels(bits))
