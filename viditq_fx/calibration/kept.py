"""Memory for what calibration keeps from call to call, apart from where activations come and go.

A small tensor that stays, put between activations that go, keeps the allocator from reusing or returning the memory
around it: glibc's heap grew by 30% of the process that way. So on the CPU each has pages of its own.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


def kept_zeros(
    shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device | str = "cpu"
) -> list[Tensor]:
    """One tensor of zeros for each (shape, dtype), all in one block; give the widest dtypes first (alignment)."""
    place = torch.device(device)
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
    if place.type == "cpu" and sum(sizes) and hasattr(mmap, "MAP_ANONYMOUS"):
        pages = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block = torch.frombuffer(pages, dtype=torch.uint8)  # holds the pages
    else:
        block = torch.zeros(sum(sizes), dtype=torch.uint8, device=place)
    parts = block.split(sizes)
    return [part.view(dtype).view(shape) for part, (shape, dtype) in zip(parts, shapes, strict=True)]
