"""BGR, bounded-init grid refinement: weight grids of small squared error, found without data (DVD-Quant section 3.2).

    minimize over s, z of each row   E = |w - s * (q - z)|^2,   q = clamp(round(w / s + z))

    for i in 0 .. < n/2:                                      bounds: the range, less i / n of it on either side
        s, z = grid between min w + i/n * range and max w - i/n * range                                    (Eqs. 7, 8)
        repeat:  s = <q - z, w> / <q - z, q - z>              least squares for the step                   (Eq. 4)
                 z = round(mean q - mean w / s)               and for the zero point                       (Eq. 5)
                 q, E anew                                                                                 (Eq. 6)
        until E falls by no more than epsilon * E, or `steps` times
    then, `neighbours` times, the same from the best s with z + 1 and with z - 1

The last line is ours: rounding holds z where it is once s changes little, so Eq. 5 alone seldom leaves a z. Each row
keeps the best of all that it saw, min-max included, so none is worse than min-max. Where this departs from Algorithm 1
as printed, and why: docs/methods.md.

Shapes: w_RL [R, L] rows with one grid each; s_R, z_R and sums [R] fp64. R falls as rows converge and drop out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from viditq_fx.ops.grid_rows import Grid, Span, grid_between, largest_zero, snap_rows, span_of_rows

StopRule = Literal["corrected", "printed"]


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """How BGR searches. The paper gives neither n nor epsilon: these are ours (see docs/methods.md)."""

    bounds: int = 10
    """n: ranges tried are the whole one less 0, 1, ... < n/2 n-ths on either side. 1 refines from min-max alone."""
    steps: int = 20
    """Most alternating steps from each bound. 0 searches bounds alone."""
    epsilon: float = 1e-4
    """Least fall of a row's squared error, relative, that earns it another step."""
    neighbours: int = 2
    """Times that the zero points beside the best are tried. 0 leaves it at what the paper does."""
    stop: StopRule = "corrected"
    """"printed", as in Algorithm 1, goes on only while the error rises: it stops after one step that helped."""

    def __post_init__(self) -> None:
        if self.bounds < 1 or min(self.steps, self.neighbours) < 0 or not 0 <= self.epsilon < 1:
            raise ValueError(
                f"Refinement: bounds={self.bounds}, steps={self.steps}, epsilon={self.epsilon}, neighbours="
                f"{self.neighbours}; bounds is at least 1, steps and neighbours at least 0, epsilon in [0, 1)"
            )
        if self.stop not in get_args(StopRule):
            raise ValueError(f"Refinement: stop={self.stop!r}; choose one of {get_args(StopRule)}")


class _Sums(NamedTuple):
    """Of one grid over its rows, d = w / s + z - q being the error in steps: fp64 [R] each."""

    error_R: Tensor
    q_R: Tensor
    qq_R: Tensor
    qd_R: Tensor


class _Rows:
    """The rows of one matrix, buffers of its size, and what of them does not change."""

    def __init__(self, w_RL: Tensor, bits: int) -> None:
        self.w_RL, self.bits, self.depth = w_RL, bits, w_RL.shape[-1]
        self.span: Span = span_of_rows(w_RL, bits)
        self.sum_R = w_RL.sum(dim=-1, dtype=torch.float64)
        mean_R = self.sum_R.abs() / self.depth
        self.floor_R = torch.maximum(self.span.floor_R, mean_R / largest_zero(bits))
        """Keeps the zero point of Eq. 5 where it can be stored."""
        self.buffers = tuple(torch.empty_like(w_RL) for _ in range(3))

    def sums(self, w_RL: Tensor, grid: Grid) -> _Sums:
        """One pass over rows that are all or some of the matrix's."""
        d_RL, q_RL, product_RL = (buffer[: w_RL.shape[0]] for buffer in self.buffers)
        snap_rows(w_RL, grid, self.bits, d_RL, q_RL)
        d_RL.sub_(q_RL)
        qq_R = torch.mul(q_RL, q_RL, out=product_RL).sum(dim=-1).double()
        qd_R = torch.mul(q_RL, d_RL, out=product_RL).sum(dim=-1).double()
        dd_R = d_RL.mul_(d_RL).sum(dim=-1).double()
        return _Sums(dd_R * grid.scale_R.square(), q_RL.sum(dim=-1).double(), qq_R, qd_R)


def refine_rows(w_RL: Tensor, bits: int, config: Refinement) -> Grid:
    """w [R, L] fp32 or fp64 -> the best grid found for each row; min-max where none was better.

    A row with NaN or infinity keeps its min-max grid, which is not finite.
    """
    rows = _Rows(w_RL, bits)
    low_R, high_R, floor_R = rows.span
    start = grid_between(low_R, high_R, floor_R, bits)
    best = Grid(start.scale_R.clone(), start.zero_R.clone())
    least_R = torch.full_like(low_R, torch.inf)
    for i in range((config.bounds + 1) // 2):
        inset_R = (high_R - low_R) * (i / config.bounds)
        grid = grid_between(low_R + inset_R, high_R - inset_R, floor_R, bits)
        _descend(rows, grid, config, best, least_R)
    left_R = None
    for _ in range(config.neighbours):
        before_R = least_R.clone()
        for aside in (1.0, -1.0):
            grid = Grid(best.scale_R.clone(), best.zero_R + aside)
            if left_R is not None:
                grid = Grid(*(each[left_R] for each in grid))
            _descend(rows, grid, config, best, least_R, left_R)
        left_R = torch.nonzero(least_R < before_R).squeeze(
            -1
        )  # another round shows nothing new to the others
    return _never_worse(rows, best, start)


def _descend(
    rows: _Rows, grid: Grid, config: Refinement, best: Grid, least_R: Tensor, left_R: Tensor | None = None
) -> None:
    """Alternating least squares from `grid` of all rows, or of `left`; writes what is better than `least` to `best`."""
    w_RL = rows.w_RL if left_R is None else rows.w_RL[left_R]
    sums = rows.sums(w_RL, grid)
    _keep(best, least_R, grid, sums.error_R, left_R)
    for _ in range(config.steps):
        grid = _least_squares(rows, grid, sums, left_R)
        before_R, sums = sums.error_R, rows.sums(w_RL, grid)
        _keep(best, least_R, grid, sums.error_R, left_R)
        fall_R = before_R - sums.error_R
        goes_on_R = (fall_R if config.stop == "corrected" else -fall_R) > config.epsilon * before_R
        going = torch.nonzero(goes_on_R).squeeze(-1)
        if going.numel() == 0:
            return
        if going.numel() < goes_on_R.numel():
            left_R = going if left_R is None else left_R[going]
            w_RL = rows.w_RL[left_R]
            grid = Grid(*(each[going] for each in grid))
            sums = _Sums(*(each[going] for each in sums))


def _least_squares(rows: _Rows, grid: Grid, sums: _Sums, left_R: Tensor | None) -> Grid:
    """The step that fits q best, then the zero point that fits that step; Eqs. 4, 5.

    From the error in steps d: w = s * (q - z + d), so <q - z, w> / <q - z, q - z> is s plus a correction, which fp32
    sums give without cancellation.
    """
    sum_R, floor_R = (each if left_R is None else each[left_R] for each in (rows.sum_R, rows.floor_R))
    scale_R, zero_R = grid
    square_R = sums.qq_R - 2 * zero_R * sums.q_R + rows.depth * zero_R.square()
    d_R = sum_R / scale_R + rows.depth * zero_R - sums.q_R
    share_R = (sums.qd_R - zero_R * d_R) / square_R
    scale_R = torch.where(square_R > 0, scale_R * (1 + share_R), scale_R).maximum(floor_R)
    return Grid(scale_R, torch.round((sums.q_R - sum_R / scale_R) / rows.depth))


def _keep(best: Grid, least_R: Tensor, grid: Grid, error_R: Tensor, left_R: Tensor | None) -> None:
    # Not by rounding alone: with a level to spare, q and z one higher are the same grid.
    better_R = error_R < (least_R if left_R is None else least_R[left_R]) * (1 - 1e-6)
    rows = torch.nonzero(better_R).squeeze(-1)
    into = rows if left_R is None else left_R[rows]
    least_R[into] = error_R[rows]
    best.scale_R[into] = grid.scale_R[rows]
    best.zero_R[into] = grid.zero_R[rows]


def _never_worse(rows: _Rows, best: Grid, start: Grid) -> Grid:
    """`best`, or `start` where the error of what is dequantized, in fp64, is no less: fp32 sums cannot promise it."""
    better_R = _stored_error(rows, best) < _stored_error(rows, start)
    return Grid(*(torch.where(better_R, b, s) for b, s in zip(best, start, strict=True)))


def _stored_error(rows: _Rows, grid: Grid) -> Tensor:
    stored = Grid(*(each.float().double() for each in grid))
    exact_RL, q_RL, _ = rows.buffers
    snap_rows(rows.w_RL, stored, rows.bits, exact_RL, q_RL)
    near_RL = (q_RL.float() - stored.zero_R.float().unsqueeze(-1)) * stored.scale_R.float().unsqueeze(-1)
    error_RL = rows.w_RL.double() - near_RL
    return torch.linalg.vecdot(error_RL, error_RL)
