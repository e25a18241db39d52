"""Rotate and quantize rows for CUDA: one read of the row, one write of its integers.

    q, s = quantize((x * multiplier) R)        s for each row, or for each group of a row's channels

Meaning: `viditq_fx/ops/rotate.py`. A block of 256 is H16 (x) H16: the row as a matrix of 16 columns is multiplied by
H16, turned within each block, and multiplied again: 8 times less work than by H256, and no matrix of 128 KiB to hold. A
block of 64 is H4 (x) H16, where H4 stands four times on the diagonal of a 16 x 16 matrix.

Precision: entries of H16 and H4 are powers of two, so bf16 and fp16 inputs are multiplied exactly, and summed in fp32.
fp32 values (after the multiplier, after the first product) go in as two bf16 parts, v = high + low with an error below
2^-17 |v|: a thousandth of an integer step, where tf32 would be off by a hundredth.

Shapes: x [M, K] with any row stride; multiplier fp32 [K]; q int8 [M, K]; s fp32 [M, G]. In the kernel a tile is
[T, 16]: BLOCK_M rows of ROW x 16 channels each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from viditq_fx.ops.rotate import check_rotate_quantize
from viditq_fx.scheme import largest_int
from viditq_fx.triton_templates.quantize_rows import WIDEST, as_rows, largest_magnitude, to_integers

WIDEST_BLOCK = 256
"""Two factors of 16."""


@triton.jit
def hadamard_16(BLOCK: tl.constexpr):
    """fp32 [16, 16]: H16, or for a block of 4 four H4 on the diagonal."""
    i = tl.arange(0, 16)
    differ = i[:, None] ^ i[None, :]
    low = tl.where((differ & 3) == 0, -0.5, 0.5)
    if BLOCK == 4:
        return tl.where(differ < 4, low, 0.0)
    return tl.where(differ < 4, -0.5 * low, 0.5 * low)


@triton.jit
def times_hadamard(x_T16, h_16):
    """x h with fp32 sums: exact products for fp16 and bf16, two bf16 parts for fp32."""
    if x_T16.dtype == tl.float32:
        high = x_T16.to(tl.bfloat16)
        low = (x_T16 - high.to(tl.float32)).to(tl.bfloat16)
        h = h_16.to(tl.bfloat16)
        return tl.dot(high, h, tl.dot(low, h))
    return tl.dot(x_T16, h_16.to(x_T16.dtype))


@triton.jit
def turned(x_T16, T: tl.constexpr):
    """Each 16 x 16 square of [T, 16] transposed."""
    squares = tl.reshape(x_T16, (T // 16, 16, 16))
    return tl.reshape(tl.permute(squares, (0, 2, 1)), (T, 16))


@triton.jit
def rotate_quantize_kernel(
    x_ptr,
    multiplier_ptr,
    q_ptr,
    s_ptr,
    M,
    x_stride_m,
    K: tl.constexpr,
    QMAX: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_MULTIPLIER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROW: tl.constexpr,
):
    """q, s = quantize((x * multiplier) R); BLOCK_M rows a program, GROUP channels (a padded row) to a scale."""
    T: tl.constexpr = BLOCK_M * ROW
    t_T = tl.arange(0, T)
    m_T = tl.program_id(0).to(tl.int64) * BLOCK_M + t_T // ROW
    k_T16 = (t_T % ROW)[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = (m_T < M)[:, None] & (k_T16 < K)
    x_T16 = tl.load(x_ptr + m_T[:, None] * x_stride_m + k_T16, mask=inside, other=0.0)
    if HAS_MULTIPLIER:
        x_T16 = x_T16.to(tl.float32) * tl.load(multiplier_ptr + k_T16, mask=k_T16 < K, other=0.0)
    if BLOCK > 1:
        x_T16 = times_hadamard(x_T16, hadamard_16(BLOCK))
    if BLOCK > 16:
        x_T16 = turned(times_hadamard(turned(x_T16, T), hadamard_16(BLOCK // 16)), T)
    value = tl.reshape(x_T16.to(tl.float32), (BLOCK_M, ROW * 16 // GROUP, GROUP))
    amax_MG = largest_magnitude(value, 2)  # pyright: ignore[reportArgumentType]
    inverse_MG = tl.div_rn(tl.full(amax_MG.shape, QMAX, tl.float32), amax_MG)
    q_T16 = tl.reshape(to_integers(value, inverse_MG[:, :, None], QMAX), (T, 16))
    tl.store(q_ptr + m_T[:, None] * K + k_T16, q_T16, mask=inside)
    m_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    g_G = tl.arange(0, ROW * 16 // GROUP)
    s_at = s_ptr + m_M[:, None] * GROUPS + g_G[None, :]
    tl.store(s_at, amax_MG * (1.0 / QMAX), mask=(m_M < M)[:, None] & (g_G < GROUPS)[None, :])


@dataclass(frozen=True, kw_only=True)
class RotateConfig:
    """Tile of one program: `block_m` rows of 16 * `row` channels."""

    block_m: int
    row: int
    num_warps: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.row * 16} w{self.num_warps}"


def config_for(width: int) -> RotateConfig:
    """32 elements a thread, at least the 64 rows of 16 that a warp group multiplies. An estimate until measured."""
    row = max(16, triton.next_power_of_2(-(-width // 16)))
    block_m = max(1, 256 // row)
    return RotateConfig(block_m=block_m, row=row, num_warps=max(4, block_m * row // 64))


def why_not(width: int, block: int, group: int) -> str | None:
    """None where the kernel rotates and quantizes rows of `width` channels so, else the reason why not."""
    if width == 0:
        return "nothing to quantize: K=0"
    if width > WIDEST:
        return f"a row of {width} channels does not fit in registers ({WIDEST} do)"
    if block > WIDEST_BLOCK:
        return f"the kernel rotates blocks of up to {WIDEST_BLOCK}, not {block}"
    if group and (group < 16 or group & (group - 1) or group > WIDEST):
        return f"the kernel has groups of a power of two from 16 on, not {group}"
    return None


def constants(
    config: RotateConfig, width: int, multiplier: bool, block: int, bits: int, group: int
) -> dict[str, Any]:
    """The kernel's compile-time constants. A group that is wider than the padded row is the row."""
    padded = config.row * 16
    return {
        "K": width,
        "QMAX": largest_int(bits),
        "BLOCK": block,
        "GROUP": min(group, padded) if group else padded,
        "GROUPS": -(-width // group) if group else 1,
        "HAS_MULTIPLIER": multiplier,
        "BLOCK_M": config.block_m,
        "ROW": config.row,
    }


def launch(
    x: Tensor, multiplier: Tensor | None, block: int, bits: int, group: int, *, run: Any = None
) -> tuple[Tensor, Tensor]:
    """Arguments and result as of `viditq::rotate_quantize`; `run` wraps the kernel for a compiler that traces the call.

    Raises what the op's reference raises, and ValueError for what `why_not` names.
    """
    check_rotate_quantize(x, multiplier, block, bits, group)
    width = int(x.shape[-1])
    if reason := why_not(width, block, group):
        raise ValueError(f"rotate_quantize: {reason}; viditq::rotate_quantize computes it")
    x_MK, config = as_rows(x), config_for(width)
    fixed = constants(config, width, multiplier is not None, block, bits, group)
    q = x.new_empty(x.shape, dtype=torch.int8)
    s = x.new_empty((*x.shape[:-1], fixed["GROUPS"]), dtype=torch.float32)
    rows = x_MK.shape[0]
    if rows == 0:
        return q, s
    # Not x in the multiplier's place: Inductor would store what a norm makes twice, to pass it twice.
    none = x.new_empty(1, dtype=torch.float32)
    factor = none if multiplier is None else multiplier.to(torch.float32).contiguous()
    (run or (lambda kernel: kernel))(rotate_quantize_kernel)[(triton.cdiv(rows, config.block_m),)](
        x_MK, factor, q, s, rows, x_MK.stride(0), **fixed, num_warps=config.num_warps
    )
    return q, s
