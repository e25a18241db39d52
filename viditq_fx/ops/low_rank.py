"""A low-rank branch in full precision beside 4-bit weights, as SVDQuant (arXiv 2411.05007) has it.

    W' = (W / m) R = U S V^T,   L = U_r S_r^(1/2) [N, r],   D' = S_r^(1/2) V_r^T [r, K],   the r largest singular values
    Y = X' Q(W' - L D')^T + (X D^T) L^T,   X' = (X * m) R,   D = (D' R) * m, so that X D^T = X' D'^T

m and R are balance and rotation of ops/rotate.py; with R = 1 and m = 1 / s this is SVDQuant, its smoothing folded into
D. L and D are stored in bf16, and what is quantized is the rest after their rounding.

Shapes: x [..., K]; w [N, K]; down [r, K], up [N, r] bf16; y fp32 [..., N]; result [..., N] in `out_dtype`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from viditq_fx.ops.base import QuantOp, Sample, register
from viditq_fx.ops.grid import quantize_weight_grid
from viditq_fx.ops.grid_rows import zero_dtype
from viditq_fx.ops.linear import without_autocast
from viditq_fx.ops.quantize import quantize_per_channel, quantize_per_group
from viditq_fx.ops.rotate import transform_weight

STORED = torch.bfloat16
_OVERSAMPLED, _POWER_STEPS = 8, 4
"""Of the randomized SVD: directions beyond r, and passes that sharpen them."""


def split_low_rank(
    w: Tensor, multiplier: Tensor | None, rotation: int, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """w [N, K] -> (what is left of W' to quantize, fp32 [N, K]; down bf16 [r, K]; up bf16 [N, r]); the same every time.

    Raises ValueError for a rank below 1 or above min(N, K).
    """
    if not 1 <= rank <= min(w.shape):
        raise ValueError(
            f"low rank: a branch of rank {rank} beside a weight {tuple(w.shape)}; it is 1 to min(N, K)"
        )
    moved = transform_weight(w, multiplier, rotation)
    devices = [w.device] if w.device.type == "cuda" else []
    # Not finite: no decomposition, but scales that callers refuse, as for any other scheme.
    if not bool(torch.isfinite(moved).all()):
        empty = moved.new_zeros(rank, moved.shape[1]), moved.new_zeros(moved.shape[0], rank)
        return moved, empty[0].to(STORED), empty[1].to(STORED)
    with torch.random.fork_rng(devices), without_autocast(w):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(moved, min(rank + _OVERSAMPLED, min(moved.shape)), niter=_POWER_STEPS)
    root = s[:rank].sqrt()
    up, down = (u[:, :rank] * root).to(STORED), (v[:, :rank] * root).t()
    raw = transform_weight(down.contiguous(), None, rotation)  # R is its own inverse
    if multiplier is not None:
        raw = raw * multiplier
    raw = raw.to(STORED)
    kept = transform_weight(raw.float(), multiplier, rotation)
    with without_autocast(w):
        rest = moved - up.float() @ kept
    return rest, raw.contiguous(), up.contiguous()


def quantize_weight_low_rank(
    w: Tensor, multiplier: Tensor | None, rotation: int, rank: int, bits: int, group: int, grid: str
) -> list[Tensor]:
    """w [N, K] -> [q int8 [N, K], scales, zero points where `grid` is not "", down, up]; see the module's formula.

    Raises ValueError as `split_low_rank`, `transform_weight` and the quantizers of weights do.
    """
    rest, down, up = split_low_rank(w, multiplier, rotation, rank)
    if grid:
        stored = quantize_weight_grid(rest, bits, group, grid)
    else:
        stored = quantize_per_group(rest, bits, group) if group else quantize_per_channel(rest, bits)
    return [*stored, down, up]


def fake_low_rank(
    w: Tensor, multiplier: Tensor | None, rotation: int, rank: int, bits: int, group: int, grid: str
) -> list[Tensor]:
    """What quantize_weight_low_rank returns, without values."""
    width, depth = w.shape
    shape = (-(-depth // group), width) if group else (width,)
    dtypes = (torch.float32, zero_dtype(bits))[: 2 if grid else 1]
    vectors = [w.new_empty(shape, dtype=dtype) for dtype in dtypes]
    branch = [w.new_empty((rank, depth), dtype=STORED), w.new_empty((width, rank), dtype=STORED)]
    return [w.new_empty((width, depth), dtype=torch.int8), *vectors, *branch]


def add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor, out_dtype: torch.dtype) -> Tensor:
    """y fp32 [..., N] + (x down^T) up^T, in x's precision -> [..., N] in `out_dtype`."""
    with without_autocast(x):
        branch = (x @ down.to(x.dtype).t()) @ up.to(x.dtype).t()
    return (y + branch.to(torch.float32)).to(out_dtype)


def _weight_samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    w = torch.randn(24, 64, generator=gen, device=device)
    multiplier = torch.rand(64, generator=gen, device=device) + 0.5
    yield Sample(label="smoothed", args=(w, multiplier, 1, 4, 4, 0, ""))
    yield Sample(label="rotated-bgr", args=(w, None, 16, 2, 4, 0, "bgr"))
    yield Sample(label="groups", args=(w, multiplier, 4, 2, 4, 32, "minmax"))


def _add_samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (torch.randn(2, 5, n, generator=gen, device=device) for n in (40, 24))
        down, up = (torch.randn(*s, generator=gen, device=device).to(STORED) for s in ((4, 40), (24, 4)))
        yield Sample(label=str(dtype), args=(y, x.to(dtype), down, up, dtype))


QUANTIZE_WEIGHT_LOW_RANK = register(
    QuantOp(
        name="quantize_weight_low_rank",
        schema=(
            "(Tensor w, Tensor? multiplier, int rotation, int rank, int bits, int group, str grid) -> Tensor[]"
        ),
        reference=quantize_weight_low_rank,
        fake=fake_low_rank,
        samples=_weight_samples,
    )
)
ADD_LOW_RANK = register(
    QuantOp(
        name="add_low_rank",
        schema="(Tensor y, Tensor x, Tensor down, Tensor up, ScalarType out_dtype) -> Tensor",
        reference=add_low_rank,
        fake=None,
        samples=_add_samples,
    )
)
