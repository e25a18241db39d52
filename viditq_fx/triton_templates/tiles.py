"""What the GEMM kernels share: which tile of y a program computes, and the rows or columns of it.

A kernel calls these like any function. Where Inductor splices a kernel's text in, theirs goes along
(`base.helpers_of`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped_tile(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """pid -> (tile of M, tile of N), with GROUP_M tiles of M before the next one of N: their rows of w stay in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    in_group = pid % (GROUP_M * tiles_n)
    group_size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + in_group % group_size, in_group // group_size


@triton.jit
def readable(tile, size, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Indices [BLOCK] of a tile, 0 for those past the end: no load of them needs a mask, and they are never stored."""
    index = tile * BLOCK + tl.arange(0, BLOCK)
    if not EVEN:
        index = tl.where(index < size, index, 0)
    return index
