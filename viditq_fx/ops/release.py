"""Give back the memory of a full-precision weight while the parameter object stays as it is.

Dynamo's guards look at a parameter's type, shape, dtype and device, so the object has to stay.
Its memory is replaced:

on Linux CPUs     by pages that all map one shared tile filled with 0xFF, which is NaN in every float
                  format: no memory of its own, and whoever reads it gets NaN, never a crash. Writing
                  (load_state_dict) gives it pages of its own again.
on CUDA           by nothing (storage of size 0).

The modules that hold the parameter get hooks that turn eager use and saving into a clear error.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import mmap
import os
import sys
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from viditq_fx.errors import ReleasedWeightError
from viditq_fx.ops.packed_weights import is_released, mark_released, name_of
from viditq_fx.ops.tensor_state import LOCK

_PACKABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What reads a packed weight and nothing else, and is refused eagerly once the weight is gone."""
_TILE_BYTES = 16 << 20
_MAP_FIXED = 0x10


def find_owners(weights: Iterable[Tensor]) -> dict[int, list[nn.Module]]:
    """id of each weight -> the modules that hold it as a parameter; one look at all live objects."""
    owners: dict[int, list[nn.Module]] = {id(weight): [] for weight in weights}
    for candidate in gc.get_objects():
        # By type: isinstance would ask proxies and lazy modules to materialize.
        if issubclass(type(candidate), nn.Module):
            for parameter in candidate.__dict__.get("_parameters", {}).values():
                if id(parameter) in owners and candidate not in owners[id(parameter)]:
                    owners[id(parameter)].append(candidate)
    return owners


def why_not_release(weight: Tensor, owners: Iterable[nn.Module]) -> str | None:
    """Why a weight's memory cannot be given back, or None; `owners` are the modules that hold it."""
    if weight.device.type not in {"cpu", "cuda"}:
        return f"weights on {weight.device.type} cannot be released"
    if weight.device.type == "cpu" and not sys.platform.startswith("linux"):
        return "releasing CPU weights needs Linux"
    if weight.is_inference():
        return "it was made under torch.inference_mode(), so loading it again could not be noticed"
    if weight.untyped_storage().nbytes() != weight.numel() * weight.element_size():
        return "its memory is shared with other tensors (a view of a larger storage)"
    readers = [type(m).__name__ for m in owners if not isinstance(m, _PACKABLE)]
    if readers:
        return f"tied: also read by {', '.join(sorted(set(readers)))}"
    return None


def release(weight: Tensor, owners: Iterable[nn.Module]) -> None:
    """Give back the memory of a packed weight; call `why_not_release` first.

    Raises OSError when the address space cannot be mapped; the weight is then untouched.
    """
    with LOCK, torch.inference_mode(False), torch.no_grad():
        if is_released(weight):
            return
        if weight.device.type == "cpu":
            weight.data = _nan_tensor(weight)
        else:
            weight.untyped_storage().resize_(0)
        mark_released(weight)
        for module in owners:
            if refuse_released not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(refuse_released)
                module.register_state_dict_pre_hook(refuse_released)


def refuse_released(module: nn.Module, *_: object) -> None:
    """Hook that refuses eager use and saving of a module while a weight of its own is gone.

    Looks at the module that it is called for: modules are copied and pickled with their hooks, and
    a copy's weight is NaN, of its own, until a checkpoint is loaded.
    """
    if torch.compiler.is_compiling():
        return
    for weight in module._parameters.values():
        if weight is not None and (is_released(weight) or _was_copied_from_released(weight)):
            raise ReleasedWeightError(
                f"{name_of(weight)}: its full-precision memory was released (weights='release'). Call the compiled "
                "model, load a checkpoint, or use viditq_fx.quantize_(model, ...) for a model that runs, moves, "
                "copies and saves in int8"
            )


def _was_copied_from_released(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dim() < 2 or weight.numel() == 0:
        return False
    return bool(torch.isnan(weight.detach()[:1, :1]).all())


def _nan_tensor(like: Tensor) -> Tensor:
    """A tensor of NaN with `like`'s dtype, shape and strides that takes no memory of its own."""
    nbytes = like.numel() * like.element_size()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    length = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    protection, anonymous = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    failed = ctypes.c_void_p(-1).value
    base = libc.mmap(None, length, protection, anonymous, -1, 0)
    if base == failed:
        raise OSError(ctypes.get_errno(), "cannot reserve address space for a released weight")
    for start in range(0, length, _TILE_BYTES):
        size = min(_TILE_BYTES, length - start)
        flags = mmap.MAP_PRIVATE | _MAP_FIXED
        if libc.mmap(base + start, size, protection, flags, _nan_tile(), 0) == failed:
            libc.munmap(base, length)
            raise OSError(ctypes.get_errno(), "cannot map the shared page of a released weight")
    buffer = (ctypes.c_char * nbytes).from_address(base)
    weakref.finalize(buffer, libc.munmap, base, length)
    flat = torch.frombuffer(buffer, dtype=like.dtype)
    return flat.as_strided(like.shape, like.stride())


@functools.lru_cache(maxsize=1)
def _nan_tile() -> int:
    """File descriptor of the shared tile, made once for the process."""
    descriptor = os.memfd_create("viditq-released")
    os.write(descriptor, b"\xff" * _TILE_BYTES)
    return descriptor
