"""The reductions of `reduce_rows.cpp`: ranges and moments of channels and abs-maxima of rows, in one read."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from viditq_fx.cpu_kernels.build import load_library
from viditq_fx.errors import KernelBuildError

SOURCE = Path(__file__).with_suffix(".cpp")


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = load_library(SOURCE)
    library.viditq_reduce_rows.restype = c_int
    library.viditq_reduce_rows.argtypes = (c_void_p, *(c_int64,) * 3, *(c_void_p,) * 5, c_int)
    return library


@functools.lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why this machine has no such kernel, or None. Compiles it at the first call of a machine."""
    try:
        _library()
    except KernelBuildError as error:
        return str(error)
    return None


def reduce_rows(x_MK: Tensor, low_K: Tensor, high_K: Tensor, total_K: Tensor, square_K: Tensor) -> Tensor:
    """x fp32 [M, K] on the CPU -> abs-maxima of its rows, fp32 [M]; the rest is updated in place.

    low and high are contiguous fp32 [K], total and square fp64 [K]. Raises MemoryError where there is none for K sums.
    """
    assert all(t.device.type == "cpu" and t.is_contiguous() for t in (low_K, high_K, total_K, square_K))
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    rows, depth = x_MK.shape
    amax_M = torch.empty(rows, dtype=torch.float32)
    places = [t.data_ptr() for t in (low_K, high_K, total_K, square_K, amax_M)]
    if _library().viditq_reduce_rows(
        x_MK.data_ptr(), rows, depth, x_MK.stride(0), *places, torch.get_num_threads()
    ):
        raise MemoryError("viditq: no memory for the sums of a linear's input")
    return amax_M
