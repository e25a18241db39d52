"""`linear_w8a8_persistent` with its tiles read by the tensor memory accelerator of sm_90 and sm_100.

A descriptor of x and one of w, made by each program at its start, replace a pointer for each element: loads take one
thread and no registers, and what lies past M, N or K arrives as zeros, so nothing is masked and no K is ragged. Triton
keeps descriptors in memory that the caller allocates for a launch: `launch` does so here, Inductor itself (but see
`inductor_compat.why_no_descriptors`).
A candidate for timing, as `linear_w8a8_persistent` is.

Layouts: x_MK int8 row-major, w_NK int8 row-major, s_M and s_N fp32, bias_N any float dtype, y_MN the output dtype.
"""

# Triton types a descriptor's sizes and offsets as tensors; its compiler takes constants and integers.
# pyright: reportArgumentType=false
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from viditq_fx.ops.linear import LINEAR_W8A7, LINEAR_W8A8
from viditq_fx.triton_templates import linear_w8a8_persistent
from viditq_fx.triton_templates.base import (
    DESCRIPTOR_ALIGNMENT,
    GemmConfig,
    KernelTemplate,
    LinearProblem,
    shape_constants,
)
from viditq_fx.triton_templates.tiles import grouped_tile, readable


@triton.jit
def linear_w8a8_tma_kernel(
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    INDEX_DTYPE: tl.constexpr,
):
    """y[m, n] = (sum_k x[m, k] * w[n, k]) * s_x[m] * s_w[n] + bias[n], every PROGRAMS-th tile of y a program."""
    x_desc = tl.make_tensor_descriptor(x_ptr, shape=[M, K], strides=[K, 1], block_shape=[BLOCK_M, BLOCK_K])
    w_desc = tl.make_tensor_descriptor(w_ptr, shape=[N, K], strides=[K, 1], block_shape=[BLOCK_N, BLOCK_K])
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for pid in range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        tile_m, tile_n = grouped_tile(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for start in range(0, K, BLOCK_K):
            x_MK = x_desc.load([tile_m * BLOCK_M, start])
            w_NK = w_desc.load([tile_n * BLOCK_N, start])
            acc = tl.dot(x_MK, w_NK.T, acc, out_dtype=tl.int32)

        # A row past the end takes row 0's scale: its result is never stored.
        row_M = readable(tile_m, M, BLOCK_M, EVEN_M)
        col_N = readable(tile_n, N, BLOCK_N, EVEN_N)
        y_acc = (
            acc.to(tl.float32) * tl.load(x_scale_ptr + row_M)[:, None] * tl.load(w_scale_ptr + col_N)[None, :]
        )
        if HAS_BIAS:
            y_acc += tl.load(bias_ptr + col_N).to(tl.float32)[None, :]

        idx_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX_DTYPE)[:, None]
        idx_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX_DTYPE)[None, :]
        mask = (idx_m < M) & (idx_n < N)
        tl.store(y_ptr + idx_m * N + idx_n, y_acc.to(y_ptr.dtype.element_ty), mask=mask)


def constants(config: GemmConfig, rows: int | None, width: int, depth: int) -> dict[str, Any]:
    """The kernel's compile-time constants for one shape."""
    fixed = shape_constants(config, rows, width, depth)
    del fixed["EVEN_K"]
    return fixed


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
    options |= constants(config, None, width, depth) | {"HAS_BIAS": bias is not None}
    options |= {"N": width, "K": depth, "PROGRAMS": programs}
    options["INDEX_DTYPE"] = tl.int32 if y_MN.numel() < 2**31 else tl.int64
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n)

    def memory(size: int, alignment: int, stream: int | None) -> Any:
        return torch.empty(size, dtype=torch.int8, device=x_q.device)

    triton.set_allocator(memory)
    if y_MN.numel():
        linear_w8a8_tma_kernel[(min(tiles, programs),)](
            *(x_MK, s_M, w_q.contiguous(), w_scale, w_scale if bias is None else bias, y_MN),
            rows,
            **options,
        )
    return y_MN.reshape(*x_q.shape[:-1], width)


def _supports(problem: LinearProblem) -> str | None:
    if reason := linear_w8a8_persistent.why_not_persistent(problem):
        return reason
    if not hasattr(tl, "make_tensor_descriptor"):
        return "this Triton has no tensor descriptors"
    if problem.depth % DESCRIPTOR_ALIGNMENT:
        return (
            f"a descriptor's rows begin at multiples of {DESCRIPTOR_ALIGNMENT} bytes; got K={problem.depth}"
        )
    return problem.why_no_descriptors


TEMPLATE = KernelTemplate(
    name="linear_w8a8_tma",
    ops=(LINEAR_W8A8, LINEAR_W8A7),
    source_file=Path(__file__),
    kernel="linear_w8a8_tma_kernel",
    configs=linear_w8a8_persistent.TEMPLATE.configs,
    supports=_supports,
    constants=constants,
    persistent=True,
)
