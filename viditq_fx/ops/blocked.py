"""Blocked copies of int8 weights for CPU kernels, kept beside the plain tensor that stands for them.

A graph input has to be a plain tensor, and a kernel (oneDNN's, our own) wants a layout of its own (making it
takes as long as several GEMMs). So the plain int8 weight [N, K] is the key, and its blocked copy is found
by identity. Where we own the key its memory is given back once the copy exists: the integers are
in memory once, and `plain_weight` reads them back bit for bit.

The key alone loses its memory: it is pointed at empty pages, and whoever holds the storage that it
had (a state dict, a view) keeps it whole. An owned key is therefore shown to nobody: callers hand
out `plain_weight(key)`.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from viditq_fx.ops.tensor_state import LOCK, TensorState


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A kernel's layout of int8 [N, K]."""

    name: str
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, torch.Size], Tensor]
    """Bit for bit, in memory of its own."""
    nbytes: Callable[[Tensor], int]


@dataclass(kw_only=True)
class _Blocked:
    """The copies of one weight: one for each layout that was asked for, mostly a single one."""

    copies: dict[str, tuple[Layout, Tensor]]
    state: TensorState
    freed: bool = False


# The one place where the copies live. Keyed by the tensor and not held by it: a tensor that goes
# away takes its copy along, and every compiled graph that reads the weight shares one copy.
_BLOCKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_OWNED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def own(w_NK: Tensor) -> Tensor:
    """A row-major key for the integers of `w_NK` that only this package reads; shares its memory."""
    with torch.inference_mode(False), torch.no_grad():
        key = w_NK.clone() if w_NK.is_inference() else w_NK.detach()
        key = key.contiguous()
    with LOCK:
        _OWNED[key] = True
    return key


def adopt(w_NK: Tensor) -> Tensor:
    """`w_NK` itself as a key, where nobody else holds it (a copied or unpickled one); else as `own`."""
    if w_NK.is_inference() or not w_NK.is_contiguous():
        return own(w_NK)
    with LOCK:
        _OWNED[w_NK] = True
    return w_NK


def is_owned(w_NK: Tensor) -> bool:
    """Whether `w_NK` is a key that `own` made."""
    return w_NK in _OWNED


def keep_plain(w_NK: Tensor) -> None:
    """Give a key its memory back for good: somebody else holds the key itself (export, while it traces)."""
    with LOCK, _disable_current_modes():
        restore(w_NK)
        _OWNED.pop(w_NK, None)


def blocked_weight(w_NK: Tensor, layout: Layout) -> Tensor:
    """The copy of int8 [N, K] in `layout`, made at the first call and found by identity afterwards.

    Raises what `layout.pack` raises.
    """
    with LOCK, torch.inference_mode(False):
        found = _BLOCKED.get(w_NK)
        if found is None or not (is_freed(w_NK) or found.state.holds(w_NK)):
            found = _Blocked(copies={}, state=TensorState.of(w_NK))
        if layout.name not in found.copies:
            found.copies[layout.name] = (layout, layout.pack(plain_weight(w_NK).contiguous()))
            _BLOCKED[w_NK] = found
            if w_NK in _OWNED and w_NK.numel() and not found.freed:
                w_NK.data = _empty_pages(w_NK)
                found.state, found.freed = TensorState.of(w_NK), True
        return found.copies[layout.name][1]


def is_freed(w_NK: Tensor) -> bool:
    """Whether the plain memory of a weight was given back."""
    found = _BLOCKED.get(w_NK)
    return found is not None and found.freed and found.state.same_memory(w_NK)


def plain_weight(w_NK: Tensor) -> Tensor:
    """The integers of `w_NK` in a tensor of their own, which keeps its memory whatever becomes of the key.

    It shares the key's memory, or is read back from the blocked copy where that is gone.
    """
    if type(w_NK) is not Tensor:  # a fake one
        return w_NK
    with LOCK:
        if not is_freed(w_NK):
            return w_NK.detach()
        layout, copy = next(iter(_BLOCKED[w_NK].copies.values()))
        return layout.unpack(copy, w_NK.shape)


def restore(w_NK: Tensor) -> Tensor:
    """Give a weight its plain memory back and drop the blocked copy: before it is moved or saved."""
    with LOCK, torch.inference_mode(False):
        if is_freed(w_NK):
            w_NK.data = plain_weight(w_NK)
        _BLOCKED.pop(w_NK, None)
        return w_NK


def resident_bytes(w_NK: Tensor) -> int:
    """Bytes of memory that stand for an int8 weight now, plain and blocked together."""
    with LOCK:
        found = _BLOCKED.get(w_NK)
        blocked = (
            sum(layout.nbytes(copy) for layout, copy in found.copies.values()) if found is not None else 0
        )
        return blocked + (0 if is_freed(w_NK) else w_NK.numel() * w_NK.element_size())


def _empty_pages(like: Tensor) -> Tensor:
    """A tensor like `like` on pages that no one has touched: they take no memory and read as zeros.

    Not a storage of size 0: reading one crashes the process.
    """
    nbytes = like.numel() * like.element_size()
    if sys.platform == "win32":
        pages = mmap.mmap(-1, nbytes)
    else:  # private: pages of a shared mapping would take memory once read
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(like.shape)
