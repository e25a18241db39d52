"""Integer GEMM on a CPU, through oneDNN or fp32: acc[m, n] = sum_k (Xu[m, k] - z) * Wq[n, k], exact.

The activation is unsigned: oneDNN runs its fast kernel for u8 x s8 and, on the machines tried, a
reference loop 10,000 times slower for s8 x s8 with this packing. z = 128 shifts 8-bit integers,
z = 64 shifts 7-bit ones. Without VNNI or AMX the CPU adds pairs of products in saturating int16,
which is exact for Xu <= 127 (2 * 127 * 127 < 2^15) and wrong above; `onednn_is_exact` tries it.

Shapes: x_MK uint8 [..., K], w_NK int8 [N, K], result fp32 [..., N] (integers below 2^24 exactly,
larger ones rounded once, as int32 -> fp32 does).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from viditq_fx.ops.base import QuantOp, Sample, register
from viditq_fx.ops.blocked import Layout, blocked_weight, plain_weight
from viditq_fx.ops.linear import exact_int_matmul, linear_epilogue, without_autocast
from viditq_fx.ops.tensor_state import LOCK, TensorState

ZERO_POINTS = {8: 128, 7: 64}
"""Input bits -> the zero point that makes symmetric integers of that width unsigned."""

LAYOUT = Layout(
    name="onednn",
    pack=lambda w_NK: torch.ops.onednn.qlinear_prepack(w_NK, None),  # reads row by row, whatever the strides
    unpack=lambda packed, shape: packed.to_dense().t().contiguous(),
    nbytes=lambda packed: int(torch.ops.mkldnn._nbytes(packed)),
)


def shift_to_u8(q_MK: Tensor, zero_point: int) -> Tensor:
    """int8 [..., K] -> uint8 [..., K] with `zero_point` added; stays fusible with quantize."""
    return (q_MK.to(torch.int32) + zero_point).to(torch.uint8)


def matmul_u8s8(x_MK: Tensor, w_NK: Tensor, zero_point: int) -> Tensor:
    """The GEMM of this module's formula on a CPU; blocks the weight at its first call.

    Raises ValueError for operands that are not uint8 and int8.
    """
    if x_MK.dtype != torch.uint8 or w_NK.dtype != torch.int8:
        raise ValueError(f"matmul_u8s8: needs uint8 x int8; got {x_MK.dtype} x {w_NK.dtype}")
    width = w_NK.shape[0]
    if x_MK.numel() == 0 or width == 0:
        return x_MK.new_zeros((*x_MK.shape[:-1], width), dtype=torch.float32)
    packed = blocked_weight(w_NK, LAYOUT)
    ones, zeros = _unit_scales(width)
    x_2d = x_MK.reshape(-1, x_MK.shape[-1])
    acc = torch.ops.onednn.qlinear_pointwise(
        x_2d, 1.0, zero_point, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return acc.reshape(*x_MK.shape[:-1], width)


@functools.lru_cache(maxsize=64)
def _unit_scales(width: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return (
            torch.ones(width, dtype=torch.float32, device="cpu"),
            torch.zeros(width, dtype=torch.int64, device="cpu"),
        )


def _fake(x_MK: Tensor, w_NK: Tensor, zero_point: int) -> Tensor:
    return x_MK.new_empty((*x_MK.shape[:-1], w_NK.shape[0]), dtype=torch.float32)


_EXACT: dict[int, bool] = {}


def onednn_is_exact(bits: int) -> bool:
    """Whether oneDNN multiplies inputs of this width exactly on this CPU: tried once, not looked up.

    A trial that fails is not remembered: what broke it may be passing.
    """
    if bits not in _EXACT:
        if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
            return False
        try:
            _EXACT[bits] = _multiplies_exactly(ZERO_POINTS[bits])
        except (RuntimeError, NotImplementedError):  # this build's oneDNN has no int8 linear
            return False
    return _EXACT[bits]


def _multiplies_exactly(zero_point: int) -> bool:
    """The operands are the ones that saturate first: all-largest rows against all-largest weights."""
    rows, depth, width = 32, 256, 64
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        signs = torch.ones(rows, 1, dtype=torch.int32)
        signs[::2] = -1
        x = (signs * (zero_point - 1)).expand(rows, depth).to(torch.int8)
        w = torch.full((width, depth), 127, dtype=torch.int8)
        w[::3, ::5] = -127
        got = matmul_u8s8(shift_to_u8(x, zero_point), w, zero_point)
        return torch.equal(got, exact_int_matmul(x, w).to(torch.float32))


def _shift_samples(device: torch.device) -> Iterator[Sample]:
    q = torch.arange(-127, 128, dtype=torch.int8, device=device)
    yield Sample(label="8-bit", args=(q.reshape(5, 51), 128))
    yield Sample(label="7-bit", args=(q[64:-64].clone(), 64))


def _matmul_samples(device: torch.device) -> Iterator[Sample]:
    # 7-bit inputs only: they are exact on every CPU that these samples may run on.
    gen = torch.Generator().manual_seed(0)
    for batch, depth, width in (((2, 9), 40, 24), ((17,), 33, 7), ((1,), 1152, 16)):
        x = torch.randint(1, 128, (*batch, depth), generator=gen, dtype=torch.uint8)
        w = torch.randint(-127, 128, (width, depth), generator=gen, dtype=torch.int8)
        yield Sample(label=f"{'x'.join(map(str, batch))}-k{depth}-n{width}", args=(x, w, 64))


def matmul_f32s8(x_MK: Tensor, w_NK: Tensor) -> Tensor:
    """fp32 [..., K] of integers within +-127 x int8 [N, K] -> fp32 [..., N], exact as `matmul_u8s8` is.

    One fp32 GEMM where the weight itself proves it exact: with |x| <= 127 no partial sum of channel n
    exceeds 127 * sum_k |w[n, k]|, and fp32 adds integers below 2^24 exactly in any order. Else short
    slices of K (see `exact_int_matmul`). The weight is widened at every call: kept, it would take
    four times its memory.
    """
    x_2d, plain = x_MK.reshape(-1, x_MK.shape[-1]), plain_weight(w_NK)
    if _one_gemm_is_exact(w_NK, plain):
        with without_autocast(x_MK):
            acc = x_2d @ plain.to(torch.float32).t()
    else:
        acc = exact_int_matmul(x_2d, plain).to(torch.float32)
    return acc.reshape(*x_MK.shape[:-1], w_NK.shape[0])


# By the weight's identity, as blocked copies are: one look at each weight, at its first call.
_BOUNDED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _one_gemm_is_exact(w_NK: Tensor, plain: Tensor) -> bool:
    with LOCK:
        found = _BOUNDED.get(w_NK)
        if found is None or not found[1].holds(w_NK):
            largest = int(plain.to(torch.int32).abs().sum(dim=1).max()) if w_NK.numel() else 0
            found = _BOUNDED[w_NK] = (127 * largest < 2**24, TensorState.of(w_NK))
        return found[0]


def _fp32_samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    for batch, depth in (((2, 9), 40), ((3,), 2200)):
        x = torch.randint(-127, 128, (*batch, depth), generator=gen, device=device).to(torch.float32)
        w = torch.randint(-127, 128, (24, depth), generator=gen, device=device, dtype=torch.int8)
        yield Sample(label=f"k{depth}", args=(x, w))


def _epilogue_samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    acc = torch.randint(-90000, 90000, (2, 3, 8), generator=gen, device=device, dtype=torch.int32)
    scale_M = torch.rand(2, 3, 1, generator=gen, device=device)
    scale_N = torch.rand(8, generator=gen, device=device)
    yield Sample(label="bias", args=(acc, scale_M, scale_N, torch.ones(8, device=device), torch.bfloat16))
    yield Sample(label="no-w-scale", args=(acc.float(), scale_M, None, None, torch.float32))
    yield Sample(label="no-x-scale", args=(acc.float(), None, scale_N, None, torch.float16))
    yield Sample(label="no-bias", args=(acc.float(), scale_M, scale_N, None, torch.float32))


SHIFT_TO_U8 = register(
    QuantOp(
        name="shift_to_u8",
        schema="(Tensor q, int zero_point) -> Tensor",
        reference=shift_to_u8,
        fake=None,
        samples=_shift_samples,
    )
)
MATMUL_U8S8 = register(
    QuantOp(
        name="matmul_u8s8",
        schema="(Tensor x, Tensor w, int zero_point) -> Tensor",
        reference=matmul_u8s8,
        fake=_fake,
        samples=_matmul_samples,
    )
)
MATMUL_F32S8 = register(
    QuantOp(
        name="matmul_f32s8",
        schema="(Tensor x, Tensor w) -> Tensor",
        reference=matmul_f32s8,
        fake=lambda x, w: x.new_empty((*x.shape[:-1], w.shape[0]), dtype=torch.float32),
        samples=_fp32_samples,
    )
)
LINEAR_EPILOGUE = register(
    QuantOp(
        name="linear_epilogue",
        schema="(Tensor acc, Tensor? x_scale, Tensor? w_scale, Tensor? bias, ScalarType out_dtype) -> Tensor",
        reference=linear_epilogue,
        fake=None,
        samples=_epilogue_samples,
    )
)
