"""Integer linear on CUDA without a kernel of our own: cuBLAS int8 GEMM, then scales and bias in fp32.

    Y = cast((Xq Wq^T) * s_x * s_w + bias)

The int32 product goes through memory, so this is the fall-back and the rival in autotuning, not the
first choice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.ops.linear import linear_epilogue

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
