"""Quantize and dequantize: x ~= s * q with symmetric integers q and fp32 scales s.

    s = max(max|x|, EPS) / qmax        one per token (row), per output channel, or per block or group of K in them
    q = clamp(round_half_even(x / s), -qmax, qmax)        qmax = 2^(bits-1) - 1

A NaN or an infinity in a row makes that row's scale NaN or inf and its integers 0, so what is
computed from it is NaN in the same row and nowhere else. An all-zero row has scale EPS / qmax. Where a row has a scale
for each block of K, this holds for the block: what sums over blocks is NaN in that row all the same.

Shapes: x_MK [..., K], q_MK int8 [..., K], s_M fp32 [..., 1]; w_NK [N, K], q_NK int8, s_N fp32 [N]. With groups of
input channels each has a scale of its own, s_GN fp32 [G, N], G = ceil(K / group): the last may be short. So have
blocks of a token's channels, s_MG fp32 [..., G].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.ops.base import QuantOp, Sample, register
from viditq_fx.scheme import largest_int

EPS = 1e-30
"""Floor of a row's largest magnitude: 127 / EPS and EPS / 127 are both normal fp32 numbers."""


def check_bits(bits: int) -> None:
    """Raise ValueError for integers that int8 does not hold."""
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
    check_bits(bits)
    if x_MK.dim() == 0:
        raise ValueError("quantize_per_token: a token is the last dimension; got a 0-d tensor")
    return _quantize_rows(x_MK, bits)


def quantize_per_channel(w_NK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """w [N, K] -> (q int8 [N, K], s fp32 [N]): one scale per output channel; ViDiT-Q section 4.1.

    Raises ValueError for `bits` outside 2..8 or a weight that is not 2-D.
    """
    check_bits(bits)
    if w_NK.dim() != 2:
        raise ValueError(f"quantize_per_channel: a weight is [N, K]; got shape {tuple(w_NK.shape)}")
    q_NK, scale_N1 = _quantize_rows(w_NK, bits)
    return q_NK, scale_N1.squeeze(-1)


def quantize_per_group(w_NK: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """w [N, K] -> (q int8 [N, K], s fp32 [G, N]): one scale per output channel and `group` input channels.

    Raises ValueError for `bits` outside 2..8, a group below 1 or a weight that is not 2-D.
    """
    check_bits(bits)
    if w_NK.dim() != 2 or group < 1:
        raise ValueError(
            f"quantize_per_group: a weight is [N, K] and a group at least 1; got shape {tuple(w_NK.shape)}, {group}"
        )
    width, depth = w_NK.shape
    padded = F.pad(w_NK, (0, -depth % group))  # zeros change no group's largest magnitude
    q_NGK, scale_NG1 = _quantize_rows(padded.reshape(width, -1, group), bits)
    return q_NGK.reshape(width, -1)[:, :depth].contiguous(), scale_NG1.squeeze(-1).t().contiguous()


def quantize_per_block(x_MK: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """x [..., K] -> (q int8 [..., K], s fp32 [..., ceil(K / block)]): one scale per token and `block` input channels.

    The block-wise form of ARQ's scale of the live activations, DVD-Quant section 3.3 (equations 9 and 10).
    Raises ValueError for `bits` outside 2..8, a block below 1, no dimension or K == 0.
    """
    check_bits(bits)
    if x_MK.dim() == 0 or x_MK.shape[-1] == 0 or block < 1:
        raise ValueError(
            f"quantize_per_block: a token is the last dimension, of K >= 1, and a block at least 1; got shape "
            f"{tuple(x_MK.shape)}, {block}"
        )
    *rows, depth = x_MK.shape
    whole = depth // block
    parts: list[tuple[Tensor, Tensor]] = []
    if whole:
        q_MGK, scale_MG1 = _quantize_rows(x_MK[..., : whole * block].reshape(*rows, whole, block), bits)
        parts.append((q_MGK.reshape(*rows, whole * block), scale_MG1.squeeze(-1)))
    if (
        depth % block
    ):  # apart and not padded: Inductor's C++ reads a padded reshape that is cut again out of bounds
        parts.append(_quantize_rows(x_MK[..., whole * block :], bits))
    q_MK, scale_MG = (
        torch.cat(each, dim=-1) if len(parts) == 2 else each[0] for each in zip(*parts, strict=True)
    )
    return q_MK.contiguous(), scale_MG.contiguous()


def dequantize_per_token(q_MK: Tensor, scale_M: Tensor, dtype: torch.dtype) -> Tensor:
    """(q int8 [..., K], s fp32 [..., 1]) -> s * q in `dtype`, [..., K]."""
    return (q_MK.to(torch.float32) * scale_M).to(dtype)


def dequantize_per_channel(q_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """(q int8 [N, K], s fp32 [N]) -> s * q in `dtype`, [N, K]."""
    return (q_NK.to(torch.float32) * scale_N.unsqueeze(-1)).to(dtype)


def dequantize_per_group(q_NK: Tensor, scale_GN: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """(q int8 [N, K], s fp32 [G, N]) -> s * q in `dtype`, [N, K]."""
    width, depth = q_NK.shape
    q_NGK = F.pad(q_NK.to(torch.float32), (0, -depth % group)).reshape(width, -1, group)
    return (q_NGK * scale_GN.t().unsqueeze(-1)).reshape(width, -1)[:, :depth].to(dtype)


def fake_per_token(x_MK: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """What any op that quantizes x [..., K] per token returns, without values: for fake tensors."""
    scale_M = x_MK.new_empty((*x_MK.shape[:-1], 1), dtype=torch.float32)
    return torch.empty_like(x_MK, dtype=torch.int8), scale_M


def fake_per_channel(w_NK: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """What quantize_per_channel returns, without values."""
    return torch.empty_like(w_NK, dtype=torch.int8), w_NK.new_empty((w_NK.shape[0],), dtype=torch.float32)


def fake_per_group(w_NK: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """What quantize_per_group returns, without values."""
    width, depth = w_NK.shape
    scale_GN = w_NK.new_empty((-(-depth // group), width), dtype=torch.float32)
    return w_NK.new_empty((width, depth), dtype=torch.int8), scale_GN


def fake_per_block(x_MK: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """What quantize_per_block returns, without values."""
    *rows, depth = x_MK.shape
    scale_MG = x_MK.new_empty((*rows, -(-depth // block)), dtype=torch.float32)
    return x_MK.new_empty(x_MK.shape, dtype=torch.int8), scale_MG


def fake_dequantized(q: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    """What every op that dequantizes returns, without values; the dtype is its last argument."""
    return torch.empty_like(q, dtype=rest[-1])


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


def _group_samples(device: torch.device) -> Iterator[Sample]:
    gen = _generator(device)
    for label, depth, group in (("even", 64, 32), ("short last group", 75, 32), ("one group", 20, 32)):
        w = torch.randn(6, depth, generator=gen, device=device)
        yield Sample(label=label, args=(w, 4, group))


def _block_samples(device: torch.device) -> Iterator[Sample]:
    gen = _generator(device)
    for bits, depth, block in ((8, 64, 32), (4, 75, 32), (4, 20, 32)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 3, depth, generator=gen, device=device).to(dtype)
            yield Sample(label=f"{bits}-bit-k{depth}-{dtype}", args=(x, bits, block))
    yield Sample(label="one-token", args=(torch.randn(300, generator=gen, device=device), 8, 128))
    yield Sample(label="non-contiguous", args=(torch.randn(16, 6, generator=gen, device=device).t(), 4, 8))


def _dequantize_token_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _token_samples(device):
        q_MK, scale_M = quantize_per_token(*sample.args)
        yield Sample(label=sample.label, args=(q_MK, scale_M, torch.bfloat16))


def _dequantize_channel_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _channel_samples(device):
        q_NK, scale_N = quantize_per_channel(*sample.args)
        yield Sample(label=sample.label, args=(q_NK, scale_N, torch.float32))


def _dequantize_group_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _group_samples(device):
        args = (*quantize_per_group(*sample.args), sample.args[2], torch.bfloat16)
        yield Sample(label=sample.label, args=args)


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
QUANTIZE_PER_GROUP = register(
    QuantOp(
        name="quantize_per_group",
        schema="(Tensor w, int bits, int group) -> (Tensor, Tensor)",
        reference=quantize_per_group,
        fake=None,
        samples=_group_samples,
    )
)
DEQUANTIZE_PER_GROUP = register(
    QuantOp(
        name="dequantize_per_group",
        schema="(Tensor q, Tensor scale, int group, ScalarType dtype) -> Tensor",
        reference=dequantize_per_group,
        fake=None,
        samples=_dequantize_group_samples,
    )
)
QUANTIZE_PER_BLOCK = register(
    QuantOp(
        name="quantize_per_block",
        schema="(Tensor x, int bits, int block) -> (Tensor, Tensor)",
        reference=quantize_per_block,
        fake=None,
        samples=_block_samples,
    )
)
