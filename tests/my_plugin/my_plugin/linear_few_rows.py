"""Integer linear for at most 64 rows: Y[m, n] = s_x[m] * s_w[n] * sum_k Xq[m, k] * Wq[n, k] (+ bias[n]).

One tile of N a program, and all of M in it, so w is read once.
"""

from __future__ import annotations

from pathlib import Path

import triton
import triton.language as tl

from viditq_fx.ops import LINEAR_W8A7, LINEAR_W8A8
from viditq_fx.triton_templates.base import GemmConfig, KernelTemplate, LinearProblem, architecture

MAX_ROWS = 64


@triton.jit
def linear_few_rows_kernel(
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
    tiles_n = tl.cdiv(N, BLOCK_N)
    row_M = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    col_N = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_K = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        inside_K = start + k_K < K
        x_MK = tl.load(
            x_ptr + row_M[:, None] * K + (start + k_K)[None, :],
            mask=(row_M < M)[:, None] & inside_K[None, :],
            other=0,
        )
        w_KN = tl.load(
            w_ptr + col_N[None, :] * K + (start + k_K)[:, None],
            mask=(col_N < N)[None, :] & inside_K[:, None],
            other=0,
        )
        acc = tl.dot(x_MK, w_KN, acc, out_dtype=tl.int32)
    s_M = tl.load(x_scale_ptr + row_M, mask=row_M < M, other=0.0)
    s_N = tl.load(w_scale_ptr + col_N, mask=col_N < N, other=0.0)
    y_acc = acc.to(tl.float32) * s_M[:, None] * s_N[None, :]
    if HAS_BIAS:
        y_acc += tl.load(bias_ptr + col_N, mask=col_N < N, other=0.0).to(tl.float32)[None, :]
    idx_m = row_M.to(INDEX_DTYPE)[:, None]
    idx_n = col_N.to(INDEX_DTYPE)[None, :]
    mask = (idx_m < M) & (idx_n < N)
    tl.store(y_ptr + idx_m * N + idx_n, y_acc.to(y_ptr.dtype.element_ty), mask=mask)


def supports(problem: LinearProblem) -> str | None:
    if architecture(problem.capability) is None:
        return "int8 tensor cores need sm_80 or later"
    if problem.rows > MAX_ROWS:
        return f"{problem.rows} rows; this kernel is for at most {MAX_ROWS}"
    return None


_TILES = (
    GemmConfig(block_m=64, block_n=64, block_k=128, num_stages=3, num_warps=4),
    GemmConfig(block_m=32, block_n=64, block_k=128, num_stages=4, num_warps=4, rate=0.6),
)

TEMPLATE = KernelTemplate(
    name="linear_few_rows",
    ops=(LINEAR_W8A8, LINEAR_W8A7),
    source_file=Path(__file__),
    kernel="linear_few_rows_kernel",
    configs=tuple((arch, shape, _TILES) for arch in (80, 89, 90, 100) for shape in ("skinny", "wide")),
    supports=supports,
)
