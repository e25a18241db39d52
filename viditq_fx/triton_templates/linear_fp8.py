"""Linear in e4m3 for CUDA (sm_89 on): Y[m, n] = s_x[m] * s_w[n] * sum_k Xq[m, k] * Wq[n, k] (+ bias[n]).

Products and sums are fp32 on the fp8 tensor cores. Those of sm_90 keep some 22 bits while they add, so what they made
of each tile of K is added to a sum in ordinary fp32 registers. Scales and bias follow in fp32 in the same kernel,
then whatever Inductor fuses behind it, then the one cast at the store.

Layouts: x_MK e4m3 row-major, w_NK e4m3 row-major, s_M and s_N fp32, bias_N any float dtype, y_MN the output dtype.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from viditq_fx.ops.fp8 import LINEAR_W8A8_FP8, MIN_CAPABILITY
from viditq_fx.triton_templates.base import (
    GemmConfig,
    KernelTemplate,
    LinearProblem,
    shape_constants,
    why_no_gemm,
)
from viditq_fx.triton_templates.tiles import grouped_tile, readable


@triton.jit
def linear_w8a8_fp8_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
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
    # SWAP computes the transpose: wgmma wants 64 rows of its first operand, and there may be few of x.
    if SWAP:
        x_at = x_ptr + row_M[None, :].to(tl.int64) * K + k_K[:, None]
        w_at = w_ptr + col_N[:, None].to(tl.int64) * K + k_K[None, :]
        k_of_x = k_K[:, None]
        k_of_w = k_K[None, :]
        y_acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        x_at = x_ptr + row_M[:, None].to(tl.int64) * K + k_K[None, :]
        w_at = w_ptr + col_N[None, :].to(tl.int64) * K + k_K[:, None]
        k_of_x = k_K[None, :]
        k_of_w = k_K[:, None]
        y_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=k_of_x < K - start, other=0.0)
            w = tl.load(w_at, mask=k_of_w < K - start, other=0.0)
        first, second = (w, x) if SWAP else (x, w)
        y_acc = tl.dot(first, second, y_acc, max_num_imprecise_acc=BLOCK_K)
        x_at += BLOCK_K
        w_at += BLOCK_K

    if SWAP:
        y_acc = tl.trans(y_acc)
    y_acc = y_acc * tl.load(x_scale_ptr + row_M)[:, None] * tl.load(w_scale_ptr + col_N)[None, :]
    if HAS_BIAS:
        y_acc += tl.load(bias_ptr + col_N).to(tl.float32)[None, :]

    # Computed anew, not kept in registers through the loop.
    idx_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX_DTYPE)[:, None]
    idx_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX_DTYPE)[None, :]
    mask = (idx_m < M) & (idx_n < N)
    tl.store(y_ptr + idx_m * N + idx_n, y_acc.to(y_ptr.dtype.element_ty), mask=mask)


def constants(config: GemmConfig, rows: int | None, width: int, depth: int) -> dict[str, Any]:
    """The kernel's compile-time constants for one shape."""
    return shape_constants(config, rows, width, depth) | {"SWAP": config.swap}


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
    """Run the kernel by itself, without Inductor: shapes as in `viditq::linear_w8a8_fp8`. For tests and benchmarks."""
    x_MK, s_M = x_q.reshape(-1, x_q.shape[-1]).contiguous(), x_scale.reshape(-1).contiguous()
    (rows, depth), width = x_MK.shape, w_q.shape[0]
    y_MN = torch.empty(rows, width, dtype=out_dtype, device=x_q.device)
    options: dict[str, Any] = {"num_stages": config.num_stages, "num_warps": config.num_warps}
    options |= constants(config, None, width, depth) | {"HAS_BIAS": bias is not None}
    options |= {"N": width, "K": depth}
    options["INDEX_DTYPE"] = tl.int32 if y_MN.numel() < 2**31 else tl.int64
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n),)
    if y_MN.numel():
        linear_w8a8_fp8_kernel[grid](
            *(x_MK, s_M, w_q.contiguous(), w_scale, w_scale if bias is None else bias, y_MN),
            rows,
            **options,
        )
    return y_MN.reshape(*x_q.shape[:-1], width)


def _supports(problem: LinearProblem) -> str | None:
    if problem.capability < MIN_CAPABILITY:
        major, minor = problem.capability
        return f"fp8 tensor cores need sm_89 or later; the device is sm_{major}{minor}"
    return why_no_gemm(problem)


# Estimates until `benchmarks/gpu.py` has measured them; none spills under Triton 3.6 or 3.9 (tests). 128x256 does on
# sm_90 and sm_100: the sum in ordinary registers is kept beside the tensor cores'.
_SKINNY = (
    GemmConfig(block_m=16, block_n=64, block_k=128, num_stages=4, num_warps=4, rate=0.25),
    GemmConfig(block_m=16, block_n=128, block_k=128, num_stages=4, num_warps=4, rate=0.3),
    GemmConfig(block_m=32, block_n=64, block_k=128, num_stages=4, num_warps=4, rate=0.4),
)
_SKINNY_SWAPPED = tuple(replace(config, swap=True) for config in _SKINNY)
_ADA = (
    GemmConfig(block_m=128, block_n=128, block_k=128, num_stages=3, num_warps=8, rate=1.0),
    GemmConfig(block_m=128, block_n=128, block_k=64, num_stages=4, num_warps=8, rate=0.95),
    GemmConfig(block_m=64, block_n=128, block_k=128, num_stages=3, num_warps=4, rate=0.7),
    GemmConfig(block_m=64, block_n=64, block_k=128, num_stages=4, num_warps=4, rate=0.5),
)
_HOPPER = (
    GemmConfig(block_m=128, block_n=128, block_k=128, num_stages=4, num_warps=8, rate=1.0),
    # Not deeper: at 128 it spills where K is ragged.
    GemmConfig(block_m=256, block_n=128, block_k=64, num_stages=4, num_warps=8, rate=0.95),
    GemmConfig(block_m=64, block_n=128, block_k=128, num_stages=4, num_warps=4, rate=0.6),
    GemmConfig(block_m=64, block_n=64, block_k=128, num_stages=4, num_warps=4, rate=0.4),
)
_BLACKWELL = (
    GemmConfig(block_m=256, block_n=128, block_k=128, num_stages=3, num_warps=8, rate=1.0),
    GemmConfig(block_m=128, block_n=128, block_k=128, num_stages=4, num_warps=8, rate=0.85),
    GemmConfig(block_m=64, block_n=128, block_k=128, num_stages=4, num_warps=4, rate=0.6),
    GemmConfig(block_m=64, block_n=64, block_k=128, num_stages=4, num_warps=4, rate=0.4),
)

TEMPLATE = KernelTemplate(
    name="linear_w8a8_fp8",
    ops=(LINEAR_W8A8_FP8,),
    source_file=Path(__file__),
    kernel="linear_w8a8_fp8_kernel",
    configs=(
        (89, "skinny", _SKINNY),
        (90, "skinny", _SKINNY_SWAPPED),
        (100, "skinny", _SKINNY_SWAPPED),
        (89, "wide", _ADA),
        (90, "wide", _HOPPER),
        (100, "wide", _BLACKWELL),
    ),
    supports=_supports,
    constants=constants,
)
