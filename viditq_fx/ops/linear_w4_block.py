"""Integer linears with 4-bit weights whose input has a scale for each token and block of 128 input channels.

    Y[m, n] = sum_g s_x[m, g] * s_w[g, n] * (sum over k of block g of Xq[m, k] * Wq[n, k]) (+ bias[n])

ARQ of DVD-Quant (section 3.3, equations 9 and 10) wants live scales along K, which no integer GEMM can take out of its
sum; its authors' own kernels use blocks of K, and so does this. `linear_w4a8_block` reads the input as int8,
`linear_w4a4` two integers to a byte, packed as a row of the weight is (`ops/pack.py`); K cannot be read off H, so that
op is told it. The sum of a block is exact in int32; blocks are scaled and added, and the bias is, in fp32; one cast
ends it. s_w may be one for each output channel, s_w[n]: it is then applied after the sum.

Integers: x in [-127, 127], or in [-7, 7] where packed; w in [-8, 7].
Shapes: x_MK int8 [..., K] or x_MH uint8 [..., H], s_MG fp32 [..., G] with G = ceil(K / 128), w uint8 [N, H] as
`pack_int4` makes it, s_N fp32 [N] or s_GN fp32 [G, N], bias_N [N] of any float dtype; result [..., N] in `out_dtype`.
A weight may have groups of 64 instead, s_GN fp32 [ceil(K / 64), N]: two of them then share a block's scale of x.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from viditq_fx.ops.base import QuantOp, Sample, Tolerance, register
from viditq_fx.ops.blocked import plain_weight
from viditq_fx.ops.linear import linear_epilogue
from viditq_fx.ops.linear_w4a8 import matmul_int4
from viditq_fx.ops.pack import pack_int4, unpack_int4
from viditq_fx.ops.quantize import quantize_per_block, quantize_per_channel, quantize_per_group
from viditq_fx.scheme import BLOCK, group_shapes, half_width


def _check(
    op: str, x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, depth: int
) -> None:
    """Raises ValueError for operands of K = `depth` that do not fit together; x_q has its own check."""
    if w_q.dtype != torch.uint8 or w_q.dim() != 2 or w_q.shape[1] != half_width(depth):
        raise ValueError(
            f"{op}: a packed weight of K={depth} is uint8 [N, {half_width(depth)}]; got {w_q.dtype} {tuple(w_q.shape)}"
        )
    if x_scale.dtype != torch.float32 or w_scale.dtype != torch.float32:
        raise ValueError(f"{op}: scales are fp32; got {x_scale.dtype} for x and {w_scale.dtype} for w")
    width, blocks = w_q.shape[0], -(-depth // BLOCK)
    shapes = ((width,), *group_shapes(width, depth))
    if x_scale.shape != (*x_q.shape[:-1], blocks) or tuple(w_scale.shape) not in shapes:
        raise ValueError(
            f"{op}: with K={depth} scales must be [..., {blocks}] and {' or '.join(map(str, shapes))}; got "
            f"{tuple(x_scale.shape)}, {tuple(w_scale.shape)}"
        )
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"{op}: bias must be [{width}]; got {tuple(bias.shape)}")


def _linear(
    x_MK: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    grouped = w_scale.dim() == 2
    x_2d, scale_MG = x_MK.reshape(-1, x_MK.shape[-1]), x_scale.reshape(-1, x_scale.shape[-1])
    acc = matmul_int4(x_2d, plain_weight(w_q), w_scale if grouped else None, scale_MG)
    acc = acc.reshape(*x_MK.shape[:-1], w_q.shape[0])
    return linear_epilogue(acc, None, None if grouped else w_scale, bias, out_dtype)


def linear_w4a8_block(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """The reference for int8 inputs: exact integers, fp32 sums of blocks (see the module's formula).

    Raises ValueError for dtypes or shapes that do not fit together.
    """
    if x_q.dtype != torch.int8 or x_q.dim() < 1 or x_q.shape[-1] < 1:
        raise ValueError(f"linear_w4a8_block: x is int8 [..., K], K >= 1; got {x_q.dtype} {tuple(x_q.shape)}")
    _check("linear_w4a8_block", x_q, x_scale, w_q, w_scale, bias, x_q.shape[-1])
    return _linear(x_q, x_scale, w_q, w_scale, bias, out_dtype)


def linear_w4a4(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    depth: int,
) -> Tensor:
    """The reference for packed 4-bit inputs of K = `depth`: exact integers, fp32 sums of blocks.

    Raises ValueError for dtypes or shapes that do not fit together or not `depth`.
    """
    packed = x_q.dtype == torch.uint8 and x_q.dim() >= 1
    if not packed or depth < 1 or x_q.shape[-1] != half_width(depth):
        raise ValueError(
            f"linear_w4a4: x of K={depth} is uint8 [..., {half_width(depth)}] as pack_int4 makes it; got {x_q.dtype} "
            f"{tuple(x_q.shape)}"
        )
    _check("linear_w4a4", x_q, x_scale, w_q, w_scale, bias, depth)
    return _linear(unpack_int4(x_q, depth), x_scale, w_q, w_scale, bias, out_dtype)


def _fake(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    depth: int = 0,
) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], w_q.shape[0]), dtype=out_dtype)


def _samples(bits: int, device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    cases = (
        ((64,), 128, 64, torch.float32, True, 0),
        ((2, 9), 40, 24, torch.bfloat16, True, 128),
        ((17,), 333, 7, torch.float32, False, 128),
        ((3, 1), 1152, 8, torch.float16, False, 128),
        ((17,), 300, 33, torch.float32, True, 0),
        ((1,), 200, 8, torch.bfloat16, True, 0),
        ((17,), 333, 7, torch.float32, True, 64),
        ((1, 3), 1216, 24, torch.bfloat16, False, 64),
    )
    for batch, depth, width, dtype, with_bias, group in cases:
        x = torch.randn(*batch, depth, generator=gen, device=device)
        w = torch.randn(width, depth, generator=gen, device=device) * depth**-0.5
        bias = torch.randn(width, generator=gen, device=device).to(dtype) if with_bias else None
        x_q, x_scale = quantize_per_block(x, bits, BLOCK)
        q_NK, scale = quantize_per_group(w, 4, group) if group else quantize_per_channel(w, 4)
        q_NK[::2, ::3] = -8  # symmetric rounding makes none; asymmetric weights do
        kind = f"{'x'.join(map(str, batch))}-k{depth}-n{width}-{str(dtype).removeprefix('torch.')}"
        label = f"{kind}{f'-groups{group}' if group else ''}"
        if bits == 4:
            args = (pack_int4(x_q), x_scale, pack_int4(q_NK), scale, bias, dtype, depth)
        else:
            args = (x_q, x_scale, pack_int4(q_NK), scale, bias, dtype)
        yield Sample(label=label, args=args)


# Blocks are added in fp32, in an order that is the kernel's own: a rounding for each, beside those of the epilogue.
_TOLERANCES = {
    torch.float32: Tolerance(rtol=1e-5, atol=1e-5),
    torch.float16: Tolerance(rtol=2e-3, atol=1e-4),
    torch.bfloat16: Tolerance(rtol=1.6e-2, atol=1e-3),
}
_OPERANDS = "Tensor x_q, Tensor x_scale, Tensor w_q, Tensor w_scale, Tensor? bias, ScalarType out_dtype"

LINEAR_W4A8_BLOCK = register(
    QuantOp(
        name="linear_w4a8_block",
        schema=f"({_OPERANDS}) -> Tensor",
        reference=linear_w4a8_block,
        fake=_fake,
        samples=lambda device: _samples(8, device),
        tolerances=_TOLERANCES,
    )
)
LINEAR_W4A4 = register(
    QuantOp(
        name="linear_w4a4",
        schema=f"({_OPERANDS}, int depth) -> Tensor",
        reference=linear_w4a4,
        fake=_fake,
        samples=lambda device: _samples(4, device),
        tolerances=_TOLERANCES,
    )
)
