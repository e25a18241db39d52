"""Packed copies of full-precision weights, found by the parameter's identity.

Compiled graphs take packed weights as inputs; this store is where they come from. One parameter is
packed once, however many graphs, linears or regional blocks read it, and packed again when it was
written since (its version counter or its storage changed). A tensor made under inference_mode has
no version counter, so writes in place to it are not seen: packing one warns (D17).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from viditq_fx.errors import ReleasedWeightError, WeightError
from viditq_fx.ops.blocked import own, resident_bytes
from viditq_fx.ops.quantize import quantize_per_channel
from viditq_fx.ops.tensor_state import LOCK, TensorState


@dataclass(kw_only=True)
class _Entry:
    name: str
    state: TensorState
    packed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    released: bool = False


# Weakly keyed: a model that goes away takes its packed weights along.
_ENTRIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_weight(weight: Tensor, bits: int, name: str) -> tuple[Tensor, Tensor]:
    """(int8 [N, K], fp32 scale [N]) of a full-precision weight [N, K], packed at the first call.

    Raises WeightError when the weight is on `meta` or holds NaN or infinity; `name` says which.
    """
    with LOCK:
        entry = _ENTRIES.get(weight)
        if entry is None or not entry.state.holds(weight):
            entry = _ENTRIES[weight] = _Entry(name=name, state=TensorState.of(weight))
        if bits not in entry.packed:
            if entry.released:
                raise ReleasedWeightError(
                    f"{name}: asked for {bits}-bit weights, but its full-precision memory was released after "
                    f"packing to {sorted(entry.packed)} bits; compile every graph of a model with one scheme, or "
                    "use weights='keep'"
                )
            entry.packed[bits] = _pack(weight, bits, name)
        return entry.packed[bits]


def _pack(weight: Tensor, bits: int, name: str) -> tuple[Tensor, Tensor]:
    if weight.device.type == "meta":
        raise WeightError(f"{name}: the weight is on the meta device and holds no values; load it first")
    if weight.is_inference():
        warnings.warn(
            f"viditq: {name} was made under torch.inference_mode(), so writes in place to it leave no trace: call "
            "viditq_fx.repack(model) after such a write, or load the model outside inference_mode",
            stacklevel=2,
        )
    with torch.inference_mode(False), torch.no_grad():
        q_NK, scale_N = quantize_per_channel(weight.detach(), bits)
        if not bool(torch.isfinite(scale_N).all()):
            raise WeightError(
                f"{name}: the weight holds NaN or infinity, so it has no scale. If it was copied from a model "
                "whose weights viditq_fx released, load it from its checkpoint instead"
            )
        return own(q_NK), scale_N


def repack(model: torch.nn.Module) -> int:
    """Forget the packed weights of a model's parameters and buffers; they are packed anew when next called.

    For writes that leave no trace: through `parameter.data`, or in place to a weight that was made
    under inference_mode. Returns how many were forgotten. Released weights are left alone.
    """
    count = 0
    with LOCK:
        for weight in (*model.parameters(), *model.buffers()):
            entry = _ENTRIES.get(weight)
            if entry is not None and not entry.released:
                del _ENTRIES[weight]
                count += 1
    return count


def is_released(weight: Tensor) -> bool:
    """Whether a weight's full-precision memory was given back and not written since."""
    entry = _ENTRIES.get(weight)
    return entry is not None and entry.released and entry.state.holds(weight)


def name_of(weight: Tensor) -> str:
    """The name that a weight was packed under; "a weight" where it was not."""
    entry = _ENTRIES.get(weight)
    return "a weight" if entry is None else entry.name


def mark_released(weight: Tensor) -> None:
    """Note that `weight` now has no full-precision memory; its packed forms stand for it."""
    with LOCK:
        entry = _ENTRIES[weight]
        entry.state, entry.released = TensorState.of(weight), True


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
