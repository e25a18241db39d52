"""Integer linear for CUDA: Y[m, n] = s_x[m] * s_w[n] * sum_k Xq[m, k] * Wq[n, k] (+ bias[n]).

The sum is exact in int32 on the integer tensor cores; scales and bias are applied in fp32 in the same
kernel, and whatever Inductor fuses behind it (GELU, gate, residual, a further quantize) follows
before the one cast at the store.

Layouts: x_MK int8 row-major, w_NK int8 row-major (both operands are contiguous along K, as integer
wgmma wants them), s_M and s_N fp32, bias_N any float dtype, y_MN the output dtype.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from viditq_fx.ops.linear import LINEAR_W8A7, LINEAR_W8A8
from viditq_fx.triton_templates.base import (
    GemmConfig,
    KernelTemplate,
    shape_constants,
    why_no_int8,
)
from viditq_fx.triton_templates.tiles import grouped_tile, readable


@triton.jit
def linear_w8a8_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
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
    x_ptr_MK = x_ptr + row_M[:, None].to(tl.int64) * K + k_K[None, :]
    w_ptr_KN = w_ptr + col_N[None, :].to(tl.int64) * K + k_K[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x_MK = tl.load(x_ptr_MK)
            w_KN = tl.load(w_ptr_KN)
        else:
            x_MK = tl.load(x_ptr_MK, mask=k_K[None, :] < K - start, other=0)
            w_KN = tl.load(w_ptr_KN, mask=k_K[:, None] < K - start, other=0)
        acc = tl.dot(x_MK, w_KN, acc, out_dtype=tl.int32)
        x_ptr_MK += BLOCK_K
        w_ptr_KN += BLOCK_K

    y_acc = acc.to(tl.float32) * tl.load(x_scale_ptr + row_M)[:, None] * tl.load(w_scale_ptr + col_N)[None, :]
    if HAS_BIAS:
        y_acc += tl.load(bias_ptr + col_N).to(tl.float32)[None, :]

    # Computed anew, not kept in registers through the loop.
    idx_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX_DTYPE)[:, None]
    idx_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX_DTYPE)[None, :]
    mask = (idx_m < M) & (idx_n < N)
    tl.store(y_ptr + idx_m * N + idx_n, y_acc.to(y_ptr.dtype.element_ty), mask=mask)


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
    """Run the kernel by itself, without Inductor: shapes as in `viditq::linear_w8a8`.

    For tests and benchmarks; M is dynamic, so one compilation serves every number of rows.
    """
    x_MK, s_M = x_q.reshape(-1, x_q.shape[-1]).contiguous(), x_scale.reshape(-1).contiguous()
    (rows, depth), width = x_MK.shape, w_q.shape[0]
    y_MN = torch.empty(rows, width, dtype=out_dtype, device=x_q.device)
    options: dict[str, Any] = {"num_stages": config.num_stages, "num_warps": config.num_warps}
    options |= shape_constants(config, None, width, depth) | {"HAS_BIAS": bias is not None}
    options |= {"N": width, "K": depth}
    options["INDEX_DTYPE"] = tl.int32 if y_MN.numel() < 2**31 else tl.int64
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n),)
    if y_MN.numel():
        linear_w8a8_kernel[grid](
            *(x_MK, s_M, w_q.contiguous(), w_scale, w_scale if bias is None else bias, y_MN),
            rows,
            **options,
        )
    return y_MN.reshape(*x_q.shape[:-1], width)


# Estimates from tile shapes that peers use, ordered by what their reports say; `benchmarks/gpu.py
# --sweep` measures them. Each fits the architecture's shared memory and spills no register (tested).
_SKINNY = (
    GemmConfig(block_m=16, block_n=64, block_k=128, num_stages=4, num_warps=4, rate=0.25),
    GemmConfig(block_m=16, block_n=128, block_k=128, num_stages=4, num_warps=4, rate=0.3),
    GemmConfig(block_m=32, block_n=64, block_k=128, num_stages=4, num_warps=4, rate=0.4),
)
_AMPERE_AND_ADA = (
    GemmConfig(block_m=128, block_n=128, block_k=128, num_stages=3, num_warps=8, rate=1.0),
    GemmConfig(block_m=128, block_n=128, block_k=64, num_stages=4, num_warps=8, rate=0.95),
    GemmConfig(block_m=64, block_n=256, block_k=64, num_stages=3, num_warps=8, rate=0.85),
    GemmConfig(block_m=64, block_n=128, block_k=128, num_stages=3, num_warps=4, rate=0.7),
    GemmConfig(block_m=64, block_n=64, block_k=128, num_stages=4, num_warps=4, rate=0.5),
)
_HOPPER = (
    # 256x128 takes 80 registers fewer than 128x256, which leaves room for a fused gate and residual.
    GemmConfig(block_m=256, block_n=128, block_k=128, num_stages=3, num_warps=8, rate=1.0),
    GemmConfig(block_m=128, block_n=256, block_k=128, num_stages=3, num_warps=8, rate=0.95),
    GemmConfig(block_m=128, block_n=128, block_k=128, num_stages=4, num_warps=8, rate=0.85),
    GemmConfig(block_m=128, block_n=128, block_k=128, num_stages=4, num_warps=4, rate=0.8),
    GemmConfig(block_m=64, block_n=128, block_k=128, num_stages=4, num_warps=4, rate=0.6),
    GemmConfig(block_m=64, block_n=64, block_k=128, num_stages=5, num_warps=4, rate=0.4),
)
_BLACKWELL = (
    GemmConfig(block_m=256, block_n=128, block_k=128, num_stages=3, num_warps=8, rate=1.0),
    GemmConfig(block_m=128, block_n=128, block_k=128, num_stages=4, num_warps=8, rate=0.85),
    GemmConfig(block_m=64, block_n=128, block_k=128, num_stages=4, num_warps=4, rate=0.5),
)
# Few columns: all of w fits in L2, so tiles of N are walked first (group_m = 1), and a tile of x is read from memory
# once. Tall tiles, because a tile wider than N computes columns that are thrown away.
_TALL = {
    arch: tuple(replace(config, group_m=1) for config in configs)
    for arch, configs in {
        80: (
            GemmConfig(block_m=128, block_n=128, block_k=128, num_stages=3, num_warps=8, rate=1.0),
            GemmConfig(block_m=128, block_n=64, block_k=128, num_stages=4, num_warps=4, rate=0.7),
            GemmConfig(block_m=64, block_n=64, block_k=128, num_stages=4, num_warps=4, rate=0.5),
        ),
        89: (
            GemmConfig(block_m=128, block_n=128, block_k=128, num_stages=3, num_warps=8, rate=1.0),
            GemmConfig(block_m=128, block_n=64, block_k=128, num_stages=3, num_warps=4, rate=0.7),
            GemmConfig(block_m=64, block_n=64, block_k=128, num_stages=4, num_warps=4, rate=0.5),
        ),
        90: (
            GemmConfig(block_m=256, block_n=128, block_k=128, num_stages=3, num_warps=8, rate=1.0),
            GemmConfig(block_m=128, block_n=256, block_k=128, num_stages=3, num_warps=8, rate=0.95),
            GemmConfig(block_m=128, block_n=128, block_k=128, num_stages=4, num_warps=8, rate=0.85),
            GemmConfig(block_m=256, block_n=64, block_k=128, num_stages=4, num_warps=8, rate=0.7),
            GemmConfig(block_m=128, block_n=64, block_k=128, num_stages=4, num_warps=4, rate=0.6),
        ),
        100: (  # 256x128 spills with group_m = 1
            GemmConfig(block_m=128, block_n=128, block_k=128, num_stages=4, num_warps=8, rate=0.85),
            GemmConfig(block_m=128, block_n=64, block_k=128, num_stages=4, num_warps=4, rate=0.5),
        ),
    }.items()
}

TEMPLATE = KernelTemplate(
    name="linear_w8a8",
    ops=(LINEAR_W8A8, LINEAR_W8A7),
    source_file=Path(__file__),
    kernel="linear_w8a8_kernel",
    configs=(
        *((arch, "skinny", _SKINNY) for arch in (80, 89, 90, 100)),
        (80, "wide", _AMPERE_AND_ADA),
        (89, "wide", _AMPERE_AND_ADA),
        (90, "wide", _HOPPER),
        (100, "wide", _BLACKWELL),
        *((arch, "tall", configs) for arch, configs in _TALL.items()),
    ),
    supports=why_no_int8,
)
