"""From a full-precision weight to what is stored of it, and back: one place for every scheme.

A form (see scheme.WeightForm) says what is stored: int8 or e4m3 [N, K], or 4-bit integers two to a byte [N, H], its
scales, and its zero points where its grid has them. The last axis of both is always N, so weights are joined along
N by joining each along it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from viditq_fx.errors import SchemeError
from viditq_fx.ops.base import QuantOp
from viditq_fx.ops.fp8 import E4M3, LINEAR_W8A8_FP8, QUANTIZE_FP8_PER_TOKEN, quantize_fp8_per_channel
from viditq_fx.ops.grid import dequantize_weight_grid, quantize_weight_grid
from viditq_fx.ops.linear import LINEAR_W8A7, LINEAR_W8A8, without_autocast
from viditq_fx.ops.linear_w4_block import LINEAR_W4A4, LINEAR_W4A8_BLOCK
from viditq_fx.ops.linear_w4a8 import LINEAR_W4A8
from viditq_fx.ops.low_rank import ADD_LOW_RANK, quantize_weight_low_rank
from viditq_fx.ops.pack import PACK_INT4, pack_int4, unpack_int4
from viditq_fx.ops.quantize import (
    QUANTIZE_PER_BLOCK,
    QUANTIZE_PER_TOKEN,
    dequantize_per_channel,
    dequantize_per_group,
    quantize_per_channel,
    quantize_per_group,
)
from viditq_fx.ops.rotate import ROTATE, ROTATE_QUANTIZE, transform_weight
from viditq_fx.ops.static_scale import QUANTIZE_STATIC
from viditq_fx.ops.zero_point import ADD_ZERO_POINT
from viditq_fx.scheme import QuantScheme, WeightForm

LINEARS: tuple[QuantOp, ...] = (
    LINEAR_W8A8,
    LINEAR_W8A7,
    LINEAR_W4A8,
    LINEAR_W4A8_BLOCK,
    LINEAR_W4A4,
    LINEAR_W8A8_FP8,
)
"""Every op that computes a quantized linear."""

Stored = tuple[Tensor, ...]
"""(what is stored of a weight, fp32 scales), and zero points (int8 up to 4 bits) where the form has a grid."""


def linear_of(scheme: QuantScheme) -> QuantOp:
    """The op that computes a linear in a scheme."""
    if scheme.floating:
        return LINEAR_W8A8_FP8
    if scheme.block is not None:
        return LINEAR_W4A4 if scheme.input_bits == 4 else LINEAR_W4A8_BLOCK
    if scheme.weight_bits == 4:
        return LINEAR_W4A8
    return LINEAR_W8A7 if scheme.input_bits <= 7 else LINEAR_W8A8


@dataclass(frozen=True, eq=True)
class Multiplier:
    """The fp32 vector [K] that an input is multiplied, and a weight divided, by: told apart by its values."""

    values: Tensor = field(compare=False, repr=False)
    digest: str

    @classmethod
    def of(cls, values: Tensor) -> Multiplier:
        """Of a vector of any float dtype on any device; kept as fp32 on the CPU."""
        kept = values.detach().to("cpu", torch.float32).contiguous()
        return cls(kept, hashlib.sha256(kept.numpy().tobytes()).hexdigest())


def stored_dtype(form: WeightForm) -> torch.dtype:
    """dtype of what is stored of a weight."""
    if form.floating:
        return E4M3
    return torch.uint8 if form.nibbles else torch.int8


def quantize_weight(w_NK: Tensor, form: WeightForm) -> Stored:
    """w [N, K] -> what is stored of it. Scales of NaN or infinity are the caller's to refuse."""
    if form.rank:
        multiplier = _values(form, w_NK.device)
        operands = (form.rotation, form.rank, form.bits, form.group or 0, form.grid or "")
        q_NK, *vectors = quantize_weight_low_rank(w_NK, multiplier, *operands)
        return (pack_int4(q_NK) if form.nibbles else q_NK), *vectors
    if form.rotation > 1 or form.multiplier is not None:
        w_NK = transform_weight(w_NK, _values(form, w_NK.device), form.rotation)
    if form.floating:
        return quantize_fp8_per_channel(w_NK)
    zero: tuple[Tensor, ...] = ()
    if form.grid is not None:
        q_NK, scale, *zero_points = quantize_weight_grid(w_NK, form.bits, form.group or 0, form.grid)
        zero = tuple(zero_points)
    elif form.group is None:
        q_NK, scale = quantize_per_channel(w_NK, form.bits)
    else:
        q_NK, scale = quantize_per_group(w_NK, form.bits, form.group)
    return (pack_int4(q_NK) if form.nibbles else q_NK), scale, *zero


def _values(form: WeightForm, device: torch.device) -> Tensor | None:
    if form.multiplier is None:
        return None
    assert isinstance(form.multiplier, Multiplier)
    return form.multiplier.values.to(device)


def quantize_input(
    x: Tensor,
    scheme: QuantScheme,
    multiplier: Tensor | None = None,
    rotation: int = 1,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x [..., K] -> (integers or e4m3 [..., K], fp32 scales [..., 1] or [..., blocks]), by the dialect's ops.

    `multiplier` and `rotation` are those of ops/rotate.py; `scale` ([], [1], or [S] for x [..., S, K]) is
    calibration's, where ranges are static.
    """
    if scheme.floating:
        return QUANTIZE_FP8_PER_TOKEN.overload(x)
    if scale is not None:
        if rotation > 1 or multiplier is not None:
            x = ROTATE.overload(x, multiplier, rotation)
        return QUANTIZE_STATIC.overload(x, scale, scheme.input_bits)
    if rotation > 1 or multiplier is not None:
        return ROTATE_QUANTIZE.overload(x, multiplier, rotation, scheme.input_bits, scheme.block or 0)
    if scheme.block is not None:
        return QUANTIZE_PER_BLOCK.overload(x, scheme.input_bits, scheme.block)
    return QUANTIZE_PER_TOKEN.overload(x, scheme.input_bits)


def linear_in_scheme(
    scheme: QuantScheme,
    x: Tensor,
    x_q: Tensor,
    x_scale: Tensor,
    stored: Stored,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The linear of a scheme over what `quantize_input` (of x) and `quantize_weight` made -> [..., N]."""
    (weight, scale, *zero), branch = split_branch(stored, scheme.weight_form)
    four = scheme.block is not None and scheme.input_bits == 4
    packed = PACK_INT4.overload(x_q) if four else x_q
    last = torch.float32 if branch else out_dtype
    depth = (x_q.shape[-1],) if four else ()
    dtype = torch.float32 if zero else last
    y = linear_of(scheme).overload(packed, x_scale, weight, scale, bias, dtype, *depth)
    if zero:
        y = ADD_ZERO_POINT.overload(y, x_q, x_scale, scale, zero[0], last)
    return ADD_LOW_RANK.overload(y, x, *branch, out_dtype) if branch else y


def dequantize_weight(stored: Stored, depth: int, form: WeightForm, dtype: torch.dtype) -> Tensor:
    """What `quantize_weight` stored of a weight of K = `depth` -> the weight [N, K] in `dtype`, transformed back."""
    stored, branch = split_branch(stored, form)
    whole, scale, *zero = stored
    exact = dtype if form.rotation == 1 and form.multiplier is None and not branch else torch.float32
    q_NK = unpack_int4(whole, depth) if form.nibbles else whole
    if zero:
        w_NK = dequantize_weight_grid(q_NK, scale, zero[0], form.group or 0, exact)
    elif form.group is None:
        w_NK = dequantize_per_channel(q_NK, scale, exact)
    else:
        w_NK = dequantize_per_group(q_NK, scale, form.group, exact)
    if form.rotation > 1:
        w_NK = transform_weight(
            w_NK, None, form.rotation
        )  # the matrix is symmetric and orthogonal: its own inverse
    if form.multiplier is not None:
        values = _values(form, w_NK.device)
        assert values is not None
        w_NK = w_NK * values
    if branch:
        down, up = branch
        with without_autocast(w_NK):
            w_NK = w_NK + up.to(torch.float32) @ down.to(torch.float32)
    return w_NK.to(dtype)


def split_branch(stored: Stored, form: WeightForm) -> tuple[Stored, Stored]:
    """(integers with scales and zero points, down and up of the low-rank branch or nothing)."""
    end = len(stored) - (2 if form.rank else 0)
    return stored[:end], stored[end:]


def join_weights(parts: Sequence[Stored]) -> Stored:
    """Stored weights [N_i, ...] -> one stored weight [sum of N_i, ...]."""
    whole, *rest = zip(*parts, strict=True)
    return torch.cat(whole), *(torch.cat(vectors, dim=-1) for vectors in rest)


def split_weight(stored: Stored, count: int) -> list[Stored]:
    """The inverse of `join_weights` for `count` weights of one shape."""
    whole, *rest = stored
    columns = (vectors.chunk(count, dim=-1) for vectors in rest)
    return list(zip(whole.chunk(count), *columns, strict=True))


def name_of(scheme: QuantScheme) -> Tensor:
    """A scheme's name as a state dict holds it: uint8 [characters]."""
    return torch.tensor(list(str(scheme).encode()), dtype=torch.uint8)


def why_other_weight(name: Tensor | None, scheme: QuantScheme, *, scaled: bool = False) -> str | None:
    """Why a weight that was saved with this name is not one of `scheme`; None if it is, or was saved without.

    `scaled`: an input scale of calibration was saved beside it, which has to be one of `scheme` too.
    """
    if name is None:
        return None
    if name.dtype != torch.uint8 or name.dim() != 1 or name.device.type == "meta":
        return f"scheme: a name in uint8 expected, got {name.dtype} {tuple(name.shape)} on {name.device}"
    told = bytes(name.tolist()).decode("ascii", "replace")
    try:
        saved = QuantScheme.parse(told)
    except SchemeError as error:
        return f"scheme: {error}"
    if scaled and (saved.input_range, saved.input_bits) != (scheme.input_range, scheme.input_bits):
        return (
            f"scheme: the saved input scale is of {told}, this layer's of {scheme}; quantize it by the recipe that was "
            "saved"
        )
    if saved.weight_form == scheme.weight_form:
        return None
    return f"scheme: the saved weight is of {told}, this layer of {scheme}; quantize it as the saved one was"
