"""What a weight's zero points add to an integer linear, which multiplies by q where w = s_w * (q - z).

    Y[m, n] = y[m, n] - sum_g (s_x[m, g] * sum of Xq[m, k] over group g of k) * s_w[g, n] * z[g, n]

y is the integer linear's own result in fp32, bias included. One group is the whole row: then the sum is a vector
of M times a vector of N, and Inductor computes both with the epilogue of the GEMM.

Shapes: y fp32 [..., N], x_q int8 [..., K], x_scale fp32 [..., 1] or, for blocks of 128 channels, [..., ceil(K / 128)],
w_scale fp32 and w_zero int8 or fp32 [N] or [ceil(K / 128), N]; result [..., N] in `out_dtype`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.ops.base import QuantOp, Sample, register
from viditq_fx.ops.linear import without_autocast
from viditq_fx.scheme import GROUP


def add_zero_point(
    y: Tensor, x_q: Tensor, x_scale: Tensor, w_scale: Tensor, w_zero: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """The reference (see the module's formula).

    Raises ValueError for scales or zero points that are neither of rows nor of groups of 128.
    """
    groups = -(-x_q.shape[-1] // GROUP)
    w_zero = w_zero.to(torch.float32)
    if (
        x_scale.shape[-1] not in (1, groups)
        or w_scale.shape != w_zero.shape
        or y.shape[-1] != w_zero.shape[-1]
    ):
        raise ValueError(
            f"add_zero_point: K={x_q.shape[-1]} has scales of rows or {groups} groups; got x {tuple(x_scale.shape)}, "
            f"w {tuple(w_scale.shape)} and zero points {tuple(w_zero.shape)}"
        )
    if w_zero.dim() == 1 and x_scale.shape[-1] == 1:
        total = x_q.sum(-1, keepdim=True, dtype=torch.int32).to(torch.float32) * x_scale
        return (y - total * (w_scale * w_zero)).to(out_dtype)
    padded = F.pad(x_q, (0, groups * GROUP - x_q.shape[-1]))
    total = padded.unflatten(-1, (groups, GROUP)).sum(-1, dtype=torch.int32).to(torch.float32) * x_scale
    if w_zero.dim() == 1:
        return (y - total.sum(-1, keepdim=True) * (w_scale * w_zero)).to(out_dtype)
    with without_autocast(x_q):
        return (y - total @ (w_scale * w_zero)).to(out_dtype)


def _samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    for label, depth, blocks, grouped, dtype in (
        ("rows", 40, False, False, torch.int8),
        ("blocks", 300, True, False, torch.int8),
        ("groups", 300, False, True, torch.float32),
        ("both", 256, True, True, torch.int8),
    ):
        groups = -(-depth // GROUP)
        x = torch.randint(-127, 128, (2, 5, depth), generator=gen, dtype=torch.int8, device=device)
        x_scale = torch.rand(2, 5, groups if blocks else 1, generator=gen, device=device)
        shape = (groups, 24) if grouped else (24,)
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
