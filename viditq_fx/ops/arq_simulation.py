"""A simulation, for comparison alone: ARQ with the scale for each channel that DVD-Quant prints (section 3.3).

    X' = X H        s_j = max_i |X'[i, j]|        L = diag(s)                                          (Eq. 9)
    Y  = Q(X' L^-1) L BGR(W H)^T                                                                       (Eq. 10)

L stands inside the sum over K, which no integer GEMM can take it out of: this computes in floating point, is no op, and
no scheme names it. What runs on integers is the block-wise form, `linear_w4a8_block` and `linear_w4a4`. The paper
leaves Q open: over the fixed range [-1, 1] that X' L^-1 has by then, or with a scale for each token as well.

s is of all tokens of the live tensor, so one token with NaN or infinity makes the whole result NaN, where
a scale for each token spoils that token alone.

Shapes: x [..., K], its rows i over all leading axes together; w [N, K]; s_K fp32 [K]; Y fp32 [..., N].
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.ops.grid import dequantize_weight_grid, quantize_weight_grid
from viditq_fx.ops.quantize import EPS, check_bits, quantize_per_token
from viditq_fx.ops.rotate import rotate, transform_weight
from viditq_fx.scheme import largest_int

Levels = Literal["fixed", "token"]


def simulate_printed_arq(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    block: int,
    bits: int = 4,
    weight_bits: int | None = 4,
    levels: Levels = "fixed",
) -> Tensor:
    """Simulate Eq. 10 in fp32: x [..., K], w [N, K] -> Y [..., N].

    block: of the rotation H; 1 is none.
    bits: of Q, symmetric, 2 to 8.
    weight_bits: of BGR's grid for each output channel; None leaves the weight in fp32.
    levels: "fixed", Q(v) = round(qmax v) / qmax; "token", Q with a scale for each row of X' L^-1.

    Raises ValueError for other levels, other bits, and as `rotate` and `quantize_weight_grid` do.
    """
    moved_NK = transform_weight(w, None, block)
    if weight_bits is not None:
        stored = quantize_weight_grid(moved_NK, weight_bits, 0, "bgr")
        moved_NK = dequantize_weight_grid(*stored, 0, torch.float32)
    return F.linear(
        simulate_printed_input(x, block=block, bits=bits, levels=levels),
        moved_NK,
        None if bias is None else bias.to(torch.float32),
    )


def simulate_printed_input(x: Tensor, *, block: int, bits: int, levels: Levels = "fixed") -> Tensor:
    """Simulate Q(X' L^-1) L, the input of Eq. 10 as its sum reads it: x [..., K] -> fp32 [..., K].

    Raises ValueError as `simulate_printed_arq`.
    """
    if levels not in get_args(Levels):
        raise ValueError(f"simulate_printed_arq: levels={levels!r}; choose one of {get_args(Levels)}")
    check_bits(bits)
    rotated = rotate(x, None, block)
    if rotated.numel() == 0:
        return rotated
    s_K = rotated.reshape(-1, rotated.shape[-1]).abs().amax(dim=0).clamp(min=EPS)
    even = rotated / s_K
    if levels == "token":
        q, scale = quantize_per_token(even, bits)
        return q.to(torch.float32) * scale * s_K
    top = largest_int(bits)
    return torch.round(even * top) / top * s_K
