"""From a full-precision weight to what is stored of it, and back: one place for every scheme.

A form (see scheme.WeightForm) says what is stored: int8 or e4m3 [N, K], or 4-bit integers two to a byte [N, H]. The
last axis of the scales is always N, so weights are joined along N by joining both along it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from viditq_fx.ops.base import QuantOp
from viditq_fx.ops.fp8 import E4M3, LINEAR_W8A8_FP8, QUANTIZE_FP8_PER_TOKEN, quantize_fp8_per_channel
from viditq_fx.ops.linear import LINEAR_W8A7, LINEAR_W8A8
from viditq_fx.ops.linear_w4a8 import LINEAR_W4A8
from viditq_fx.ops.pack import pack_int4, unpack_int4
from viditq_fx.ops.quantize import (
    QUANTIZE_PER_TOKEN,
    dequantize_per_channel,
    dequantize_per_group,
    quantize_per_channel,
    quantize_per_group,
)
from viditq_fx.scheme import GROUP, QuantScheme, WeightForm

LINEARS: Mapping[str, QuantOp] = {
    "w8a8": LINEAR_W8A8,
    "w8a7": LINEAR_W8A7,
    "w4a8": LINEAR_W4A8,
    f"w4a8-g{GROUP}": LINEAR_W4A8,
    "fp8": LINEAR_W8A8_FP8,
}
"""Scheme -> the op that computes a linear in it."""


def stored_dtype(form: WeightForm) -> torch.dtype:
    """dtype of what is stored of a weight."""
    if form.floating:
        return E4M3
    return torch.uint8 if form.nibbles else torch.int8


def quantize_weight(w_NK: Tensor, form: WeightForm) -> tuple[Tensor, Tensor]:
    """w [N, K] -> (what is stored, fp32 scales [N] or [G, N]). Scales of NaN or infinity are the caller's to refuse."""
    if form.floating:
        return quantize_fp8_per_channel(w_NK)
    if form.group is None:
        q_NK, scale = quantize_per_channel(w_NK, form.bits)
    else:
        q_NK, scale = quantize_per_group(w_NK, form.bits, form.group)
    return (pack_int4(q_NK) if form.nibbles else q_NK), scale


def quantize_input(x: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """x [..., K] -> (what the linear of a scheme multiplies, fp32 scales [..., 1]), by the dialect's op."""
    if scheme.floating:
        return QUANTIZE_FP8_PER_TOKEN.overload(x)
    return QUANTIZE_PER_TOKEN.overload(x, scheme.input_bits)


def dequantize_weight(
    stored: Tensor, scale: Tensor, depth: int, form: WeightForm, dtype: torch.dtype
) -> Tensor:
    """What `quantize_weight` stored of a weight of K = `depth` -> s * q [N, K] in `dtype`."""
    q_NK = unpack_int4(stored, depth) if form.nibbles else stored
    if form.group is None:
        return dequantize_per_channel(q_NK, scale, dtype)
    return dequantize_per_group(q_NK, scale, form.group, dtype)


def join_weights(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stored weights [N_i, ...] with their scales -> one stored weight [sum of N_i, ...] with its scales."""
    stored, scales = zip(*parts, strict=True)
    return torch.cat(stored), torch.cat(scales, dim=-1)
