"""Weights on asymmetric integer grids: w ~= s * (q - z), by min-max or refined by BGR.

The formulas are those of `grid_rows` (min-max; DVD-Quant Eqs. 1, 2) and `bgr` (DVD-Quant section 3.2). Stored are
q in [-2^(bits-1), 2^(bits-1) - 1] as int8, s > 0 as fp32 and the integer z as int8 up to 4 bits, else as fp32:
the paper's q and z less 2^(bits-1).

A row (with groups: a group of a row) that holds NaN or infinity has a scale that is NaN or inf, q = 0 and z = 0, so
what is dequantized of it is NaN and no other row is touched; callers refuse such scales. A row of one value is
represented exactly, one of zeros with s = EPS / (2^bits - 1).

Shapes: w_NK [N, K] of any float dtype, q_NK int8 [N, K]; scale and zero [N], or with groups [G, N], G = ceil(K /
group): the last may be short. A matrix is worked on a few rows at a time: rows of grids are w_RL [R, L].
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.ops.base import QuantOp, Sample, register
from viditq_fx.ops.bgr import Refinement, refine_rows
from viditq_fx.ops.grid_rows import Grid, grid_between, snap_rows, span_of_rows, zero_dtype

GRIDS = ("minmax", "bgr")
"""How a grid is chosen: by the row's range alone, or refined from it with `Refinement()`."""
CPU_CHUNK = 1 << 19
"""Elements that are refined at a time on a CPU: the four buffers of that size stay in its third-level cache."""
DEVICE_CHUNK = 1 << 24
"""The same on any other device, where a kernel has to have enough to do."""


def _check(w_NK: Tensor, bits: int, group: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"quantize_weight_grid: bits={bits}; int8 storage holds 2 to 8 bits")
    if w_NK.dim() != 2 or w_NK.shape[1] == 0 or not w_NK.is_floating_point():
        raise ValueError(
            f"quantize_weight_grid: a weight is floating point [N, K] with K at least 1; got {w_NK.dtype} "
            f"{tuple(w_NK.shape)}"
        )
    if group < 0:
        raise ValueError(
            f"quantize_weight_grid: group={group}; a group is at least 1, and 0 is one for a whole row"
        )


def fit_weight_grid(
    w_NK: Tensor, bits: int, group: int, refinement: Refinement | None
) -> tuple[Tensor, Tensor, Tensor]:
    """w [N, K] -> (q int8 [N, K], scale fp32 [N] or [G, N], zero likewise); `refinement` None is min-max.

    Zero points are integers, of `zero_dtype(bits)`.

    Memory beyond the result goes with CPU_CHUNK (or DEVICE_CHUNK, or one row if that is longer), not with w.

    Raises ValueError for bits outside 2..8, a negative group, or a weight that is not floating point [N, K >= 1].
    """
    _check(w_NK, bits, group)
    w_NK = w_NK.detach()
    width, depth = w_NK.shape
    length = group or depth
    q_NK = w_NK.new_empty((width, depth), dtype=torch.int8)
    scale_GN = w_NK.new_empty((-(-depth // length), width), dtype=torch.float32)
    zero_GN = torch.empty_like(scale_GN, dtype=zero_dtype(bits))
    whole = depth // length
    # Not padded to whole groups: a zero that is not there would be in the range of the last.
    edges = [0, whole * length, depth]
    blocks = [(i // length, slice(i, j)) for i, j in pairwise(edges) if i < j]
    rows = max(1, (CPU_CHUNK if w_NK.device.type == "cpu" else DEVICE_CHUNK) // depth)
    for first in range(0, width, rows):
        some = slice(first, first + rows)
        for group_before, columns in blocks:
            part_NK = w_NK[some, columns]
            w_RL = part_NK.reshape(-1, min(length, part_NK.shape[1]))
            q_RL, grid = _fit_rows(w_RL, bits, refinement)
            q_NK[some, columns] = q_RL.reshape(part_NK.shape).to(torch.int8)
            for out_GN, each_R in zip((scale_GN, zero_GN), grid, strict=True):
                each_GN = each_R.reshape(part_NK.shape[0], -1).t()
                out_GN[group_before : group_before + each_GN.shape[0], some] = each_GN
    return (q_NK, scale_GN, zero_GN) if group else (q_NK, scale_GN.reshape(-1), zero_GN.reshape(-1))


def _fit_rows(w_RL: Tensor, bits: int, refinement: Refinement | None) -> tuple[Tensor, Grid]:
    """(q in the dtype that is computed in, the grid as stored) of rows of any float dtype."""
    w_RL = w_RL.to(torch.promote_types(w_RL.dtype, torch.float32)).contiguous()
    if refinement is None:
        grid = grid_between(*span_of_rows(w_RL, bits), bits)
    else:
        grid = refine_rows(w_RL, bits, refinement)
    scale_R = grid.scale_R.float()
    bad_R = ~torch.isfinite(scale_R)
    grid = Grid(scale_R.double(), grid.zero_R.masked_fill(bad_R, 0))
    q_RL = torch.empty_like(w_RL)
    snap_rows(w_RL, grid, bits, torch.empty_like(w_RL), q_RL)
    return q_RL.masked_fill_(bad_R.unsqueeze(-1), 0), grid


def quantize_weight_grid(w_NK: Tensor, bits: int, group: int, grid: str) -> tuple[Tensor, Tensor, Tensor]:
    """w [N, K] -> (q int8 [N, K], scale fp32 [N] or [G, N], zero likewise), w ~= scale * (q - zero).

    Zero points are integers, of `zero_dtype(bits)`: int8 up to 4 bits, else fp32.

    `grid` is "minmax" (DVD-Quant section 3.1) or "bgr" (section 3.2, with `Refinement()`'s settings); `group` input
    channels share a grid, all of a row with 0.

    Raises ValueError for another grid, and as `fit_weight_grid`.
    """
    if grid not in GRIDS:
        raise ValueError(f"quantize_weight_grid: grid={grid!r}; choose one of {GRIDS}")
    return fit_weight_grid(w_NK, bits, group, Refinement() if grid == "bgr" else None)


def dequantize_weight_grid(
    q_NK: Tensor, scale: Tensor, zero: Tensor, group: int, dtype: torch.dtype
) -> Tensor:
    """(q int8 [N, K], scale fp32 and zero [N], or [G, N] with a group) -> scale * (q - zero) in `dtype`, [N, K].

    Raises ValueError for scales or zeros of other shapes.
    """
    width, depth = q_NK.shape
    expected = (-(-depth // group), width) if group else (width,)
    if scale.shape != expected or zero.shape != expected:
        raise ValueError(
            f"dequantize_weight_grid: scales and zeros of {tuple(q_NK.shape)} in groups of {group} are {expected}; got "
            f"{tuple(scale.shape)} and {tuple(zero.shape)}"
        )
    zero = zero.to(torch.float32)
    if not group:
        return ((q_NK.to(torch.float32) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).to(dtype)
    q_NGK = F.pad(q_NK.to(torch.float32), (0, -depth % group)).reshape(width, -1, group)
    w_NGK = (q_NGK - zero.t().unsqueeze(-1)) * scale.t().unsqueeze(-1)
    return w_NGK.reshape(width, -1)[:, :depth].to(dtype)


def fake_weight_grid(w_NK: Tensor, bits: int, group: int, grid: str) -> tuple[Tensor, Tensor, Tensor]:
    """What quantize_weight_grid returns, without values."""
    width, depth = w_NK.shape
    shape = (-(-depth // group), width) if group else (width,)
    scale, zero = (w_NK.new_empty(shape, dtype=dtype) for dtype in (torch.float32, zero_dtype(bits)))
    return w_NK.new_empty((width, depth), dtype=torch.int8), scale, zero


def _samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    for grid in GRIDS:
        for label, depth, group, bits in (("rows", 40, 0, 4), ("even", 64, 32, 4), ("short", 75, 32, 8)):
            w = torch.randn(6, depth, generator=gen, device=device) + 0.5
            yield Sample(label=f"{grid}-{label}", args=(w, bits, group, grid))
        half = torch.randn(24, 5, generator=gen, device=device).to(torch.bfloat16).t()
        yield Sample(label=f"{grid}-bf16-transposed", args=(half, 4, 0, grid))


def _dequantize_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _samples(device):
        if sample.args[-1] == "minmax":
            yield Sample(
                label=sample.label,
                args=(*quantize_weight_grid(*sample.args), sample.args[2], torch.bfloat16),
            )


QUANTIZE_WEIGHT_GRID = register(
    QuantOp(
        name="quantize_weight_grid",
        schema="(Tensor w, int bits, int group, str grid) -> (Tensor, Tensor, Tensor)",
        reference=quantize_weight_grid,
        fake=fake_weight_grid,
        samples=_samples,
    )
)
DEQUANTIZE_WEIGHT_GRID = register(
    QuantOp(
        name="dequantize_weight_grid",
        schema="(Tensor q, Tensor scale, Tensor zero, int group, ScalarType dtype) -> Tensor",
        reference=dequantize_weight_grid,
        fake=None,
        samples=_dequantize_samples,
    )
)
