"""GEMM with 4-bit weights on a CPU: acc[m, n] = sum_k Xq[m, k] * Wq[n, k], exact; or the scaled sum over groups of K.

Our kernel reads the weight as it is stored. Without one (no C++ compiler, another CPU) a few rows of the weight at a
time are widened for an fp32 GEMM of the integers, which is exact too. Either way only 4 bits stay in memory.

Shapes: x_MK int8 [..., K], w uint8 [N, H] as `pack_int4` makes it, scales of w's groups fp32 [G, N] or none, with
G = ceil(K / 128) or ceil(K / 64) (`scheme.group_of`), scales of x's blocks fp32 [..., ceil(K / 128)] or none; result
fp32 [..., N]: without scales the int32 sum, rounded once where it is beyond 2^24.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from viditq_fx.cpu_kernels import int4_gemm
from viditq_fx.ops.base import QuantOp, Sample, register
from viditq_fx.ops.linear_w4a8 import matmul_int4
from viditq_fx.ops.pack import pack_int4
from viditq_fx.scheme import BLOCK, GROUPS, group_shapes, half_width

BLOCK_BYTES = 8 << 20
"""Most memory that widened weights take at a time."""


def int4_unavailable() -> str | None:
    """Why our kernel is not to be chosen here, or None: it is compiled and tried once in a process."""
    return int4_gemm.unavailable() or _wrong()


@lru_cache(maxsize=1)
def _wrong() -> str | None:
    """The largest operands first: a kernel that saturates is wrong on these."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        w = torch.full((11, 700), 7, dtype=torch.int8)
        w[::3, ::5] = -8
        signs = torch.ones(9, 1, dtype=torch.int8)
        signs[::2] = -1
        x, packed = (signs * 127).expand(9, 700).contiguous(), pack_int4(w)
        groups, halves, blocks = torch.ones(6, 11), torch.ones(11, 11), torch.ones(9, 6)
        for scales in (
            (None, None),
            (groups, None),
            (halves, None),
            (None, blocks),
        ):  # integers below 2^24 are exact in fp32 too
            if not torch.equal(int4_gemm.multiply(x, packed, *scales), matmul_int4(x, packed, *scales)):
                return f"our {int4_gemm.kernel_name()} kernel is not exact on this CPU"
    return None


def matmul_s8s4(
    x_MK: Tensor, w_NH: Tensor, scale_GN: Tensor | None, scale_MG: Tensor | None = None
) -> Tensor:
    """The GEMM of this module's formula; `scale_GN` are scales of w's groups, `scale_MG` of x's blocks.

    Raises ValueError for operands that are not int8 and a packed weight of the same K, and for other scales.
    """
    depth, width = x_MK.shape[-1], w_NH.shape[0]
    if x_MK.dtype != torch.int8 or w_NH.dtype != torch.uint8 or w_NH.shape[1] != half_width(depth):
        raise ValueError(
            f"matmul_s8s4: needs int8 [..., K] x uint8 [N, {half_width(depth)}]; got {x_MK.dtype} "
            f"{tuple(x_MK.shape)}, {w_NH.dtype} {tuple(w_NH.shape)}"
        )
    blocks = -(-depth // BLOCK)
    for scale, shapes in (
        (scale_GN, group_shapes(width, depth)),
        (scale_MG, ((*x_MK.shape[:-1], blocks),)),
    ):
        if scale is not None and (tuple(scale.shape) not in shapes or scale.dtype != torch.float32):
            raise ValueError(
                f"matmul_s8s4: scales of K={depth} must be fp32 {' or '.join(map(str, shapes))}; got {scale.dtype} "
                f"{tuple(scale.shape)}"
            )
    if x_MK.numel() == 0 or width == 0:
        return x_MK.new_zeros((*x_MK.shape[:-1], width), dtype=torch.float32)
    x_2d, s_2d = x_MK.reshape(-1, depth), None if scale_MG is None else scale_MG.reshape(-1, blocks)
    if x_MK.device.type != "cpu" or int4_unavailable():
        acc = _in_blocks(x_2d, w_NH, scale_GN, s_2d)
    else:
        acc = int4_gemm.multiply(x_2d, w_NH, scale_GN, s_2d)
    return acc.reshape(*x_MK.shape[:-1], width)


def _in_blocks(x_MK: Tensor, w_NH: Tensor, scale_GN: Tensor | None, scale_MG: Tensor | None) -> Tensor:
    rows = max(1, BLOCK_BYTES // (4 * x_MK.shape[1]))
    parts = range(0, w_NH.shape[0], rows)
    return torch.cat(
        [
            matmul_int4(
                x_MK, w_NH[i : i + rows], None if scale_GN is None else scale_GN[:, i : i + rows], scale_MG
            )
            for i in parts
        ],
        dim=1,
    )


def _samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    for batch, depth, width in (((2, 9), 40, 24), ((17,), 333, 7), ((1,), 1152, 16), ((3,), 1216, 5)):
        x = torch.randint(-127, 128, (*batch, depth), generator=gen, dtype=torch.int8, device=device)
        w = torch.randint(-8, 8, (width, depth), generator=gen, dtype=torch.int8, device=device)
        scale_MG = torch.rand(*batch, -(-depth // BLOCK), generator=gen, device=device)
        label = f"{'x'.join(map(str, batch))}-k{depth}-n{width}"
        yield Sample(label=label, args=(x, pack_int4(w), None))
        yield Sample(label=f"{label}-blocks", args=(x, pack_int4(w), None, scale_MG))
        for group in GROUPS:
            scale_GN = torch.rand(-(-depth // group), width, generator=gen, device=device)
            yield Sample(label=f"{label}-groups{group}", args=(x, pack_int4(w), scale_GN))
            yield Sample(label=f"{label}-groups{group}-blocks", args=(x, pack_int4(w), scale_GN, scale_MG))


MATMUL_S8S4 = register(
    QuantOp(
        name="matmul_s8s4",
        schema="(Tensor x, Tensor w, Tensor? group_scale, Tensor? block_scale=None) -> Tensor",
        reference=matmul_s8s4,
        fake=lambda x, w, *scales: x.new_empty((*x.shape[:-1], w.shape[0]), dtype=torch.float32),
        samples=_samples,
    )
)
