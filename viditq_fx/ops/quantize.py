"""Quantize and dequantize: x ~= s * q with symmetric integers q and fp32 scales s.

    s = max(max|x|, EPS) / qmax        one per token (row) or per output channel
    q = clamp(round_half_even(x / s), -qmax, qmax)        qmax = 2^(bits-1) - 1

A NaN or an infinity in a row makes that row's scale NaN or inf and its integers 0, so what is
computed from it is NaN in the same row and nowhere else. An all-zero row has scale EPS / qmax.

Shapes: x_MK [..., K], q_MK int8 [..., K], s_M fp32 [..., 1]; w_NK [N, K], q_NK int8, s_N fp32 [N].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from viditq_fx.ops.base import QuantOp, Sample, register
from viditq_fx.scheme import largest_int

EPS = 1e-30
"""Floor of a row's largest magnitude: 127 / EPS and EPS / 127 are both normal fp32 numbers."""


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"quantize: bits={bits}; int8 storage holds 2 to 8 bits")


def _quantize_rows(x_MK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    qmax = largest_int(bits)
    x_f32 = x_MK.to(torch.float32)
    amax_M = torch.clamp(x_f32.abs().amax(dim=-1, keepdim=True), min=EPS)
    # Inductor recomputes both from amax in every loop that reads them: one division, not three.
    scale_M = amax_M * (1.0 / qmax)
    scaled = torch.round(x_f32 * (qmax / amax_M))
    finite = torch.where(scaled == scaled, scaled, torch.zeros_like(scaled))
    return torch.clamp(finite, -qmax, qmax).to(torch.int8), scale_M


def quantize_per_token(x_MK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x [..., K] of any float dtype -> (q int8 [..., K], s fp32 [..., 1]); ViDiT-Q section 4.1.

    Raises ValueError for `bits` outside 2..8 or K == 0.
    """
    _check_bits(bits)
    if x_MK.dim() == 0:
        raise ValueError("quantize_per_token: a token is the last dimension; got a 0-d tensor")
    return _quantize_rows(x_MK, bits)


def quantize_per_channel(w_NK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """w [N, K] -> (q int8 [N, K], s fp32 [N]): one scale per output channel; ViDiT-Q section 4.1.

    Raises ValueError for `bits` outside 2..8 or a weight that is not 2-D.
    """
    _check_bits(bits)
    if w_NK.dim() != 2:
        raise ValueError(f"quantize_per_channel: a weight is [N, K]; got shape {tuple(w_NK.shape)}")
    q_NK, scale_N1 = _quantize_rows(w_NK, bits)
    return q_NK, scale_N1.squeeze(-1)


def dequantize_per_token(q_MK: Tensor, scale_M: Tensor, dtype: torch.dtype) -> Tensor:
    """(q int8 [..., K], s fp32 [..., 1]) -> s * q in `dtype`, [..., K]."""
    return (q_MK.to(torch.float32) * scale_M).to(dtype)


def dequantize_per_channel(q_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """(q int8 [N, K], s fp32 [N]) -> s * q in `dtype`, [N, K]."""
    return (q_NK.to(torch.float32) * scale_N.unsqueeze(-1)).to(dtype)


def fake_per_token(x_MK: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """What any op that quantizes x [..., K] per token returns, without values: for fake tensors."""
    scale_M = x_MK.new_empty((*x_MK.shape[:-1], 1), dtype=torch.float32)
    return torch.empty_like(x_MK, dtype=torch.int8), scale_M


def fake_per_channel(w_NK: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """What quantize_per_channel returns, without values."""
    return torch.empty_like(w_NK, dtype=torch.int8), w_NK.new_empty((w_NK.shape[0],), dtype=torch.float32)


def fake_dequantized(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What dequantize_per_token and dequantize_per_channel return, without values."""
    return torch.empty_like(q, dtype=dtype)


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(0)


def _token_samples(device: torch.device) -> Iterator[Sample]:
    gen = _generator(device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(3, 5, 40, generator=gen, device=device).to(dtype)
        yield Sample(label=f"3d-{dtype}", args=(x, 8))
    yield Sample(label="7-bit", args=(torch.randn(4, 17, generator=gen, device=device), 7))
    yield Sample(label="zero-row", args=(torch.zeros(2, 8, device=device), 8))
    yield Sample(label="non-contiguous", args=(torch.randn(16, 6, generator=gen, device=device).t(), 8))


def _channel_samples(device: torch.device) -> Iterator[Sample]:
    gen = _generator(device)
    yield Sample(label="weight", args=(torch.randn(24, 40, generator=gen, device=device), 8))
    half = torch.randn(8, 16, generator=gen, device=device).to(torch.bfloat16)
    yield Sample(label="bf16", args=(half, 8))


def _dequantize_token_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _token_samples(device):
        q_MK, scale_M = quantize_per_token(*sample.args)
        yield Sample(label=sample.label, args=(q_MK, scale_M, torch.bfloat16))


def _dequantize_channel_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _channel_samples(device):
        q_NK, scale_N = quantize_per_channel(*sample.args)
        yield Sample(label=sample.label, args=(q_NK, scale_N, torch.float32))


QUANTIZE_PER_TOKEN = register(
    QuantOp(
        name="quantize_per_token",
        schema="(Tensor x, int bits) -> (Tensor, Tensor)",
        reference=quantize_per_token,
        fake=None,
        samples=_token_samples,
    )
)
QUANTIZE_PER_CHANNEL = register(
    QuantOp(
        name="quantize_per_channel",
        schema="(Tensor w, int bits) -> (Tensor, Tensor)",
        reference=quantize_per_channel,
        fake=None,
        samples=_channel_samples,
    )
)
DEQUANTIZE_PER_TOKEN = register(
    QuantOp(
        name="dequantize_per_token",
        schema="(Tensor q, Tensor scale, ScalarType dtype) -> Tensor",
        reference=dequantize_per_token,
        fake=None,
        samples=_dequantize_token_samples,
    )
)
DEQUANTIZE_PER_CHANNEL = register(
    QuantOp(
        name="dequantize_per_channel",
        schema="(Tensor q, Tensor scale, ScalarType dtype) -> Tensor",
        reference=dequantize_per_channel,
        fake=None,
        samples=_dequantize_channel_samples,
    )
)
