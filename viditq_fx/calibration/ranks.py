"""Calibration on several machines or devices: each rank runs its share of the samples, then all know everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from viditq_fx.calibration.ledger import InputKey
from viditq_fx.calibration.positions import mixed_positions


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


def largest_of_ranks(values: dict[InputKey, Tensor]) -> dict[InputKey, Tensor]:
    """The elementwise maximum over all ranks of vectors by input; a rank need not have every one.

    Raises RecipeError where ranks saw an input at other numbers of positions.
    """
    whole: dict[InputKey, Tensor] = {}
    for part in from_every_rank({key: value.cpu() for key, value in values.items()}):
        for key, value in part.items():
            known = whole.setdefault(key, value)
            if len(known) != len(value):
                raise mixed_positions(key.sites, (len(known), len(value)))
            whole[key] = torch.maximum(known, value)
    return whole
