"""Packed copies of full-precision weights, found by the parameter's identity.

Compiled graphs take packed weights as inputs; this store is where they come from. One parameter is
packed once, however many graphs, linears or regional blocks read it, and packed again when it was
written since (its version counter or its memory changed).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from viditq_fx.errors import ReleasedWeightError, WeightError
from viditq_fx.ops.blocked import own, resident_bytes
from viditq_fx.ops.quantize import quantize_per_channel


@dataclass(kw_only=True)
class _Entry:
    version: int
    address: int
    packed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    released: bool = False


# Weakly keyed: a model that goes away takes its packed weights along.
_ENTRIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _state(weight: Tensor) -> tuple[int, int]:
    version = 0 if weight.is_inference() else weight._version
    return version, weight.data_ptr()


def packed_weight(weight: Tensor, bits: int, name: str) -> tuple[Tensor, Tensor]:
    """(int8 [N, K], fp32 scale [N]) of a full-precision weight [N, K], packed at the first call.

    Raises WeightError when the weight is on `meta` or holds NaN or infinity; `name` says which.
    """
    entry = _ENTRIES.get(weight)
    state = _state(weight)
    if entry is not None and (entry.version, entry.address) == state and bits in entry.packed:
        return entry.packed[bits]
    if entry is None or (entry.version, entry.address) != state:
        entry = _ENTRIES[weight] = _Entry(version=state[0], address=state[1])
    elif entry.released:
        widths = sorted(entry.packed)
        raise ReleasedWeightError(
            f"{name}: asked for {bits}-bit weights, but its full-precision memory was released after packing "
            f"to {widths} bits; compile every graph of a model with one scheme, or use weights='keep'"
        )
    entry.packed[bits] = _pack(weight, bits, name)
    return entry.packed[bits]


def _pack(weight: Tensor, bits: int, name: str) -> tuple[Tensor, Tensor]:
    if weight.device.type == "meta":
        raise WeightError(f"{name}: the weight is on the meta device and holds no values; load it first")
    with torch.inference_mode(False), torch.no_grad():
        q_NK, scale_N = quantize_per_channel(weight.detach(), bits)
        if not bool(torch.isfinite(scale_N).all()):
            raise WeightError(
                f"{name}: the weight holds NaN or infinity, so it has no scale. If it was copied from a model "
                "whose weights viditq_fx released, load it from its checkpoint instead"
            )
        return own(q_NK), scale_N


def repack(model: torch.nn.Module) -> int:
    """Forget the packed weights of a model's parameters; they are packed anew at the next call.

    For writes that leave no trace on the parameter, i.e. through `parameter.data`: such are not
    noticed. Returns how many were forgotten. Released weights are left alone.
    """
    count = 0
    for parameter in model.parameters():
        entry = _ENTRIES.get(parameter)
        if entry is not None and not entry.released:
            del _ENTRIES[parameter]
            count += 1
    return count


def is_released(weight: Tensor) -> bool:
    """Whether a weight's full-precision memory was given back and not written since."""
    entry = _ENTRIES.get(weight)
    return entry is not None and entry.released and (entry.version, entry.address) == _state(weight)


def mark_released(weight: Tensor) -> None:
    """Note that `weight` now has no full-precision memory; its packed forms stand for it."""
    entry = _ENTRIES[weight]
    entry.version, entry.address = _state(weight)
    entry.released = True


def packed_bytes(weight: Tensor) -> int:
    """Bytes of memory of every packed form of a weight; 0 when it was never packed."""
    entry = _ENTRIES.get(weight)
    if entry is None:
        return 0
    forms = entry.packed.values()
    return sum(resident_bytes(q_NK) + scale_N.untyped_storage().nbytes() for q_NK, scale_N in forms)


def full_bytes(weight: Tensor) -> int:
    """Bytes of memory of a weight in full precision; 0 once released."""
    return 0 if is_released(weight) else weight.untyped_storage().nbytes()
