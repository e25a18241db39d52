"""Integer linear with 4-bit weights for CUDA: Y[m, n] = s_x[m] * s_w[n] * sum_k Xq[m, k] * Wq[n, k] (+ bias[n]).

With groups:   Y[m, n] = s_x[m] * sum_g s_w[g, n] * (sum over k of group g of Xq[m, k] * Wq[n, k]) (+ bias[n])

Weights stay 4 bits wide in memory and are widened to int8 in registers. Byte j of a row holds weight j low and
weight j + HALF high (`ops/pack.py`), so one tile of bytes is two tiles of K and two dots, and nothing is interleaved:

    low  = (byte << 4) >> 4        high = byte >> 4        (arithmetic shifts of int8 extend the sign)

Sums are exact in int32 on the integer tensor cores; with groups each partial sum is, and they are added in fp32. HALF
is a multiple of 64, so a tile of 64 bytes lies in one group of 64 or 128, low and high; one of 128 bytes only where
128 divides HALF, and in a group of 128.

Layouts: x_MK int8 row-major, w uint8 [N, HALF] row-major, s_M and s_N (or s_GN) fp32, bias_N any float dtype.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from viditq_fx.ops.linear_w4a8 import LINEAR_W4A8
from viditq_fx.scheme import group_of, half_width
from viditq_fx.triton_templates.base import (
    GemmConfig,
    KernelTemplate,
    LinearProblem,
    shape_constants,
    why_no_int8,
)
from viditq_fx.triton_templates.tiles import grouped_tile, readable


@triton.jit
def linear_w4a8_kernel(
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
    GROUP: tl.constexpr,
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
    """y[m, n] = (sum_k x[m, k] * w[n, k]) * s_x[m] * s_w[n] + bias[n], one tile of y a program."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)

    # A row past the end reads row 0 instead: no mask in the loop, and its result is never stored.
    row_M = readable(tile_m, M, BLOCK_M, EVEN_M)
    col_N = readable(tile_n, N, BLOCK_N, EVEN_N)
    k_K = tl.arange(0, BLOCK_K)
    # SWAP computes the transpose, so that the widened weight is the operand that wgmma takes from registers.
    if SWAP:
        x_at = x_ptr + row_M[None, :].to(tl.int64) * K + k_K[:, None]
        w_at = w_ptr + col_N[:, None].to(tl.int64) * HALF + k_K[None, :]
        k_of_x = k_K[:, None]
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
        y_acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        x_at = x_ptr + row_M[:, None].to(tl.int64) * K + k_K[None, :]
        w_at = w_ptr + col_N[None, :].to(tl.int64) * HALF + k_K[:, None]
        k_of_x = k_K[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        y_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if GROUP != 0:
        # 1.5 * 2^23 as bits: an int32 sum of magnitude below 2^22 added to it reads, as fp32, as 1.5 * 2^23 + sum.
        # One subtraction then converts, where an int-to-float instruction runs at a quarter of the rate.
        acc += 0x4B400000

    for start in range(0, HALF, BLOCK_K):
        # A padded K is zeros in w, so x may be anything there but must not be read past its row.
        if EVEN_K:
            x_low = tl.load(x_at)
            x_high = tl.load(x_at + HALF)
        else:
            x_low = tl.load(x_at, mask=k_of_x < K - start, other=0)
            x_high = tl.load(x_at + HALF, mask=k_of_x < K - HALF - start, other=0)
        bytes = tl.load(w_at).to(tl.int8, bitcast=True)
        low = (bytes << 4) >> 4
        high = bytes >> 4
        if GROUP == 0:
            acc = (
                tl.dot(low, x_low, acc, out_dtype=tl.int32)
                if SWAP
                else tl.dot(x_low, low, acc, out_dtype=tl.int32)
            )
            acc = (
                tl.dot(high, x_high, acc, out_dtype=tl.int32)
                if SWAP
                else tl.dot(x_high, high, acc, out_dtype=tl.int32)
            )
        else:
            s_low = tl.load(w_scale_ptr + (start // GROUP) * N + col_N)
            s_high = tl.load(w_scale_ptr + tl.minimum((HALF + start) // GROUP, (K - 1) // GROUP) * N + col_N)
            part = (
                tl.dot(low, x_low, acc, out_dtype=tl.int32)
                if SWAP
                else tl.dot(x_low, low, acc, out_dtype=tl.int32)
            )
            part = part.to(tl.float32, bitcast=True) - 12582912.0
            y_acc += part * (s_low[:, None] if SWAP else s_low[None, :])
            part = (
                tl.dot(high, x_high, acc, out_dtype=tl.int32)
                if SWAP
                else tl.dot(x_high, high, acc, out_dtype=tl.int32)
            )
            part = part.to(tl.float32, bitcast=True) - 12582912.0
            y_acc += part * (s_high[:, None] if SWAP else s_high[None, :])
        x_at += BLOCK_K
        w_at += BLOCK_K

    if GROUP == 0:
        y_acc = acc.to(tl.float32)
    if SWAP:
        y_acc = tl.trans(y_acc)
    y_acc = y_acc * tl.load(x_scale_ptr + row_M)[:, None]
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
    config: GemmConfig, rows: int | None, width: int, depth: int, *, group: int = 0
) -> dict[str, Any]:
    """The kernel's compile-time constants for one shape; `group` is 0 for one scale per output channel."""
    half = half_width(depth)
    assert half % config.block_k == 0, f"config {config} does not divide half of K = {depth}"
    assert group == 0 or group % config.block_k == 0, f"config {config} has tiles in two groups of {group}"
    fixed = shape_constants(config, rows, width, depth)
    return fixed | {"EVEN_K": depth == 2 * half, "HALF": half, "GROUP": group, "SWAP": config.swap}


def launch(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    config: GemmConfig,
) -> Tensor:
    """Run the kernel by itself, without Inductor: shapes as in `viditq::linear_w4a8`. For tests and benchmarks."""
    x_MK, s_M = x_q.reshape(-1, x_q.shape[-1]).contiguous(), x_scale.reshape(-1).contiguous()
    (rows, depth), width = x_MK.shape, w_q.shape[0]
    group = group_of(w_scale.shape[0], depth) if w_scale.dim() == 2 else 0
    assert group is not None, f"no groups of K = {depth} have so many scales"
    y_MN = torch.empty(rows, width, dtype=out_dtype, device=x_q.device)
    options: dict[str, Any] = {"num_stages": config.num_stages, "num_warps": config.num_warps}
    options |= constants(config, None, width, depth, group=group)
    options |= {"N": width, "K": depth, "HAS_BIAS": bias is not None}
    options["INDEX_DTYPE"] = tl.int32 if y_MN.numel() < 2**31 else tl.int64
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n),)
    if y_MN.numel():
        linear_w4a8_kernel[grid](
            *(x_MK, s_M, w_q.contiguous(), w_scale.contiguous(), w_scale if bias is None else bias, y_MN),
            rows,
            **options,
        )
    return y_MN.reshape(*x_q.shape[:-1], width)


def _fits(config: GemmConfig, problem: LinearProblem) -> bool:
    """Whether tiles divide half of K, so that w needs no mask and no tile of a template's lies in two groups."""
    return half_width(problem.depth) % config.block_k == 0


def _supports(problem: LinearProblem, group: int | None) -> str | None:
    if problem.group != group:
        return "it is for scales of " + (f"groups of {group}" if group else "whole output channels")
    return why_no_int8(problem)


def _tile(m: int, n: int, k: int, stages: int, warps: int, rate: float, swap: bool = False) -> GemmConfig:
    return GemmConfig(
        block_m=m, block_n=n, block_k=k, num_stages=stages, num_warps=warps, swap=swap, rate=rate
    )


# block_k counts bytes of w, so a step is twice as deep as that of linear_w8a8. Estimates until `benchmarks/gpu.py`
# has measured them; none spills (tests). On sm_90 every one is swapped: the widened weight goes to wgmma from
# registers, and takes no way through shared memory (64 KiB of it where the plain form takes 80).
_SKINNY = (_tile(16, 64, 64, 4, 4, 0.25), _tile(16, 128, 64, 4, 4, 0.3), _tile(32, 64, 64, 4, 4, 0.4))
_SKINNY_SWAPPED = tuple(
    _tile(*tile, swap=True)
    for tile in ((16, 64, 64, 4, 4, 0.25), (16, 128, 64, 4, 4, 0.3), (32, 128, 64, 4, 4, 0.4))
)
_AMPERE_AND_ADA = (
    _tile(128, 256, 64, 3, 8, 1.0),
    _tile(128, 128, 64, 4, 8, 0.95),
    _tile(64, 256, 64, 3, 8, 0.85),
    _tile(64, 128, 64, 4, 4, 0.7),
    _tile(64, 64, 64, 4, 4, 0.5),
)
_HOPPER = (
    _tile(256, 128, 64, 3, 8, 1.0, swap=True),
    _tile(128, 128, 128, 3, 8, 0.9, swap=True),
    _tile(128, 128, 64, 4, 8, 0.85, swap=True),
    _tile(64, 256, 64, 3, 8, 0.75, swap=True),
    _tile(64, 128, 64, 4, 4, 0.6, swap=True),
    _tile(64, 64, 64, 4, 4, 0.4, swap=True),
)
# Triton 3.6 has no tcgen05 for int8 and 3.9 has: these spill under neither.
_BLACKWELL = (
    _tile(128, 128, 64, 4, 8, 1.0, swap=True),
    _tile(64, 256, 64, 3, 8, 0.9),
    _tile(64, 128, 64, 4, 4, 0.6, swap=True),
)
# Groups keep an fp32 sum beside the int32 one, so their tiles are half as large.
_GROUPED = {
    80: (_tile(64, 256, 64, 3, 8, 1.0), _tile(64, 128, 64, 4, 4, 0.8), _tile(64, 64, 64, 4, 4, 0.6)),
    89: (_tile(128, 128, 64, 4, 8, 1.0), _tile(64, 128, 64, 4, 4, 0.8), _tile(64, 64, 64, 4, 4, 0.6)),
    90: (
        _tile(128, 128, 128, 3, 8, 1.0, swap=True),
        _tile(128, 128, 64, 4, 8, 0.9, swap=True),
        _tile(64, 128, 64, 4, 4, 0.7, swap=True),
        _tile(64, 64, 64, 4, 4, 0.5, swap=True),
    ),
    100: (
        _tile(64, 256, 64, 3, 8, 1.0),
        _tile(64, 128, 64, 4, 8, 0.7, swap=True),
        _tile(64, 64, 64, 4, 4, 0.5, swap=True),
    ),
}

# A group of 64 lies in no deeper tile. On sm_80 its 64x64 spills.
_GROUPS_OF_64 = {
    **{arch: tuple(c for c in wide if c.block_k == 64) for arch, wide in _GROUPED.items()},
    80: (*_GROUPED[80][:2], _tile(32, 128, 64, 4, 4, 0.55)),
}


def _template(group: int | None, wide: dict[int, tuple[GemmConfig, ...]]) -> KernelTemplate:
    skinny = {80: _SKINNY, 89: _SKINNY, 90: _SKINNY_SWAPPED, 100: _SKINNY_SWAPPED}
    return KernelTemplate(
        name="linear_w4a8" + (f"_g{group}" if group else ""),
        ops=(LINEAR_W4A8,),
        source_file=Path(__file__),
        kernel="linear_w4a8_kernel",
        configs=(
            *((arch, "skinny", configs) for arch, configs in skinny.items()),
            *((arch, "wide", configs) for arch, configs in wide.items()),
        ),
        supports=partial(_supports, group=group),
        constants=partial(constants, group=group or 0),
        depth_of="x",
        fits=_fits,
    )


TEMPLATE = _template(None, {80: _AMPERE_AND_ADA, 89: _AMPERE_AND_ADA, 90: _HOPPER, 100: _BLACKWELL})
TEMPLATE_G128, TEMPLATE_G64 = _template(128, _GROUPED), _template(64, _GROUPS_OF_64)
TEMPLATES = (TEMPLATE, TEMPLATE_G128, TEMPLATE_G64)
