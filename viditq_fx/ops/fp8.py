"""Quantization and linear in e4m3, the 8-bit floating point of tensor cores since sm_89.

    s = max(max|x|, EPS) / 448        one per token (row) or per output channel
    q = e4m3(x / s)                   rounded to nearest even; 448 is the largest e4m3 number
    Y[m, n] = s_x[m] * s_w[n] * sum_k Xq[m, k] * Wq[n, k] (+ bias[n])

The sum is fp32, which rounds: unlike the integer linears this one is not exact, and its order is the kernel's own. A
NaN or an infinity in a row makes that row of Y NaN and no other; an all-zero row gives the bias.

Shapes: x_MK [..., K], q_MK e4m3 [..., K], s_M fp32 [..., 1]; w_NK [N, K], q_NK e4m3, s_N fp32 [N]; result [..., N].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from viditq_fx.ops.base import QuantOp, Sample, Tolerance, register
from viditq_fx.ops.linear import linear_epilogue, without_autocast
from viditq_fx.ops.quantize import EPS

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
MIN_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that multiply e4m3."""


def why_no_fp8(device: torch.device) -> str | None:
    """Why a device multiplies no e4m3, or None."""
    if device.type != "cuda" or torch.version.hip:
        return f"fp8 needs an NVIDIA GPU of capability 8.9 or later (Ada, Hopper, Blackwell); this is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        major, minor = capability
        return f"fp8 needs capability 8.9 or later (Ada, Hopper, Blackwell); the device is sm_{major}{minor}"
    return None


def _quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    x_f32 = x_MK.to(torch.float32)
    amax_M = torch.clamp(x_f32.abs().amax(dim=-1, keepdim=True), min=EPS)
    # e4m3 has no infinity: what rounding puts beyond the largest number would be NaN.
    scaled = torch.clamp(x_f32 * (LARGEST / amax_M), -LARGEST, LARGEST)
    return scaled.to(E4M3), amax_M * (1.0 / LARGEST)


def quantize_fp8_per_token(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] of any float dtype -> (q e4m3 [..., K], s fp32 [..., 1]).

    Raises ValueError for a 0-d tensor.
    """
    if x_MK.dim() == 0:
        raise ValueError("quantize_fp8_per_token: a token is the last dimension; got a 0-d tensor")
    return _quantize_rows(x_MK)


def quantize_fp8_per_channel(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """w [N, K] -> (q e4m3 [N, K], s fp32 [N]): one scale per output channel.

    Raises ValueError for a weight that is not 2-D.
    """
    if w_NK.dim() != 2:
        raise ValueError(f"quantize_fp8_per_channel: a weight is [N, K]; got shape {tuple(w_NK.shape)}")
    q_NK, scale_N1 = _quantize_rows(w_NK)
    return q_NK, scale_N1.squeeze(-1)


def fake_fp8_per_token(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """What quantize_fp8_per_token returns, without values."""
    scale_M = x_MK.new_empty((*x_MK.shape[:-1], 1), dtype=torch.float32)
    return torch.empty_like(x_MK, dtype=E4M3), scale_M


def fake_fp8_per_channel(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """What quantize_fp8_per_channel returns, without values."""
    return torch.empty_like(w_NK, dtype=E4M3), w_NK.new_empty((w_NK.shape[0],), dtype=torch.float32)


def _check(x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None) -> None:
    if x_q.dtype != E4M3 or w_q.dtype != E4M3:
        raise ValueError(f"linear_w8a8_fp8: operands must be {E4M3}; got x {x_q.dtype} and w {w_q.dtype}")
    if w_q.dim() != 2 or x_q.dim() < 1 or x_q.shape[-1] != w_q.shape[1]:
        raise ValueError(f"linear_w8a8_fp8: x {tuple(x_q.shape)} and w {tuple(w_q.shape)} share no K")
    width = w_q.shape[0]
    if x_scale.shape != (*x_q.shape[:-1], 1) or w_scale.shape != (width,):
        raise ValueError(
            f"linear_w8a8_fp8: scales must be [..., 1] and [N]; got {tuple(x_scale.shape)}, {tuple(w_scale.shape)}"
        )
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"linear_w8a8_fp8: bias must be [{width}]; got {tuple(bias.shape)}")


def linear_w8a8_fp8(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """The reference: an fp32 GEMM of the e4m3 values, fp32 epilogue (see the module's formula).

    Raises ValueError for dtypes or shapes that do not fit together.
    """
    _check(x_q, x_scale, w_q, w_scale, bias)
    x_2d = x_q.reshape(-1, x_q.shape[-1])
    with without_autocast(x_q):
        acc = x_2d.to(torch.float32) @ w_q.to(torch.float32).t()
    return linear_epilogue(acc.reshape(*x_q.shape[:-1], w_q.shape[0]), x_scale, w_scale, bias, out_dtype)


def _quantize_samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 40, generator=gen, device=device).to(dtype)
        yield Sample(label=str(dtype), args=(x,))
    yield Sample(label="zeros", args=(torch.zeros(2, 8, device=device),))


def _samples(device: torch.device) -> Iterator[Sample]:
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
        yield Sample(
            label=label, args=(*quantize_fp8_per_token(x), *quantize_fp8_per_channel(w), bias, dtype)
        )


# fp32 sums of K rounded products in another order; tensor cores of sm_90 keep some 22 bits of each of their steps.
_TOLERANCES = {
    torch.float32: Tolerance(rtol=1e-4, atol=1e-4),
    torch.float16: Tolerance(rtol=2e-3, atol=2e-4),
    torch.bfloat16: Tolerance(rtol=1.6e-2, atol=1e-3),
}

QUANTIZE_FP8_PER_TOKEN = register(
    QuantOp(
        name="quantize_fp8_per_token",
        schema="(Tensor x) -> (Tensor, Tensor)",
        reference=quantize_fp8_per_token,
        fake=None,
        samples=_quantize_samples,
    )
)
QUANTIZE_FP8_PER_CHANNEL = register(
    QuantOp(
        name="quantize_fp8_per_channel",
        schema="(Tensor w) -> (Tensor, Tensor)",
        reference=quantize_fp8_per_channel,
        fake=None,
        samples=_quantize_samples,
    )
)
LINEAR_W8A8_FP8 = register(
    QuantOp(
        name="linear_w8a8_fp8",
        schema="(Tensor x_q, Tensor x_scale, Tensor w_q, Tensor w_scale, Tensor? bias, ScalarType out_dtype) -> Tensor",
        reference=linear_w8a8_fp8,
        fake=lambda x_q, x_scale, w_q, w_scale, bias, out_dtype: x_q.new_empty(
            (*x_q.shape[:-1], w_q.shape[0]), dtype=out_dtype
        ),
        samples=_samples,
        tolerances=_TOLERANCES,
    )
)
