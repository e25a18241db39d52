"""The exact GEMM of `int4_gemm.cpp`: int8 by 4-bit weights, read as they are stored, on any x86 CPU with AVX2."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from viditq_fx.cpu_kernels.build import instruction_set, load_library, vnni_flags
from viditq_fx.errors import KernelBuildError
from viditq_fx.scheme import BLOCK, group_of

SOURCE = Path(__file__).with_suffix(".cpp")


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = load_library(SOURCE, vnni_flags())
    library.viditq_multiply_int4.restype = c_int
    library.viditq_multiply_int4.argtypes = (*(c_void_p,) * 5, *(c_int64,) * 4, c_int)
    return library


@functools.lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why this machine has no such kernel, or None. Compiles it at the first call of a machine."""
    try:
        _library()
    except KernelBuildError as error:
        return str(error)
    return None


def kernel_name() -> str:
    """The report's name of the kernel, e.g. "avx512-vnni-s8s4"."""
    return f"{instruction_set().lower()}{'-vnni' if vnni_flags() else ''}-s8s4"


def multiply(x_MK: Tensor, w_NH: Tensor, scale_GN: Tensor | None, scale_MG: Tensor | None = None) -> Tensor:
    """int8 [M, K] x packed 4-bit [N, H] -> fp32 [M, N], each int32 sum rounded once.

    With scales of groups of 128 or 64 of K for the channels [G, N], of blocks of 128 for the rows [M, ceil(K / 128)] or
    with both, their scaled sum.
    Raises MemoryError where there is none for a few rows of X.
    """
    x_MK, w_NH = x_MK.contiguous(), w_NH.contiguous()
    scales = [None if scale is None else scale.contiguous() for scale in (scale_GN, scale_MG)]
    (rows, depth), width = x_MK.shape, w_NH.shape[0]
    group = BLOCK if scale_GN is None else group_of(scale_GN.shape[0], depth)
    assert group is not None, f"no groups of K = {depth} have so many scales"
    out = torch.empty(rows, width, dtype=torch.float32)
    operands = [None if tensor is None else tensor.data_ptr() for tensor in (x_MK, w_NH, *scales, out)]
    threads = torch.get_num_threads()
    if _library().viditq_multiply_int4(*operands, rows, width, depth, group, threads):
        raise MemoryError("viditq: no memory for the rows of an int4 GEMM")
    return out
