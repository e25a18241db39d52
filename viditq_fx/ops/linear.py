"""Integer linear: Y[m, n] = s_x[m] * s_w[n] * sum_k Xq[m, k] * Wq[n, k] (+ bias[n]).

The sum is exact in int32; scales and bias are applied in fp32; one cast ends it (never a cast
before every scale is applied: that overflows fp16). |sum| <= 127 * 128 * K fits int32 for
K <= 132,000.

Shapes: x_MK int8 [..., K], s_M fp32 [..., 1], w_NK int8 [N, K] row-major, s_N fp32 [N], bias_N [N]
of any float dtype; result [..., N] in `out_dtype`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from viditq_fx.ops.base import QuantOp, Sample, register
from viditq_fx.ops.blocked import plain_weight
from viditq_fx.ops.quantize import quantize_per_channel, quantize_per_token

EXACT_K = 2**24 // (127 * 128)
"""Largest K for which any sum of int8 products is below 2^24, so that fp32 adds it exactly.

Inputs are within +-127; a weight of an asymmetric grid may be -128."""


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """A context in which an fp32 GEMM stays one: autocast would round its operands to 16 bits, and its result."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def exact_int_matmul(x_MK: Tensor, w_NK: Tensor, exact_depth: int = EXACT_K) -> Tensor:
    """int8 [M, K] x int8 [N, K] -> exact int32 [M, N].

    fp32 GEMMs over slices of K of at most `exact_depth`: every partial sum is an integer below 2^24,
    so fp32 holds it exactly in any order of addition; the slices are added in int32.
    `torch._int_mm` is not used: it is absent or 20x slower on a CPU and has shape limits on CUDA.
    """
    rows, depth = x_MK.shape
    slices = max(1, -(-depth // exact_depth))
    size = max(1, -(-depth // slices))
    acc: Tensor | None = None
    for start in range(0, depth, size):
        x_part, w_part = x_MK[:, start : start + size], w_NK[:, start : start + size]
        with without_autocast(x_MK):
            product = (x_part.to(torch.float32) @ w_part.to(torch.float32).t()).to(torch.int32)
        acc = product if acc is None else acc + product
    return torch.zeros(rows, w_NK.shape[0], dtype=torch.int32, device=x_MK.device) if acc is None else acc


def linear_epilogue(
    acc: Tensor,
    scale_M: Tensor | None,
    scale_N: Tensor | None,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """acc [..., N] -> acc * s_M * s_N (+ bias) in fp32, cast once to `out_dtype`; no scale that acc has already."""
    y = acc.to(torch.float32)
    if scale_M is not None:
        y = y * scale_M
    if scale_N is not None:
        y = y * scale_N
    if bias_N is not None:
        y = y + bias_N.to(torch.float32)
    return y.to(out_dtype)


def _check(x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None) -> None:
    if x_q.dtype != torch.int8 or w_q.dtype != torch.int8:
        raise ValueError(f"linear_w8a8: operands must be int8; got x {x_q.dtype} and w {w_q.dtype}")
    if w_q.dim() != 2 or x_q.dim() < 1 or x_q.shape[-1] != w_q.shape[1]:
        raise ValueError(f"linear_w8a8: x {tuple(x_q.shape)} and w {tuple(w_q.shape)} share no K")
    if x_scale.shape != (*x_q.shape[:-1], 1) or w_scale.shape != (w_q.shape[0],):
        raise ValueError(
            f"linear_w8a8: scales must be [..., 1] and [N]; got {tuple(x_scale.shape)}, {tuple(w_scale.shape)}"
        )
    if bias is not None and bias.shape != (w_q.shape[0],):
        raise ValueError(f"linear_w8a8: bias must be [{w_q.shape[0]}]; got {tuple(bias.shape)}")


def linear_w8a8(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """The reference: exact integers, fp32 epilogue (see the module's formula).

    Raises ValueError for dtypes or shapes that do not fit together.
    """
    _check(x_q, x_scale, w_q, w_scale, bias)
    acc = exact_int_matmul(x_q.reshape(-1, x_q.shape[-1]), plain_weight(w_q))
    return linear_epilogue(acc.reshape(*x_q.shape[:-1], w_q.shape[0]), x_scale, w_scale, bias, out_dtype)


def _fake(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], w_q.shape[0]), dtype=out_dtype)


def _samples(bits: int, device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    cases = (
        ((64,), 128, 64, torch.float32, True),
        ((2, 9), 40, 24, torch.bfloat16, True),
        ((3, 1), 1152, 8, torch.float16, False),
        ((17,), 33, 7, torch.float32, True),
        ((1,), 16, 16, torch.bfloat16, False),
    )
    for batch, depth, width, dtype, with_bias in cases:
        x = torch.randn(*batch, depth, generator=gen, device=device)
        w = torch.randn(width, depth, generator=gen, device=device) * depth**-0.5
        bias = torch.randn(width, generator=gen, device=device).to(dtype) if with_bias else None
        label = f"{'x'.join(map(str, batch))}-k{depth}-n{width}-{str(dtype).removeprefix('torch.')}"
        args = (*quantize_per_token(x, bits), *quantize_per_channel(w, 8), bias, dtype)
        yield Sample(label=label, args=args)


_SCHEMA = (
    "(Tensor x_q, Tensor x_scale, Tensor w_q, Tensor w_scale, Tensor? bias, ScalarType out_dtype) -> Tensor"
)

LINEAR_W8A8 = register(
    QuantOp(
        name="linear_w8a8",
        schema=_SCHEMA,
        reference=linear_w8a8,
        fake=_fake,
        samples=lambda device: _samples(8, device),
    )
)
LINEAR_W8A7 = register(
    # The same sum; the op of its own says that |x_q| <= 63, which a CPU kernel may rely on.
    QuantOp(
        name="linear_w8a7",
        schema=_SCHEMA,
        reference=linear_w8a8,
        fake=_fake,
        samples=lambda device: _samples(7, device),
    )
)
