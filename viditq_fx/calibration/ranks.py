"""Calibration on several machines or devices: each rank runs its share of the samples, then all know everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def ranks() -> tuple[int, int]:
    """(this rank, how many there are): (0, 1) where torch.distributed is not initialised."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def from_every_rank(mine: Any) -> list[Any]:
    """What each rank gives, in order of ranks, the same on all. Values go through pickle: ranks trust each other."""
    rank, world = ranks()
    if world == 1:
        return [mine]
    received = []
    for source in range(world):
        box = [mine if source == rank else None]
        torch.distributed.broadcast_object_list(box, src=source)
        received.append(box[0])
    return received


def largest_of_ranks(values: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """The elementwise maximum over all ranks of tensors by key; a rank need not have every key."""
    whole: dict[Any, Tensor] = {}
    for part in from_every_rank({key: value.cpu() for key, value in values.items()}):
        for key, value in part.items():
            whole[key] = torch.maximum(whole[key], value) if key in whole else value
    return whole
