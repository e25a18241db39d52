"""Integer linear with 4-bit weights: Y[m, n] = s_x[m] * s_w[n] * sum_k Xq[m, k] * Wq[n, k] (+ bias[n]).

With groups of 128 or 64 input channels, where each has a scale of its own:

    Y[m, n] = s_x[m] * sum_g s_w[g, n] * (sum over k of group g of Xq[m, k] * Wq[n, k]) (+ bias[n])

Sums inside the brackets are exact in int32; groups are added, and scales and bias applied, in fp32; one cast ends it.

Shapes: x_MK int8 [..., K], s_M fp32 [..., 1], w uint8 [N, H] as `pack_int4` makes it, s_N fp32 [N] or s_GN
fp32 [G, N], G = ceil(K / 128) or ceil(K / 64), which says the size of a group (`scheme.group_of`), bias_N [N] of any
float dtype; result [..., N] in `out_dtype`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from viditq_fx.ops.base import QuantOp, Sample, Tolerance, register
from viditq_fx.ops.blocked import plain_weight
from viditq_fx.ops.linear import exact_int_matmul, linear_epilogue, without_autocast
from viditq_fx.ops.pack import pack_int4, unpack_int4
from viditq_fx.ops.quantize import quantize_per_channel, quantize_per_group, quantize_per_token
from viditq_fx.scheme import BLOCK, group_of, group_shapes, half_width

EXACT_DEPTH = 2**24 // (127 * 8)
"""Largest K for which any sum of int8 x int4 products is below 2^24: wider than any DiT's linear."""


def matmul_int4(
    x_MK: Tensor, w_NH: Tensor, scale_GN: Tensor | None, scale_MG: Tensor | None = None
) -> Tensor:
    """int8 [M, K] x packed 4-bit [N, H] -> fp32 [M, N]: the exact sum, or the scaled sum over groups.

    `scale_GN` has a scale for each output channel and group of K, `scale_MG` one for each row of x and block of K.
    Without both: one fp32 GEMM of integers where K <= EXACT_DEPTH, else int32 sums of several.
    """
    depth = x_MK.shape[-1]
    w_NK = unpack_int4(w_NH, depth)
    if scale_GN is None and scale_MG is None:
        return exact_int_matmul(x_MK, w_NK, EXACT_DEPTH).to(torch.float32)
    size = BLOCK if scale_GN is None else group_of(scale_GN.shape[0], depth)
    assert size is not None, f"no groups of K = {depth} have so many scales"
    acc = torch.zeros(x_MK.shape[0], w_NH.shape[0], dtype=torch.float32, device=x_MK.device)
    for group in range(-(-depth // size)):
        inside = slice(group * size, (group + 1) * size)
        with without_autocast(x_MK):
            part = x_MK[:, inside].to(torch.float32) @ w_NK[:, inside].to(torch.float32).t()
        if scale_MG is not None:
            part = part * scale_MG[:, group * size // BLOCK, None]
        acc += part if scale_GN is None else part * scale_GN[group]
    return acc


def _check(x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None) -> None:
    if x_q.dtype != torch.int8 or w_q.dtype != torch.uint8:
        raise ValueError(
            f"linear_w4a8: operands are int8 and packed uint8; got x {x_q.dtype} and w {w_q.dtype}"
        )
    if w_q.dim() != 2 or x_q.dim() < 1 or w_q.shape[1] != half_width(x_q.shape[-1]):
        raise ValueError(f"linear_w4a8: x {tuple(x_q.shape)} and packed w {tuple(w_q.shape)} share no K")
    width = w_q.shape[0]
    shapes = ((width,), *group_shapes(width, x_q.shape[-1]))
    if x_scale.shape != (*x_q.shape[:-1], 1) or tuple(w_scale.shape) not in shapes:
        raise ValueError(
            f"linear_w4a8: scales must be [..., 1] and {' or '.join(map(str, shapes))}; got "
            f"{tuple(x_scale.shape)}, {tuple(w_scale.shape)}"
        )
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"linear_w4a8: bias must be [{width}]; got {tuple(bias.shape)}")


def linear_w4a8(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """The reference: exact integers, fp32 epilogue (see the module's formula).

    Raises ValueError for dtypes or shapes that do not fit together.
    """
    _check(x_q, x_scale, w_q, w_scale, bias)
    x_2d, packed = x_q.reshape(-1, x_q.shape[-1]), plain_weight(w_q)
    grouped = w_scale.dim() == 2
    acc = matmul_int4(x_2d, packed, w_scale if grouped else None).reshape(*x_q.shape[:-1], w_q.shape[0])
    return linear_epilogue(acc, x_scale, None if grouped else w_scale, bias, out_dtype)


def _fake(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], w_q.shape[0]), dtype=out_dtype)


def _samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    cases = (
        ((64,), 128, 64, torch.float32, True, 0),
        ((2, 9), 40, 24, torch.bfloat16, True, 0),
        ((17,), 333, 7, torch.float32, False, 0),
        ((3, 1), 1152, 8, torch.float16, False, 128),
        ((17,), 300, 33, torch.float32, True, 128),
        ((1,), 16, 16, torch.bfloat16, True, 128),
        ((17,), 333, 7, torch.float32, False, 64),
        ((2, 5), 1216, 24, torch.bfloat16, True, 64),
        ((3,), 40, 9, torch.float16, True, 64),
    )
    for batch, depth, width, dtype, with_bias, group in cases:
        x = torch.randn(*batch, depth, generator=gen, device=device)
        w = torch.randn(width, depth, generator=gen, device=device) * depth**-0.5
        bias = torch.randn(width, generator=gen, device=device).to(dtype) if with_bias else None
        q_NK, scale = quantize_per_group(w, 4, group) if group else quantize_per_channel(w, 4)
        kind = f"{'x'.join(map(str, batch))}-k{depth}-n{width}-{str(dtype).removeprefix('torch.')}"
        args = (*quantize_per_token(x, 8), pack_int4(q_NK), scale, bias, dtype)
        yield Sample(label=f"{kind}{f'-groups{group}' if group else ''}", args=args)


# Groups are added in fp32, in an order that is the kernel's own: a rounding for each, beside those of the epilogue.
_TOLERANCES = {
    torch.float32: Tolerance(rtol=1e-5, atol=1e-5),
    torch.float16: Tolerance(rtol=2e-3, atol=1e-4),
    torch.bfloat16: Tolerance(rtol=1.6e-2, atol=1e-3),
}

LINEAR_W4A8 = register(
    QuantOp(
        name="linear_w4a8",
        schema="(Tensor x_q, Tensor x_scale, Tensor w_q, Tensor w_scale, Tensor? bias, ScalarType out_dtype) -> Tensor",
        reference=linear_w4a8,
        fake=_fake,
        samples=_samples,
        tolerances=_TOLERANCES,
    )
)
