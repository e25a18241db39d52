"""Integer GEMM on a CPU by our own kernel: acc[m, n] = sum_k Xq[m, k] * Wq[n, k], exact without VNNI.

Shapes: x_MK int8 [..., K], w_NK int8 [N, K], result fp32 [..., N]: the int32 sum, rounded once where it is
beyond 2^24. `bits` is the width of x: 8, or 7 for |x| <= 63, which a faster kernel relies on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache

import torch
from torch import Tensor

from viditq_fx.cpu_kernels import int8_gemm
from viditq_fx.ops.base import QuantOp, Sample, register
from viditq_fx.ops.blocked import Layout, blocked_weight, plain_weight
from viditq_fx.ops.linear import exact_int_matmul, linear_epilogue


@cache
def layout(bits: int) -> Layout:
    """The kernel's layout of a weight for inputs of `bits`."""
    return Layout(
        name=f"native-{bits}",
        pack=lambda w_NK: int8_gemm.pack(w_NK, bits),
        unpack=lambda packed, shape: int8_gemm.unpack(packed, shape, bits),
        nbytes=lambda packed: packed.numel(),
    )


def native_unavailable() -> str | None:
    """Why the kernel is not to be chosen here, or None: it is compiled and tried once in a process."""
    return int8_gemm.unavailable() or _wrong()


@lru_cache(maxsize=1)
def _wrong() -> str | None:
    """The largest operands first: a kernel that saturates is wrong on these."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        w = torch.full((40, 264), 127, dtype=torch.int8)
        w[::3, ::5] = -127
        for bits in int8_gemm.BITS:
            signs = torch.ones(9, 1, dtype=torch.int8)
            signs[::2] = -1
            x = (signs * (2 ** (bits - 1) - 1)).expand(9, 264).contiguous()
            got = int8_gemm.multiply(x, int8_gemm.pack(w, bits), 40, bits)
            if not torch.equal(got, exact_int_matmul(x, w).to(torch.float32)):
                return f"our {int8_gemm.kernel_name(bits)} kernel is not exact on this CPU"
    return None


def check_operands(x_MK: Tensor, w_NK: Tensor, bits: int) -> None:
    """Raises ValueError for operands that the kernel does not take."""
    if x_MK.dtype != torch.int8 or w_NK.dtype != torch.int8 or bits not in int8_gemm.BITS:
        raise ValueError(
            f"matmul_s8s8: needs int8 x int8, bits 8 or 7; got {x_MK.dtype}, {w_NK.dtype}, {bits}"
        )


def matmul_s8s8(x_MK: Tensor, w_NK: Tensor, bits: int) -> Tensor:
    """The GEMM of this module's formula; packs the weight at its first call.

    Raises ValueError for other dtypes or widths. Where there is no kernel the reference computes.
    """
    if x_MK.dtype != torch.int8 or w_NK.dtype != torch.int8 or bits not in int8_gemm.BITS:
        raise ValueError(
            f"matmul_s8s8: needs int8 x int8, bits 8 or 7; got {x_MK.dtype}, {w_NK.dtype}, {bits}"
        )
    width, depth = w_NK.shape
    if x_MK.numel() == 0 or width == 0:
        return x_MK.new_zeros((*x_MK.shape[:-1], width), dtype=torch.float32)
    x_2d = x_MK.reshape(-1, depth)
    if x_MK.device.type != "cpu" or int8_gemm.unavailable():
        acc = exact_int_matmul(x_2d, plain_weight(w_NK)).to(torch.float32)
    else:
        acc = int8_gemm.multiply(x_2d, blocked_weight(w_NK, layout(bits)), width, bits)
    return acc.reshape(*x_MK.shape[:-1], width)


def linear_s8s8(
    x_MK: Tensor, x_scale: Tensor, w_NK: Tensor, w_scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """The GEMM with its epilogue: fp32 acc * s_x * s_w (+ bias), bit for bit as `linear_epilogue` rounds it.

    Shapes as of `viditq::linear_w8a8`. Raises ValueError as `matmul_s8s8` does.
    """
    if x_MK.device.type != "cpu" or int8_gemm.unavailable() or 0 in (x_MK.numel(), w_NK.shape[0]):
        return linear_epilogue(matmul_s8s8(x_MK, w_NK, bits), x_scale, w_scale, bias, torch.float32)
    check_operands(x_MK, w_NK, bits)
    packed = blocked_weight(w_NK, layout(bits))
    scales = (x_scale.to(torch.float32).reshape(-1).contiguous(), w_scale.to(torch.float32).contiguous())
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    y_MN = int8_gemm.linear(x_MK.reshape(-1, x_MK.shape[-1]), scales[0], packed, scales[1], bias, bits)
    return y_MN.reshape(*x_MK.shape[:-1], w_NK.shape[0])


def _linear_samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    for number, sample in enumerate(_samples(device)):
        x, w, bits = sample.args
        x_scale = torch.rand(*x.shape[:-1], 1, generator=gen, device=device)
        w_scale = torch.rand(w.shape[0], generator=gen, device=device)
        bias = (
            torch.randn(w.shape[0], generator=gen, device=device).to(torch.bfloat16) if number % 2 else None
        )
        yield Sample(label=sample.label, args=(x, x_scale, w, w_scale, bias, bits))


def _samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    for bits in int8_gemm.BITS:
        for batch, depth, width in (((2, 9), 40, 24), ((17,), 33, 7), ((1,), 1152, 16)):
            high = 2 ** (bits - 1)
            x = torch.randint(1 - high, high, (*batch, depth), generator=gen, dtype=torch.int8, device=device)
            w = torch.randint(-127, 128, (width, depth), generator=gen, dtype=torch.int8, device=device)
            label = f"{bits}-bit-{'x'.join(map(str, batch))}-k{depth}-n{width}"
            yield Sample(label=label, args=(x, w, bits))


MATMUL_S8S8 = register(
    QuantOp(
        name="matmul_s8s8",
        schema="(Tensor x, Tensor w, int bits) -> Tensor",
        reference=matmul_s8s8,
        fake=lambda x, w, bits: x.new_empty((*x.shape[:-1], w.shape[0]), dtype=torch.float32),
        samples=_samples,
    )
)
LINEAR_S8S8 = register(
    QuantOp(
        name="linear_s8s8",
        schema="(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor? bias, int bits) -> Tensor",
        reference=linear_s8s8,
        fake=lambda x, x_scale, w, w_scale, bias, bits: x.new_empty(
            (*x.shape[:-1], w.shape[0]), dtype=torch.float32
        ),
        samples=_linear_samples,
    )
)
