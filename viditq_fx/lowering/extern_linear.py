"""Linears on CUDA without a kernel of our own: cuBLAS.

    int8    Y = cast((Xq Wq^T) * s_x * s_w + bias)    an int8 GEMM, then scales and bias in fp32
    e4m3    the same in one call of cuBLASLt, with its row-wise scales

The int32 product goes through memory, so the first is the fall-back and the rival in autotuning, not the
first choice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.ops.linear import linear_epilogue
from viditq_fx.triton_templates.base import LinearProblem

MIN_ROWS = 17
"""`torch._int_mm` on CUDA wants more than 16 rows."""
MULTIPLE = 8
"""And multiples of this for K and N."""


def padded_int_mm(x_MK: Tensor, w_NK: Tensor) -> Tensor:
    """int8 [M, K] x int8 [N, K] -> int32 [M, N] by `torch._int_mm`, zero-padded to its limits.

    Zero rows and columns add nothing to the sums, and are cut off again.
    """
    (rows, depth), width = x_MK.shape, w_NK.shape[0]
    if 0 in (rows, depth, width):
        return x_MK.new_zeros((rows, width), dtype=torch.int32)
    pad_k, pad_n, pad_m = -depth % MULTIPLE, -width % MULTIPLE, max(MIN_ROWS - rows, 0)
    if pad_m or pad_k:
        x_MK = F.pad(x_MK, (0, pad_k, 0, pad_m))
    if pad_n or pad_k:
        w_NK = F.pad(w_NK, (0, pad_k, 0, pad_n))
    return torch.ops.aten._int_mm(x_MK.contiguous(), w_NK.t())[:rows, :width]


def viditq_int_mm_linear(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    *bias: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """`viditq::linear_w8a8` on CUDA by cuBLAS; shapes as there, `bias` is absent or one tensor."""
    acc_MN = padded_int_mm(x_q.reshape(-1, x_q.shape[-1]), w_q)
    acc = acc_MN.reshape(*x_q.shape[:-1], w_q.shape[0])
    return linear_epilogue(acc, x_scale, w_scale, bias[0] if bias else None, out_dtype).contiguous()


def why_no_scaled_mm(problem: LinearProblem, bias: torch.dtype | None) -> str | None:
    """What row-wise `torch._scaled_mm` does not compute: the reason, or None. `bias` is its dtype, if there is one."""
    if problem.capability < (9, 0):
        return "row-wise scales of cuBLASLt need sm_90"
    if problem.out_dtype != torch.bfloat16 or bias not in (None, torch.bfloat16):
        return (
            f"row-wise scales of cuBLASLt give bf16, with a bias in bf16; got {problem.out_dtype} and {bias}"
        )
    if problem.depth % 16 or problem.width % 16:
        return f"cuBLASLt wants multiples of 16; got N={problem.width}, K={problem.depth}"
    return None


def viditq_scaled_mm_linear(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    *bias: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """`viditq::linear_w8a8_fp8` by cuBLASLt, without its fast sums; shapes as there, `bias` is absent or one tensor."""
    x_MK, scales = x_q.reshape(-1, x_q.shape[-1]), (x_scale.reshape(-1, 1), w_scale.reshape(1, -1))
    options = {"bias": bias[0] if bias else None, "out_dtype": out_dtype, "use_fast_accum": False}
    y_MN = torch.ops.aten._scaled_mm(x_MK, w_q.t(), *scales, **options)
    return y_MN.reshape(*x_q.shape[:-1], w_q.shape[0])
