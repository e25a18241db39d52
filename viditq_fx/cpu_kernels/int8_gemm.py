"""The exact int8 GEMM of `int8_gemm.cpp`: acc[m, n] = sum_k X[m, k] W[n, k] on CPUs without VNNI.

`bits` is the width of X: 8 (|x| <= 127, widened to int16) or 7 (|x| <= 63, multiplied as bytes).
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from viditq_fx.cpu_kernels.build import instruction_set, load_library
from viditq_fx.errors import KernelBuildError

BITS = (8, 7)
SOURCE = Path(__file__).with_suffix(".cpp")
_SIGNATURES = {
    "viditq_packed_bytes": (c_int64, (c_int, c_int64, c_int64)),
    "viditq_pack": (None, (c_int, c_void_p, c_int64, c_int64, c_void_p)),
    "viditq_unpack": (None, (c_int, c_void_p, c_int64, c_int64, c_void_p)),
    "viditq_multiply": (
        c_int,
        (c_int, c_void_p, c_void_p, c_void_p, *(c_int64,) * 3, c_int, *(c_void_p,) * 3),
    ),
}


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = load_library(SOURCE)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@functools.lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why this machine has no such kernel, or None. Compiles it at the first call of a machine."""
    try:
        _library()
    except KernelBuildError as error:
        return str(error)
    return None


def kernel_name(bits: int) -> str:
    """The report's name of the kernel, e.g. "avx2-s8"."""
    return f"{instruction_set().lower()}-{'s8' if bits == 8 else 'u7'}"


def pack(w_NK: Tensor, bits: int) -> Tensor:
    """int8 [N, K] -> the kernel's layout, bytes [about N * K]. Raises KernelBuildError without a kernel."""
    (width, depth), library = w_NK.shape, _library()
    packed = torch.empty(library.viditq_packed_bytes(bits, width, depth), dtype=torch.uint8)
    plain = w_NK.contiguous()
    library.viditq_pack(bits, plain.data_ptr(), width, depth, packed.data_ptr())
    return packed


def unpack(packed: Tensor, shape: torch.Size, bits: int) -> Tensor:
    """The int8 [N, K] that `pack` was given, in memory of its own."""
    plain = torch.empty(shape, dtype=torch.int8)
    _library().viditq_unpack(bits, packed.data_ptr(), *shape, plain.data_ptr())
    return plain


def multiply(x_MK: Tensor, packed: Tensor, width: int, bits: int) -> Tensor:
    """int8 [M, K] and a packed weight -> fp32 [M, N], each int32 sum rounded once.

    Raises MemoryError where there is none for the blocks of X.
    """
    return _run(x_MK, packed, width, bits, (None, None, None))


def linear(
    x_MK: Tensor, x_scale_M: Tensor, packed: Tensor, w_scale_N: Tensor, bias_N: Tensor | None, bits: int
) -> Tensor:
    """int8 [M, K] and a packed weight -> fp32 [M, N]: acc * s_x * s_w + bias, rounded as the reference is.

    Scales and bias are fp32 and contiguous. Raises MemoryError where there is none for the blocks of X.
    """
    return _run(x_MK, packed, w_scale_N.shape[0], bits, (x_scale_M, w_scale_N, bias_N))


def _run(x_MK: Tensor, packed: Tensor, width: int, bits: int, epilogue: tuple[Tensor | None, ...]) -> Tensor:
    x_MK = x_MK.contiguous()
    rows, depth = x_MK.shape
    out = torch.empty(rows, width, dtype=torch.float32)
    operands = (x_MK.data_ptr(), packed.data_ptr(), out.data_ptr(), rows, width, depth)
    after = (None if tensor is None else tensor.data_ptr() for tensor in epilogue)
    if _library().viditq_multiply(bits, *operands, torch.get_num_threads(), *after):
        raise MemoryError("viditq: no memory for the blocks of an int8 GEMM")
    return out
