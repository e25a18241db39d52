"""Quantize by scales that calibration found, and what a scale for blocks of a token is undone with.

    quantize_static     q = clamp(round_half_even(x / s), -qmax, qmax)    one s for all tokens of a call, or one for
                                                                          each position of a token in its sequence
    dequantize_per_block   x ~= s[..., k // block] * q[..., k]

Values beyond the calibrated range are clipped, infinities too, and a NaN becomes 0: nothing looks at a whole row, so
that the quantize of an FFN's hidden activation is done where the up-projection stores it, and that activation never
exists in full precision. (A NaN in the residual stream stays visible there.)

Shapes: x [..., S, K], scale fp32 [], [1] or [S]; q int8 [..., S, K], s fp32 [..., S, 1], or [..., S, ceil(K / block)].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.ops.base import QuantOp, Sample, register
from viditq_fx.scheme import largest_int


def positions_of(x: Tensor) -> int:
    """How many positions a token of x [..., S, K] has in its sequence: S, or 1 where rows are samples, [B, K]."""
    return x.shape[-2] if x.dim() > 2 else 1


def quantize_static(x: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x [..., S, K], scale fp32 [], [1] or [S] -> (q int8 [..., S, K], s fp32 [..., S, 1]).

    Element p of a scale [S] is that of x[..., p, :]. Rows x [R, K] may have a scale each, [R].
    Raises ValueError for `bits` outside 2..8 or a scale of another shape.
    """
    qmax = _checked(x, scale, bits)
    one = scale.dim() == 0 or scale.shape[0] == 1
    divisor = scale.reshape(()) if one else scale.unsqueeze(-1)
    x_f32 = x.to(torch.float32)
    scaled = torch.round(x_f32 / divisor)
    finite = torch.where(scaled == scaled, scaled, torch.zeros_like(scaled))
    q = torch.clamp(finite, -qmax, qmax).to(torch.int8)
    return q, x.new_ones((*x.shape[:-1], 1), dtype=torch.float32) * divisor


def _checked(x: Tensor, scale: Tensor, bits: int) -> int:
    """The largest integer of `bits`; see `quantize_static` for what is refused."""
    rows = x.shape[-2] if x.dim() > 1 else 1
    if not 2 <= bits <= 8:
        raise ValueError(f"quantize_static: bits are 2 to 8, not {bits}")
    if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] != 1 and scale.shape[0] != rows):
        raise ValueError(
            f"quantize_static: one scale is given, [] or [1], or one for each position of x [..., S, K]; got a scale "
            f"{tuple(scale.shape)} for x {tuple(x.shape)}"
        )
    return largest_int(bits)


def fake_static(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """What quantize_static returns, without values."""
    return torch.empty_like(x, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def dequantize_per_block(q: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """(q int8 [..., K], s fp32 [..., ceil(K / block)]) -> s * q in `dtype`, [..., K]."""
    depth = q.shape[-1]
    padded = F.pad(q.to(torch.float32), (0, scale.shape[-1] * block - depth))
    whole = padded.unflatten(-1, (scale.shape[-1], block)) * scale.unsqueeze(-1)
    return whole.flatten(-2)[..., :depth].to(dtype)


def _static_samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(2, 5, 40, generator=gen, device=device)
    yield Sample(label="fp32", args=(x, torch.tensor(0.02, device=device), 8))
    yield Sample(label="bf16-clipped", args=(x.to(torch.bfloat16), torch.tensor([0.01], device=device), 6))
    scale_S = torch.rand(5, generator=gen, device=device).add(0.5).mul(0.02)
    yield Sample(label="positions", args=(x, scale_S, 8))
    yield Sample(label="positions-fp16-strided", args=(x.to(torch.float16).transpose(0, 1), scale_S[:2], 4))
    yield Sample(label="rows", args=(x[0], scale_S, 7))


def _block_samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    for depth, block in ((64, 32), (75, 32), (20, 32)):
        q = torch.randint(-127, 128, (2, 5, depth), generator=gen, dtype=torch.int8, device=device)
        scale = torch.rand(2, 5, -(-depth // block), generator=gen, device=device)
        yield Sample(label=f"k{depth}", args=(q, scale, block, torch.bfloat16))


QUANTIZE_STATIC = register(
    QuantOp(
        name="quantize_static",
        schema="(Tensor x, Tensor scale, int bits) -> (Tensor, Tensor)",
        reference=quantize_static,
        fake=None,
        samples=_static_samples,
    )
)
DEQUANTIZE_PER_BLOCK = register(
    QuantOp(
        name="dequantize_per_block",
        schema="(Tensor q, Tensor scale, int block, ScalarType dtype) -> Tensor",
        reference=dequantize_per_block,
        fake=None,
        samples=_block_samples,
    )
)
