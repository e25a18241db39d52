"""Quantize rows for CUDA with the row in registers: one read of it, one write, whatever stands in front.

    norm_modulate_quantize   LayerNorm or RMSNorm, (affine,) * (offset + scale) + shift
    activation_quantize      an activation, gated or not

Meaning: the ops of the same names (`viditq_fx/ops`). A row is one tile, padded to a power of two; what it is multiplied
or shifted by is read once a row. Inductor makes one kernel of the same chain, so these are for where it is slower
(`benchmarks/gpu_quantize.py`); the rotation, which it cannot fuse, is in `rotate_quantize.py`.

Shapes: x, gate [M, K] with any row stride; scale, shift [B, L, K], M = B * L, strides of 0 where they are broadcast;
weight, bias, multiplier [K]; q int8 [M, K]; s fp32 [M].
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from viditq_fx.ops.activation import ACTIVATIONS
from viditq_fx.ops.norm import NORMS
from viditq_fx.ops.quantize import EPS, check_bits
from viditq_fx.scheme import largest_int
from viditq_fx.triton_templates.base import architecture

WIDEST = 16384
"""Elements of the widest tile: 32 in each of 512 threads, or 16 in each of 1024."""
EPS_BITS = tl.constexpr(struct.unpack("<i", struct.pack("<f", EPS))[0])
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: fp32 has no fraction there, so adding it rounds half to even
SQRT_HALF = tl.constexpr(0.7071067811865476)
GELU_TANH = tl.constexpr(-1.5957691216057308)  # -2 * sqrt(2 / pi)


@triton.jit
def largest_magnitude(value, AXIS: tl.constexpr):
    """max(max|value|, EPS) over an axis; NaN where there is one."""
    # As integers: NaN is above infinity there, which a maximum of floats would lose.
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.maximum(tl.max(bits, AXIS), EPS_BITS).to(tl.float32, bitcast=True)


@triton.jit
def to_integers(value, inverse, QMAX: tl.constexpr):
    """clamp(round_half_even(value * inverse), -QMAX, QMAX), NaN as 0."""
    scaled = value * inverse
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    scaled = tl.minimum(tl.maximum(scaled, -QMAX), QMAX)
    return ((scaled + ROUND) - ROUND).to(tl.int8)


@triton.jit
def _store_rows(value_MK, q_ptr, s_ptr, m_M, k_K, inside_MK, M, K: tl.constexpr, QMAX: tl.constexpr):
    amax_M = largest_magnitude(value_MK, 1)  # pyright: ignore[reportArgumentType]
    inverse_M = tl.div_rn(tl.full(amax_M.shape, QMAX, tl.float32), amax_M)
    q_MK = to_integers(value_MK, inverse_M[:, None], QMAX)
    tl.store(q_ptr + m_M[:, None] * K + k_K[None, :], q_MK, mask=inside_MK)
    tl.store(s_ptr + m_M, amax_M * (1.0 / QMAX), mask=m_M < M)


@triton.jit
def norm_modulate_quantize_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    multiplier_ptr,
    q_ptr,
    s_ptr,
    M,
    L,
    x_stride_m,
    scale_stride_b,
    scale_stride_l,
    shift_stride_b,
    shift_stride_l,
    EPS_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    K: tl.constexpr,
    QMAX: tl.constexpr,
    RMS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_MULTIPLIER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """q, s = quantize((norm(x) * (offset + scale) + shift) * multiplier); BLOCK_M rows a program."""
    m_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k_K = tl.arange(0, BLOCK_K)
    real_K = k_K < K
    inside_MK = (m_M < M)[:, None] & real_K[None, :]
    x_MK = tl.load(x_ptr + m_M[:, None] * x_stride_m + k_K[None, :], mask=inside_MK, other=0.0).to(tl.float32)
    if not RMS:
        mean_M = tl.sum(x_MK, 1) * (1.0 / K)
        mean_M1 = mean_M[:, None]  # pyright: ignore[reportArgumentType]
        x_MK = tl.where(real_K[None, :], x_MK - mean_M1, 0.0)
    inverse_M = tl.rsqrt(tl.sum(x_MK * x_MK, 1) * (1.0 / K) + EPS_NORM)
    value_MK = x_MK * inverse_M[:, None]
    if HAS_WEIGHT:
        value_MK *= tl.load(weight_ptr + k_K, mask=real_K, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        value_MK += tl.load(bias_ptr + k_K, mask=real_K, other=0.0).to(tl.float32)[None, :]
    b_M, l_M = m_M // L, m_M % L
    if HAS_SCALE:
        scale_at = scale_ptr + (b_M * scale_stride_b + l_M * scale_stride_l)[:, None] + k_K[None, :]
        value_MK *= tl.load(scale_at, mask=inside_MK, other=0.0).to(tl.float32) + OFFSET
    if HAS_SHIFT:
        shift_at = shift_ptr + (b_M * shift_stride_b + l_M * shift_stride_l)[:, None] + k_K[None, :]
        value_MK += tl.load(shift_at, mask=inside_MK, other=0.0).to(tl.float32)
    if HAS_MULTIPLIER:
        value_MK *= tl.load(multiplier_ptr + k_K, mask=real_K, other=0.0)[None, :]
    _store_rows(value_MK, q_ptr, s_ptr, m_M, k_K, inside_MK, M, K, QMAX)


@triton.jit
def activation_quantize_kernel(
    x_ptr,
    gate_ptr,
    q_ptr,
    s_ptr,
    M,
    x_stride_m,
    gate_stride_m,
    K: tl.constexpr,
    QMAX: tl.constexpr,
    KIND: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """q, s = quantize(activation(x) * gate); BLOCK_M rows a program."""
    m_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k_K = tl.arange(0, BLOCK_K)
    inside_MK = (m_M < M)[:, None] & (k_K < K)[None, :]
    x_MK = tl.load(x_ptr + m_M[:, None] * x_stride_m + k_K[None, :], mask=inside_MK, other=0.0).to(tl.float32)
    if KIND == "gelu":
        x_MK = 0.5 * x_MK * (1.0 + tl.erf(x_MK * SQRT_HALF))
    elif KIND == "gelu_tanh":  # 0.5 * (1 + tanh(u)) = sigmoid(2 u)
        x_MK = x_MK / (1.0 + tl.exp((x_MK + 0.044715 * x_MK * x_MK * x_MK) * GELU_TANH))
    elif KIND == "silu":
        x_MK = x_MK / (1.0 + tl.exp(-x_MK))
    else:
        tl.static_assert(KIND == "relu" or KIND == "relu_squared")
        x_MK = tl.where(x_MK < 0.0, 0.0, x_MK)  # NaN stays
        if KIND == "relu_squared":
            x_MK = x_MK * x_MK
    if HAS_GATE:
        gate_at = gate_ptr + m_M[:, None] * gate_stride_m + k_K[None, :]
        x_MK = x_MK * tl.load(gate_at, mask=inside_MK, other=0.0).to(tl.float32)
    _store_rows(x_MK, q_ptr, s_ptr, m_M, k_K, inside_MK, M, K, QMAX)


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """Tile of one program: `block_m` whole rows."""

    block_m: int
    block_k: int
    num_warps: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_k} w{self.num_warps}"


def config_for(width: int, arch: int | None = None) -> RowConfig:
    """16 to 32 elements a thread: enough loads in flight, few enough registers. An estimate until measured.

    `arch` as of `base.architecture`. On sm_100, ptxas keeps 512 threads at 64 registers and spills two.
    """
    block_k = triton.next_power_of_2(width)
    block_m = max(1, 2048 // block_k)
    warps = 32 if arch == 100 and block_k == WIDEST else max(4, block_m * block_k // 1024)
    return RowConfig(block_m=block_m, block_k=block_k, num_warps=warps)


def why_not(width: int) -> str | None:
    """None where a row of `width` channels fits in registers, else the reason why not."""
    if width == 0:
        return "nothing to quantize: K=0"
    return None if width <= WIDEST else f"a row of {width} channels does not fit in registers ({WIDEST} do)"


def launch_norm(
    x: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    offset: float,
    shift: Tensor | None,
    bits: int,
    *,
    multiplier: Tensor | None = None,
    run: Any = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as of `viditq::norm_modulate_quantize`; x [..., K] on one device with the rest.

    `multiplier` fp32 [K] is channel balancing without a rotation. `run` wraps the kernel for a compiler that traces the
    call. Raises ValueError for another norm, bits outside 2..8, and a row that does not fit in registers.
    """
    if norm not in NORMS:
        raise ValueError(f"norm_modulate_quantize: norm is one of {NORMS}, not {norm!r}")
    rows = _Rows(x, bits)
    if norm == "rms_norm":
        bias = None  # the reference has none either
    weight, bias, multiplier = (None if v is None else v.contiguous() for v in (weight, bias, multiplier))
    scale, scale_strides = _by_row(scale, x)
    shift, shift_strides = _by_row(shift, x)
    beside = (weight, bias, scale, shift, multiplier)
    length = x.shape[-2] if x.dim() > 1 else 1
    return rows.run(
        norm_modulate_quantize_kernel,
        run,
        before=[rows.x if vector is None else vector for vector in beside],
        after=[rows.count, length, rows.x.stride(0), *scale_strides, *shift_strides],
        EPS_NORM=eps,  # constants: Inductor passes a float as fp64, and all arithmetic would follow
        OFFSET=offset,
        RMS=norm == "rms_norm",
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None,
        HAS_MULTIPLIER=multiplier is not None,
    )


def launch_activation(
    x: Tensor, kind: str, gate: Tensor | None, bits: int, *, run: Any = None
) -> tuple[Tensor, Tensor]:
    """Arguments and result as of `viditq::activation_quantize`. `run` as in `launch_norm`.

    Raises ValueError for another kind, bits outside 2..8, and a row that does not fit in registers.
    """
    if kind not in ACTIVATIONS:
        raise ValueError(f"activation_quantize: kind is one of {tuple(ACTIVATIONS)}, not {kind!r}")
    rows = _Rows(x, bits)
    beside = rows.x if gate is None else as_rows(gate.expand(x.shape))
    return rows.run(
        activation_quantize_kernel,
        run,
        before=[beside],
        after=[rows.count, rows.x.stride(0), beside.stride(0)],
        KIND=kind,
        HAS_GATE=gate is not None,
    )


class _Rows:
    """x as rows, and how a kernel over them is launched."""

    def __init__(self, x: Tensor, bits: int) -> None:
        check_bits(bits)
        reason = why_not(x.shape[-1]) if x.dim() else "a row is the last dimension; got a 0-d tensor"
        if reason:
            raise ValueError(f"quantize: {reason}")
        self.shape, self.x, self.qmax = x.shape, as_rows(x), largest_int(bits)
        self.count, self.width = self.x.shape[0], int(self.x.shape[1])

    def run(
        self, kernel: Any, run: Any, *, before: list[Tensor], after: list[Any], **fixed: Any
    ) -> tuple[Tensor, Tensor]:
        q = self.x.new_empty(self.shape, dtype=torch.int8)
        s = self.x.new_empty((*self.shape[:-1], 1), dtype=torch.float32)
        if self.count == 0:
            return q, s
        on_gpu = self.x.is_cuda
        arch = architecture(torch.cuda.get_device_capability(self.x.device)) if on_gpu else None
        config = config_for(self.width, arch)
        fixed |= {"K": self.width, "QMAX": self.qmax, "BLOCK_M": config.block_m, "BLOCK_K": config.block_k}
        grid = (triton.cdiv(self.count, config.block_m),)
        (run or (lambda plain: plain))(kernel)[grid](
            self.x, *before, q, s, *after, **fixed, num_warps=config.num_warps
        )
        return q, s


def as_rows(x: Tensor) -> Tensor:
    """[..., K] as [M, K] with contiguous channels: a view where that is one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _by_row(vector: Tensor | None, x: Tensor) -> tuple[Tensor | None, tuple[int, int]]:
    """What is broadcast to x [..., L, K] as [B, L, K], and its strides along B and L."""
    if vector is None:
        return None, (0, 0)
    *outer, length, width = x.shape if x.dim() > 1 else (1, *x.shape)
    along = vector.shape[-2] if vector.dim() > 1 else 1
    # Only what is broadcast along L may be copied by the reshape, and that is small.
    full = vector.expand(*outer, along, width)
    if full.stride(-1) != 1:
        full = full.contiguous()
    full = full.reshape(-1, along, width)
    return full, (full.stride(0), full.stride(1) if along == length and length > 1 else 0)
