"""`linear_w8a8` with as many programs as processors, each of which walks over tiles: a candidate for timing.

The formula, the operands and the order of tiles are those of `linear_w8a8`. A program that goes on to a further tile
saves the launch of a block, and its loads may begin while the last tile is stored; it pays with registers that live
through the loop. Which wins is for `benchmarks/gpu.py` and `"mode": "max-autotune"` to say: by estimate it loses.

Layouts: x_MK int8 row-major, w_NK int8 row-major, s_M and s_N fp32, bias_N any float dtype, y_MN the output dtype.
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
    LinearProblem,
    shape_constants,
    why_no_int8,
)
from viditq_fx.triton_templates.tiles import grouped_tile, readable


@triton.jit
def linear_w8a8_persistent_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    PROGRAMS: tl.constexpr,
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
    """y[m, n] = (sum_k x[m, k] * w[n, k]) * s_x[m] * s_w[n] + bias[n], every PROGRAMS-th tile of y a program."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for pid in range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        tile_m, tile_n = grouped_tile(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)

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

        y_acc = (
            acc.to(tl.float32) * tl.load(x_scale_ptr + row_M)[:, None] * tl.load(w_scale_ptr + col_N)[None, :]
        )
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
    programs: int | None = None,
) -> Tensor:
    """Run the kernel by itself, without Inductor: shapes as in `viditq::linear_w8a8`. For tests and benchmarks.

    `programs` is the size of the grid; None is one program a processor of x_q's device, which is then a CUDA one.
    """
    x_MK, s_M = x_q.reshape(-1, x_q.shape[-1]).contiguous(), x_scale.reshape(-1).contiguous()
    (rows, depth), width = x_MK.shape, w_q.shape[0]
    y_MN = torch.empty(rows, width, dtype=out_dtype, device=x_q.device)
    programs = programs or torch.cuda.get_device_properties(x_q.device).multi_processor_count
    options: dict[str, Any] = {"num_stages": config.num_stages, "num_warps": config.num_warps}
    options |= shape_constants(config, None, width, depth) | {"HAS_BIAS": bias is not None}
    options |= {"N": width, "K": depth, "PROGRAMS": programs}
    options["INDEX_DTYPE"] = tl.int32 if y_MN.numel() < 2**31 else tl.int64
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n)
    if y_MN.numel():
        linear_w8a8_persistent_kernel[(min(tiles, programs),)](
            *(x_MK, s_M, w_q.contiguous(), w_scale, w_scale if bias is None else bias, y_MN),
            rows,
            **options,
        )
    return y_MN.reshape(*x_q.shape[:-1], width)


def why_not_persistent(problem: LinearProblem) -> str | None:
    """None where walking over tiles may pay, else the reason why not."""
    if reason := why_no_int8(problem):
        return reason
    if problem.capability[0] not in (9, 10):
        return "a program a processor is for sm_90 and sm_100, whose products run while others load"
    if problem.rows <= MIN_ROWS:
        return f"a program a processor is for more than {MIN_ROWS} rows; got {problem.rows}"
    return None


MIN_ROWS = 128
"""With fewer there is a wave of tiles at most, and nothing to walk over."""
# A tenth below those of `linear_w8a8`, so that nothing unmeasured becomes the default.
_RATE = 0.9


def _tile(m: int, n: int, k: int, stages: int, warps: int, rate: float) -> GemmConfig:
    return GemmConfig(block_m=m, block_n=n, block_k=k, num_stages=stages, num_warps=warps, rate=rate * _RATE)


# Larger tiles spill under Triton 3.6 with a gate and a residual fused into the loop.
_TILES = (_tile(128, 128, 128, 4, 8, 0.85), _tile(128, 128, 64, 6, 8, 0.8))

TEMPLATE = KernelTemplate(
    name="linear_w8a8_persistent",
    ops=(LINEAR_W8A8, LINEAR_W8A7),
    source_file=Path(__file__),
    kernel="linear_w8a8_persistent_kernel",
    configs=(
        *((arch, "wide", _TILES) for arch in (90, 100)),
        *((arch, "tall", tuple(replace(tile, group_m=1) for tile in _TILES)) for arch in (90, 100)),
    ),
    supports=why_not_persistent,
    persistent=True,
)
