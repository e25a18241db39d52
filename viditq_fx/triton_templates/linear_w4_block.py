"""4-bit weights and an input with a scale for each block of K, for CUDA (`viditq::linear_w4a8_block`, `linear_w4a4`).

    Y[m, n] = sum_g s_x[m, g] * s_w[g, n] * (sum over k of block g of Xq[m, k] * Wq[n, k]) (+ bias[n])

with blocks of 128, or s_w[n] after the sum. With weight groups of 64 a block is two of them, which share s_x. Weights
stay 4 bits wide in memory, in `linear_w4a4` the input too, and they are widened to int8 in registers. Byte j of a row
holds k = j low and k = j + HALF high (`ops/pack.py`): a tile of bytes is two tiles of K, the low one of x goes with
the low one of w, and nothing is interleaved:

    low = byte << 4        high = byte & -16        both int8, and 16 times the integer: one step each, not two

so sums come 16 times (256 times, with both operands packed) too large, which one exact product at the end undoes. The
largest of a block, 127 * 8 * 16 * 128 or 7 * 8 * 256 * 128, is below 2^22.

The arithmetic is int8 (IMMA on sm_80 and sm_89, IGMMA on sm_90, IMMA or tcgen05 on sm_100), for 4-bit inputs too:
Triton has no int4 product, and tensor cores from sm_90 on have none. So 4-bit inputs save memory and traffic, and no
products. Each sum of a tile is exact in int32; tiles are scaled and added in fp32.

Layouts: x_MK int8 or x uint8 [M, HALF], w uint8 [N, HALF], all row-major; s_MG, s_GN or s_N fp32, bias_N any float
dtype.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from viditq_fx.ops.base import QuantOp
from viditq_fx.ops.linear_w4_block import LINEAR_W4A4, LINEAR_W4A8_BLOCK
from viditq_fx.scheme import BLOCK, GROUPS, group_of, half_width
from viditq_fx.triton_templates.base import (
    GemmConfig,
    KernelTemplate,
    LinearProblem,
    shape_constants,
    why_no_int8,
)
from viditq_fx.triton_templates.tiles import grouped_tile, readable


@triton.jit
def linear_w4_block_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    SWAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    INDEX_DTYPE: tl.constexpr,
):
    """y[m, n] = sum_g s_x[m, g] * s_w[g, n] * (sum over k of g of x[m, k] * w[n, k]) + bias[n], one tile a program."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)

    # A row past the end reads row 0 instead: no mask in the loop, and its result is never stored.
    row_M = readable(tile_m, M, BLOCK_M, EVEN_M)
    col_N = readable(tile_n, N, BLOCK_N, EVEN_N)
    k_K = tl.arange(0, BLOCK_K)
    last = (
        K - 1
    ) // BLOCK  # not annotated as constexpr: Triton 3.6 refuses what Inductor defines in the body
    x_row = HALF if PACKED else K
    s_at = x_scale_ptr + row_M * (last + 1)
    # SWAP computes the transpose, so that the widened weight is the operand that wgmma takes from registers.
    if SWAP:
        x_at = x_ptr + row_M[None, :].to(tl.int64) * x_row + k_K[:, None]
        w_at = w_ptr + col_N[:, None].to(tl.int64) * HALF + k_K[None, :]
        k_of_x = k_K[:, None]
        zero = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
        y_acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        x_at = x_ptr + row_M[:, None].to(tl.int64) * x_row + k_K[None, :]
        w_at = w_ptr + col_N[None, :].to(tl.int64) * HALF + k_K[:, None]
        k_of_x = k_K[None, :]
        zero = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        y_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # 1.5 * 2^23 as bits: an int32 sum of magnitude below 2^22 added to it reads, as fp32, as 1.5 * 2^23 + sum.
    # One subtraction then converts, where an int-to-float instruction runs at a quarter of the rate.
    zero += 0x4B400000

    for start in range(0, HALF, BLOCK_K):
        b_low = start // BLOCK
        b_high = tl.minimum((HALF + start) // BLOCK, last)  # past the last K all of w is zero
        if PACKED:
            x_bytes = tl.load(x_at).to(tl.int8, bitcast=True)
            x_low = x_bytes << 4
            x_high = x_bytes & -16
        elif EVEN_K:
            x_low = tl.load(x_at)
            x_high = tl.load(x_at + HALF)
        else:
            # A padded K is zeros in w, so x may be anything there but must not be read past its row.
            x_low = tl.load(x_at, mask=k_of_x < K - start, other=0)
            x_high = tl.load(x_at + HALF, mask=k_of_x < K - HALF - start, other=0)
        w_bytes = tl.load(w_at).to(tl.int8, bitcast=True)
        w_low = w_bytes << 4
        w_high = w_bytes & -16
        part = (
            tl.dot(w_low, x_low, zero, out_dtype=tl.int32)
            if SWAP
            else tl.dot(x_low, w_low, zero, out_dtype=tl.int32)
        )
        x_s = tl.load(s_at + b_low)
        part = (part.to(tl.float32, bitcast=True) - 12582912.0) * (x_s[None, :] if SWAP else x_s[:, None])
        if GROUP != 0:
            w_s = tl.load(w_scale_ptr + (start // GROUP) * N + col_N)
            part = part * (w_s[:, None] if SWAP else w_s[None, :])
        y_acc += part
        part = (
            tl.dot(w_high, x_high, zero, out_dtype=tl.int32)
            if SWAP
            else tl.dot(x_high, w_high, zero, out_dtype=tl.int32)
        )
        x_s = tl.load(s_at + b_high)
        part = (part.to(tl.float32, bitcast=True) - 12582912.0) * (x_s[None, :] if SWAP else x_s[:, None])
        if GROUP != 0:
            w_s = tl.load(w_scale_ptr + tl.minimum((HALF + start) // GROUP, (K - 1) // GROUP) * N + col_N)
            part = part * (w_s[:, None] if SWAP else w_s[None, :])
        y_acc += part
        x_at += BLOCK_K
        w_at += BLOCK_K

    if SWAP:
        y_acc = tl.trans(y_acc)
    y_acc = y_acc * (0.00390625 if PACKED else 0.0625)
    if GROUP == 0:
        y_acc = y_acc * tl.load(w_scale_ptr + col_N)[None, :]
    if HAS_BIAS:
        y_acc += tl.load(bias_ptr + col_N).to(tl.float32)[None, :]

    # Computed anew, not kept in registers through the loop.
    idx_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX_DTYPE)[:, None]
    idx_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX_DTYPE)[None, :]
    mask = (idx_m < M) & (idx_n < N)
    tl.store(y_ptr + idx_m * N + idx_n, y_acc.to(y_ptr.dtype.element_ty), mask=mask)


def constants(
    config: GemmConfig, rows: int | None, width: int, depth: int, *, packed: bool, group: int = 0
) -> dict[str, Any]:
    """The kernel's compile-time constants for one shape: `packed` of the input; `group` as of linear_w4a8."""
    half = half_width(depth)
    assert half % config.block_k == 0, f"config {config} does not divide half of K = {depth}"
    assert group == 0 or group % config.block_k == 0, f"config {config} has tiles in two groups of {group}"
    fixed = shape_constants(config, rows, width, depth)
    fixed |= {
        "K": depth,
        "HALF": half,
        "BLOCK": BLOCK,
        "GROUP": group,
        "PACKED": packed,
        "SWAP": config.swap,
    }
    return fixed | {"EVEN_K": depth == 2 * half}


def launch(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    depth: int | None = None,
    *,
    config: GemmConfig,
) -> Tensor:
    """Run the kernel by itself, without Inductor: arguments as of `linear_w4a8_block`, with `depth` of `linear_w4a4`.

    For tests and benchmarks.
    """
    x_2d, s_MG = (
        x_q.reshape(-1, x_q.shape[-1]).contiguous(),
        x_scale.reshape(-1, x_scale.shape[-1]).contiguous(),
    )
    rows, width, packed = x_2d.shape[0], w_q.shape[0], depth is not None
    depth = x_2d.shape[1] if depth is None else depth
    y_MN = torch.empty(rows, width, dtype=out_dtype, device=x_q.device)
    options: dict[str, Any] = {"num_stages": config.num_stages, "num_warps": config.num_warps}
    group = group_of(w_scale.shape[0], depth) if w_scale.dim() == 2 else 0
    assert group is not None, f"no groups of K = {depth} have so many scales"
    options |= constants(config, None, width, depth, packed=packed, group=group)
    options |= {"N": width, "HAS_BIAS": bias is not None}
    options["INDEX_DTYPE"] = tl.int32 if y_MN.numel() < 2**31 else tl.int64
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n),)
    if y_MN.numel():
        linear_w4_block_kernel[grid](
            *(x_2d, s_MG, w_q.contiguous(), w_scale.contiguous(), w_scale if bias is None else bias, y_MN),
            rows,
            **options,
        )
    return y_MN.reshape(*x_q.shape[:-1], width)


def _fits(config: GemmConfig, problem: LinearProblem) -> bool:
    """Whether tiles divide half of K, so that w needs no mask and no tile lies in two blocks."""
    return half_width(problem.depth) % config.block_k == 0


def _supports(problem: LinearProblem, group: int | None) -> str | None:
    if problem.group != group:
        kind = f"groups of {group}" if group else "whole output channels"
        return f"it is for weights with scales of {kind}"
    return why_no_int8(problem)


def _tile(m: int, n: int, k: int, stages: int, warps: int, rate: float, swap: bool = False) -> GemmConfig:
    return GemmConfig(
        block_m=m, block_n=n, block_k=k, num_stages=stages, num_warps=warps, swap=swap, rate=rate
    )


# block_k counts bytes of w. Where it is 128 a block is scaled once, where it is 64 twice: it has to be 64 where half of
# K is no multiple of 128. Estimates until `benchmarks/gpu.py` has measured them; none spills (tests). Wide tiles of
# sm_90 are not swapped, as those of linear_w4a8 are: a thread's columns would be tokens then, and each has a scale in a
# register (assembled 128x128x64: 255 registers and spills, where 184 do). On sm_80 and sm_89 tiles wider than 64x128
# spill for one of the four forms, on sm_100 16x128 does.
_SKINNY = (_tile(16, 64, 64, 4, 4, 0.25), _tile(16, 128, 64, 4, 4, 0.3), _tile(32, 64, 64, 4, 4, 0.4))
_SKINNY_SWAPPED = tuple(
    _tile(*tile, swap=True)
    for tile in ((16, 64, 64, 4, 4, 0.25), (16, 128, 64, 4, 4, 0.3), (32, 128, 64, 4, 4, 0.4))
)
_NARROW = (_tile(64, 128, 64, 4, 8, 1.0), _tile(64, 64, 64, 4, 4, 0.7))
_WIDE = {
    80: _NARROW,
    89: _NARROW,
    90: (
        _tile(128, 128, 128, 3, 8, 1.0),
        _tile(128, 128, 64, 4, 8, 0.9),
        _tile(64, 128, 64, 4, 4, 0.7),
        _tile(64, 64, 64, 4, 4, 0.5, swap=True),
    ),
    100: (
        _tile(64, 256, 64, 3, 8, 1.0),
        _tile(64, 128, 64, 4, 8, 0.7),
        _tile(64, 64, 64, 4, 4, 0.5, swap=True),
    ),
}


def _template(op: QuantOp, packed: bool, group: int | None) -> KernelTemplate:
    # With weight groups too, 16x64 spills four times on sm_80.
    skinny = {80: _SKINNY[1 if group else 0 :], 89: _SKINNY, 90: _SKINNY_SWAPPED, 100: _SKINNY_SWAPPED[::2]}
    deepest = group or BLOCK  # no tile lies in two groups
    wide = {arch: tuple(c for c in configs if c.block_k <= deepest) for arch, configs in _WIDE.items()}
    if group == 64:  # its 64x256 spills under Triton 3.6
        wide[100] = wide[100][1:]
    return KernelTemplate(
        name=op.name + (f"_g{group}" if group else ""),
        ops=(op,),
        source_file=Path(__file__),
        kernel="linear_w4_block_kernel",
        configs=(
            *((arch, "skinny", configs) for arch, configs in skinny.items()),
            *((arch, "wide", configs) for arch, configs in wide.items()),
        ),
        supports=partial(_supports, group=group),
        constants=partial(constants, packed=packed, group=group or 0),
        depth_of="argument" if packed else "x",
        fits=_fits,
    )


W4A8_BLOCK = tuple(_template(LINEAR_W4A8_BLOCK, False, group) for group in (None, *GROUPS))
W4A4 = tuple(_template(LINEAR_W4A4, True, group) for group in (None, *GROUPS))
"""For scales of whole output channels, of groups of 128 and of groups of 64."""
TEMPLATES = (*W4A8_BLOCK, *W4A4)
