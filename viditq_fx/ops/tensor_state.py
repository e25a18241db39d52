"""What tells that a tensor was written: its storage, how it lies in it, and its version counter."""

from __future__ import annotations

from dataclasses import dataclass
from threading import RLock

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

LOCK = RLock()
"""Held while packed or blocked weights are looked up, made, freed or given back: two threads may make
the first call of one model. One lock for all stores, because each calls the other's functions."""


@dataclass(frozen=True, kw_only=True)
class TensorState:
    """A tensor's state at one moment. Comparing addresses would not do: memory is used again."""

    storage: StorageWeakRef
    """Keeps the storage's identity from being used again, and not its memory."""
    layout: tuple[int, tuple[int, ...], tuple[int, ...]]
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> TensorState:
        """The state of a tensor now."""
        storage = StorageWeakRef(tensor.untyped_storage())
        return cls(storage=storage, layout=_layout(tensor), version=_version(tensor))

    def same_memory(self, tensor: Tensor) -> bool:
        """Whether the tensor still lies in the same storage in the same way."""
        return self.storage.cdata == tensor.untyped_storage()._cdata and self.layout == _layout(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Whether nothing was written since, as far as can be seen (not through `.data`; see D2, D17)."""
        return self.version == _version(tensor) and self.same_memory(tensor)


def _layout(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
