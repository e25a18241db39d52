"""Norm, modulate and quantize a row in one op: what adaLN does before every projection.

    n = LayerNorm(x) or RMSNorm(x)        over the last dimension, affine or not
    h = n * (offset + scale) + shift      offset is 1 for `1 + scale`, 0 where the factor is given whole
    q, s = quantize_per_token(h)

All of it in fp32, so a half-precision model loses the roundings between these steps. Composite: a
compiler sees the steps and fuses them into one read and one write of the row.

Shapes: x [..., K]; weight, bias [K]; scale, shift broadcast to [..., K]; q int8 [..., K], s fp32 [..., 1].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.ops.base import QuantOp, Sample, register
from viditq_fx.ops.quantize import quantize_per_token

NORMS = ("layer_norm", "rms_norm")


def norm_modulate_quantize(
    x: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    offset: float,
    shift: Tensor | None,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """The reference (see the module's formula); ViDiT-Q section 4.1 after DiT's adaLN.

    Raises ValueError for a norm that is neither "layer_norm" nor "rms_norm", and for bits outside 2..8.
    """
    if norm not in NORMS:
        raise ValueError(f"norm_modulate_quantize: norm is one of {NORMS}, not {norm!r}")
    value = _normalized(x.to(torch.float32), norm, weight, bias, eps)
    if scale is not None:
        factor = scale.to(torch.float32)
        value = value * (factor + offset if offset else factor)
    if shift is not None:
        value = value + shift.to(torch.float32)
    return quantize_per_token(value, bits)


def _normalized(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    weight = None if weight is None else weight.to(torch.float32)
    bias = None if bias is None else bias.to(torch.float32)
    if norm == "layer_norm":
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    value = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return value if weight is None else value * weight


def _samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=gen, device=device).to(dtype)

    scale, shift = draw(2, 1, 48), draw(2, 1, 48)
    yield Sample(label="adaln", args=(draw(2, 9, 48), "layer_norm", None, None, 1e-6, scale, 1.0, shift, 8))
    bf16 = torch.bfloat16
    affine = (draw(48, dtype=bf16), draw(48, dtype=bf16))
    yield Sample(
        label="affine-bf16",
        args=(draw(2, 9, 48, dtype=bf16), "layer_norm", *affine, 1e-5, None, 0.0, None, 8),
    )
    yield Sample(label="rms", args=(draw(7, 40), "rms_norm", draw(40), None, 1e-6, draw(7, 40), 0.0, None, 7))
    yield Sample(label="shift-only", args=(draw(3, 33), "rms_norm", None, None, 1e-6, None, 0.0, draw(33), 8))


NORM_MODULATE_QUANTIZE = register(
    QuantOp(
        name="norm_modulate_quantize",
        schema=(
            "(Tensor x, str norm, Tensor? weight, Tensor? bias, float eps, Tensor? scale, float offset, "
            "Tensor? shift, int bits) -> (Tensor, Tensor)"
        ),
        reference=norm_modulate_quantize,
        fake=None,
        samples=_samples,
    )
)
