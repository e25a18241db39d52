"""Concatenate int8 rows: what a quantize that stands above a cat needs below it.

torch.cat, spelled so that a compiler fuses it on every device. On CUDA Inductor lets each producer write its part
of the result. On a CPU it calls aten's cat for int8, a copy and a kernel more; a sum of zero-padded parts is read
where the result is, and is the same integers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.ops.base import QuantOp, Sample, register


def cat_int8(parts: list[Tensor], dim: int) -> Tensor:
    """int8 tensors of one shape but for `dim` -> one tensor; torch.cat. Raises ValueError for another dtype."""
    if any(part.dtype != torch.int8 for part in parts):
        raise ValueError(f"cat_int8: all parts are int8; got {[part.dtype for part in parts]}")
    if parts[0].device.type != "cpu":
        return torch.cat(parts, dim)
    rank = parts[0].dim()
    axis = dim % rank
    whole, start, total = None, 0, sum(part.shape[axis] for part in parts)
    for part in parts:
        stop = start + part.shape[axis]
        padded = F.pad(part, [0, 0] * (rank - 1 - axis) + [start, total - stop])
        whole, start = padded if whole is None else whole + padded, stop
    assert whole is not None
    return whole


def _samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=gen, device=device, dtype=torch.int8)

    yield Sample(label="text-and-image", args=([draw(2, 7, 40), draw(2, 20, 40)], 1))
    yield Sample(label="three-negative", args=([draw(3, 1, 17), draw(3, 5, 17), draw(3, 2, 17)], -2))
    yield Sample(label="batch", args=([draw(2, 4, 8, 16).transpose(1, 2), draw(1, 8, 4, 16)], 0))
    yield Sample(label="alone", args=([draw(4, 33)], 0))


CAT_INT8 = register(
    QuantOp(
        name="cat_int8",
        schema="(Tensor[] parts, int dim) -> Tensor",
        reference=cat_int8,
        fake=None,
        samples=_samples,
    )
)
