"""What a weight's zero points add to an integer linear, which multiplies by q where w = s_w * (q - z).

    Y[m, n] = y[m, n] - sum_g (s_x[m, g] * sum of Xq[m, k] over group g of k) * s_w[g, n] * z[g, n]

y is the integer linear's own result in fp32, bias included. One group is the whole row: then the sum is a vector
of M times a vector of N, and Inductor computes both with the epilogue of the GEMM.

Shapes: y fp32 [..., N], x_q int8 [..., K], x_scale fp32 [..., 1] or, for blocks of 128 channels, [..., ceil(K / 128)],
w_scale fp32 and w_zero int8 or fp32 [N] or [G, N], G = ceil(K / 128) or ceil(K / 64) (`scheme.group_of`); result
[..., N] in `out_dtype`. Two groups of 64 share the scale of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.ops.base import QuantOp, Sample, register
from viditq_fx.ops.linear import without_autocast
from viditq_fx.scheme import BLOCK, group_of


def add_zero_point(
    y: Tensor, x_q: Tensor, x_scale: Tensor, w_scale: Tensor, w_zero: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """The reference (see the module's formula).

    Raises ValueError for scales or zero points that are neither of rows nor of groups of 128 or 64.
    """
    depth = x_q.shape[-1]
    blocks = -(-depth // BLOCK)
    group = BLOCK if w_zero.dim() == 1 else group_of(w_zero.shape[0], depth)
    w_zero = w_zero.to(torch.float32)
    if (
        group is None
        or x_scale.shape[-1] not in (1, blocks)
        or w_scale.shape != w_zero.shape
        or y.shape[-1] != w_zero.shape[-1]
    ):
        raise ValueError(
            f"add_zero_point: K={depth} has scales of rows, of {blocks} blocks of x or of groups of w; got x "
            f"{tuple(x_scale.shape)}, w {tuple(w_scale.shape)} and zero points {tuple(w_zero.shape)}"
        )
    if w_zero.dim() == 1 and x_scale.shape[-1] == 1:
        total = x_q.sum(-1, keepdim=True, dtype=torch.int32).to(torch.float32) * x_scale
        return (y - total * (w_scale * w_zero)).to(out_dtype)
    groups = -(-depth // group)
    if x_scale.shape[-1] != 1 and group != BLOCK:
        x_scale = x_scale.repeat_interleave(BLOCK // group, -1)[..., :groups]
    padded = F.pad(x_q, (0, groups * group - depth))
    total = padded.unflatten(-1, (groups, group)).sum(-1, dtype=torch.int32).to(torch.float32) * x_scale
    if w_zero.dim() == 1:
        return (y - total.sum(-1, keepdim=True) * (w_scale * w_zero)).to(out_dtype)
    with without_autocast(x_q):
        return (y - total @ (w_scale * w_zero)).to(out_dtype)


def _samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    for label, depth, blocks, group, dtype in (
        ("rows", 40, False, 0, torch.int8),
        ("blocks", 300, True, 0, torch.int8),
        ("groups", 300, False, 128, torch.float32),
        ("both", 256, True, 128, torch.int8),
        ("groups-64", 300, False, 64, torch.int8),
        ("both-64", 333, True, 64, torch.int8),
    ):
        x = torch.randint(-127, 128, (2, 5, depth), generator=gen, dtype=torch.int8, device=device)
        x_scale = torch.rand(2, 5, -(-depth // BLOCK) if blocks else 1, generator=gen, device=device)
        shape = (-(-depth // group), 24) if group else (24,)
        w_scale = torch.rand(shape, generator=gen, device=device)
        w_zero = torch.randint(-8, 8, shape, generator=gen, device=device).to(dtype)
        y = torch.randn(2, 5, 24, generator=gen, device=device)
        yield Sample(label=label, args=(y, x, x_scale, w_scale, w_zero, torch.bfloat16))


ADD_ZERO_POINT = register(
    QuantOp(
        name="add_zero_point",
        schema=(
            "(Tensor y, Tensor x_q, Tensor x_scale, Tensor w_scale, Tensor w_zero, ScalarType out_dtype) -> Tensor"
        ),
        reference=add_zero_point,
        fake=None,
        samples=_samples,
    )
)
