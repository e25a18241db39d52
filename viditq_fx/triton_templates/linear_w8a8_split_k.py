"""Integer linear for few rows and a deep K: several programs share a tile, each adds up a part of K.

    P[s, m, n] = sum over the k of part s of Xq[m, k] * Wq[n, k]          this kernel, int32
    Y[m, n] = s_x[m] * s_w[n] * sum_s P[s, m, n] (+ bias[n])              what Inductor writes behind it

Every sum is int32, so the result is bit for bit that of `linear_w8a8`, in whatever order parts are added, and no
program waits for another: no atomics, no counters, nothing to clear. Adding the parts is a pointwise expression of the
graph, so Inductor fuses it, like any epilogue, with what follows: also with a quantize over rows, which no GEMM's
store can hold.

Layouts: x_MK int8 row-major, w_NK int8 row-major, y_SMN int32, S = split_k.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from viditq_fx.ops.linear import LINEAR_W8A7, LINEAR_W8A8, linear_epilogue
from viditq_fx.triton_templates.base import (
    GemmConfig,
    KernelTemplate,
    LinearProblem,
    architecture,
    estimated_cost,
    shape_constants,
    slice_depth,
    why_no_int8,
)
from viditq_fx.triton_templates.tiles import grouped_tile, readable

MAX_ROWS = 128
"""Beyond this a layer's tiles fill a device, and the sums that go through memory grow with M."""


@triton.jit
def linear_w8a8_split_k_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    SLICE: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    INDEX_DTYPE: tl.constexpr,
):
    """y[s, m, n] = sum over k in [s * SLICE, (s + 1) * SLICE) of x[m, k] * w[n, k], one tile of one s a program."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // (tiles_m * tiles_n)
    pid = tl.program_id(0) % (tiles_m * tiles_n)
    tile_m, tile_n = grouped_tile(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)

    # A row past the end reads row 0 instead: no mask in the loop, and its result is never stored.
    row_M = readable(tile_m, M, BLOCK_M, EVEN_M)
    col_N = readable(tile_n, N, BLOCK_N, EVEN_N)
    begin = part * SLICE
    k_K = tl.arange(0, BLOCK_K)
    x_ptr_MK = x_ptr + row_M[:, None].to(tl.int64) * K + (begin + k_K)[None, :]
    w_ptr_KN = w_ptr + col_N[None, :].to(tl.int64) * K + (begin + k_K)[:, None]

    # Slices are whole tiles of K, so the last ones may be short or empty: an empty one stores zeros.
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(begin, tl.minimum(begin + SLICE, K), BLOCK_K):
        if EVEN_K:
            x_MK = tl.load(x_ptr_MK)
            w_KN = tl.load(w_ptr_KN)
        else:
            x_MK = tl.load(x_ptr_MK, mask=k_K[None, :] < K - start, other=0)
            w_KN = tl.load(w_ptr_KN, mask=k_K[:, None] < K - start, other=0)
        acc = tl.dot(x_MK, w_KN, acc, out_dtype=tl.int32)
        x_ptr_MK += BLOCK_K
        w_ptr_KN += BLOCK_K

    idx_s = part.to(INDEX_DTYPE)
    idx_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX_DTYPE)[:, None]
    idx_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX_DTYPE)[None, :]
    mask = (idx_m < M) & (idx_n < N)
    tl.store(y_ptr + idx_s * M * N + idx_m * N + idx_n, acc, mask=mask)


def constants(config: GemmConfig, rows: int | None, width: int, depth: int) -> dict[str, Any]:
    """The kernel's compile-time constants for one shape."""
    fixed = shape_constants(config, rows, width, depth)
    return fixed | {"SPLIT": config.split_k, "SLICE": slice_depth(config, depth)}


def partial_sums(x_MK: Tensor, w_NK: Tensor, *, config: GemmConfig) -> Tensor:
    """int8 [M, K] x int8 [N, K] -> int32 [split_k, M, N], without Inductor; both contiguous."""
    (rows, depth), width = x_MK.shape, w_NK.shape[0]
    y_SMN = torch.empty(config.split_k, rows, width, dtype=torch.int32, device=x_MK.device)
    options: dict[str, Any] = constants(config, None, width, depth) | {"N": width, "K": depth}
    options |= {"num_stages": config.num_stages, "num_warps": config.num_warps}
    options["INDEX_DTYPE"] = tl.int32 if y_SMN.numel() < 2**31 else tl.int64
    parts = options.pop("SPLIT")
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n) * parts,)
    if y_SMN.numel():
        linear_w8a8_split_k_kernel[grid](x_MK, w_NK, y_SMN, rows, **options)
    return y_SMN


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
    """The kernel, and what Inductor writes behind it by torch; shapes as in `viditq::linear_w8a8`. For tests."""
    x_MK = x_q.reshape(-1, x_q.shape[-1]).contiguous()
    acc_MN = partial_sums(x_MK, w_q.contiguous(), config=config).sum(0, dtype=torch.int32)
    acc = acc_MN.reshape(*x_q.shape[:-1], w_q.shape[0])
    return linear_epilogue(acc, x_scale, w_scale, bias, out_dtype).contiguous()


# ------------------------------------------------------------------------------- when it is chosen

# Of one processor in a microsecond, in products, and of the whole device in bytes: data sheets (dense int8 rate over
# twice the processors; memory). They weigh the second kernel against the waves saved; only its size matters.
_PRODUCTS = {80: 2.9e6, 89: 2.6e6, 90: 7.5e6, 100: 15e6}
_BYTES = {80: 2.0e6, 89: 1.0e6, 90: 4.0e6, 100: 8.0e6}
_LAUNCH = 2.0
"""Microseconds of one more kernel: its launch, and the drain and fill of the device between the two."""
_CLEAR = 1.1
"""A gain of less than a tenth is within the estimate's error, and not worth a second kernel."""


def cost(config: GemmConfig, problem: LinearProblem) -> float:
    """`estimated_cost` with the second kernel: its launch, and the sums written and read again."""
    arch = architecture(problem.capability)
    assert arch is not None, "why_no_int8 declines such a device"
    moved = 2 * 4 * config.split_k * problem.rows * problem.width
    microseconds = _LAUNCH + moved / _BYTES[arch]
    return _CLEAR * (estimated_cost(config, problem) + microseconds * _PRODUCTS[arch] / problem.depth)


def _fits(config: GemmConfig, problem: LinearProblem) -> bool:
    """Whether every program of a tile has some of K to add; the smallest split of each list is for any K."""
    return config.split_k == 2 or (config.split_k - 1) * slice_depth(config, problem.depth) < problem.depth


def _supports(problem: LinearProblem) -> str | None:
    if reason := why_no_int8(problem):
        return reason
    if problem.rows > MAX_ROWS:
        return f"splitting K is for {MAX_ROWS} rows or fewer; got {problem.rows}"
    return None


def _tile(m: int, n: int, k: int, stages: int, warps: int, rate: float) -> GemmConfig:
    return GemmConfig(block_m=m, block_n=n, block_k=k, num_stages=stages, num_warps=warps, rate=rate)


def _each(*tiles: GemmConfig) -> tuple[GemmConfig, ...]:
    """The tiles at every split; more than 8 would read more sums than it saves work."""
    return tuple(replace(tile, split_k=split) for tile in tiles for split in (2, 4, 8))


# Tiles and rates of `linear_w8a8`: it is the same loop. Estimates until `benchmarks/gpu.py` has measured them.
_SKINNY = _each(_tile(16, 128, 128, 4, 4, 0.3), _tile(32, 64, 128, 4, 4, 0.4))
_AMPERE_AND_ADA = _each(_tile(64, 128, 128, 3, 4, 0.7), _tile(64, 64, 128, 4, 4, 0.5))
_HOPPER = _each(
    _tile(64, 128, 128, 4, 4, 0.6), _tile(64, 64, 128, 5, 4, 0.4), _tile(128, 128, 128, 4, 8, 0.85)
)
_BLACKWELL = _each(_tile(64, 128, 128, 4, 4, 0.5), _tile(128, 128, 128, 4, 8, 0.85))

TEMPLATE = KernelTemplate(
    name="linear_w8a8_split_k",
    ops=(LINEAR_W8A8, LINEAR_W8A7),
    source_file=Path(__file__),
    kernel="linear_w8a8_split_k_kernel",
    configs=(
        *((arch, "skinny", _SKINNY) for arch in (80, 89, 90, 100)),
        (80, "wide", _AMPERE_AND_ADA),
        (89, "wide", _AMPERE_AND_ADA),
        (90, "wide", _HOPPER),
        (100, "wide", _BLACKWELL),
    ),
    supports=_supports,
    constants=constants,
    fits=_fits,
    partial_sums=True,
    cost=cost,
)
