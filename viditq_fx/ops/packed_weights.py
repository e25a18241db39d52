"""Packed copies of full-precision weights, found by the parameter's identity.

Compiled graphs take packed weights as inputs; this store is where they come from. One parameter is
packed once, however many graphs, linears or regional blocks read it, and packed again when it was
written since (its version counter or its storage changed). A tensor made under inference_mode has
no version counter, so writes in place to it are not seen: packing one warns (D17).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from viditq_fx.errors import ReleasedWeightError, WeightError
from viditq_fx.ops.blocked import own, resident_bytes
from viditq_fx.ops.tensor_state import LOCK, TensorState
from viditq_fx.ops.weight_forms import Stored, join_weights, quantize_weight
from viditq_fx.scheme import WeightForm


@dataclass(kw_only=True)
class _Entry:
    name: str
    state: TensorState
    packed: dict[WeightForm, Stored] = field(default_factory=dict)
    identity: _Identity = field(default_factory=lambda: _Identity())
    joined: dict[_GroupKey, _Group] = field(default_factory=dict)
    """Forms in which this weight is packed together with others."""
    released: bool = False


_GroupKey = tuple[WeightForm, tuple[int, ...]]
"""The form, and the identities of all members in order."""


@dataclass(kw_only=True, eq=False)
class _Identity:
    """Stands for one state of one weight; not the entry itself, so that groups make no cycles."""

    current: bool = True


@dataclass(kw_only=True)
class _Group:
    members: list[_Identity]
    packed: Stored


# Weakly keyed: a model that goes away takes its packed weights along.
_ENTRIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_weight(weight: Tensor, form: WeightForm, name: str) -> Stored:
    """What is stored, scales and, with a grid, zero points of a full-precision weight [N, K], packed at the first call.

    A weight of more dimensions, as a convolution's [N, K, 1, 1], counts as [N, all others].

    Raises WeightError when the weight is on `meta` or holds NaN or infinity; `name` says which.
    """
    with LOCK:
        entry = _entry(weight, name)
        if form not in entry.packed:
            _refuse_released(entry, form)
            stored, *rest = _quantized(weight, form, name)
            entry.packed[form] = own(stored), *rest
        return entry.packed[form]


def packed_group(weights: Sequence[Tensor], form: WeightForm, names: Sequence[str]) -> Stored:
    """What `packed_weight` returns, of weights [N_i, K] one below the other, as of one weight [sum of N, K].

    Packed at the first call, and again when one of them was written. Raises as `packed_weight`.
    """
    with LOCK:
        members = [_entry(weight, name) for weight, name in zip(weights, names, strict=True)]
        identities = [member.identity for member in members]
        key = (form, tuple(map(id, identities)))
        group = members[0].joined.get(key)
        if group is None:
            for member in members:
                _refuse_released(member, form)
            parts = [_quantized(w, form, name) for w, name in zip(weights, names, strict=True)]
            stored, *rest = join_weights(parts)
            group = _Group(members=identities, packed=(own(stored), *rest))
            for member in members:
                for old in [k for k, g in member.joined.items() if not all(m.current for m in g.members)]:
                    del member.joined[old]
                member.joined[key] = group
        return group.packed


_BIASES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def joined_bias(biases: Sequence[Tensor]) -> Tensor:
    """Biases [N_i] one after the other, joined again when one of them was written."""
    with LOCK:
        known = _BIASES.get(biases[0])
        if known is None:
            known = _BIASES[biases[0]] = {}
        key = tuple(map(id, biases))
        found = known.get(key)
        if found is None or not all(state.holds(b) for state, b in zip(found[0], biases, strict=True)):
            with torch.inference_mode(False), torch.no_grad():
                joined = torch.cat([b.detach() for b in biases])
            known.clear()  # an identity may be used again: one form for each first bias
            found = known[key] = ([TensorState.of(b) for b in biases], joined)
        return found[1]


def _entry(weight: Tensor, name: str) -> _Entry:
    entry = _ENTRIES.get(weight)
    if entry is None or not entry.state.holds(weight):
        if entry is not None:
            entry.identity.current = False
        entry = _ENTRIES[weight] = _Entry(name=name, state=TensorState.of(weight))
    return entry


def _refuse_released(entry: _Entry, form: WeightForm) -> None:
    if entry.released:
        raise ReleasedWeightError(
            f"{entry.name}: asked for {form.bits}-bit weights in a form that it was not packed to before its "
            "full-precision memory was released; compile every graph of a model with one scheme and one keep, or "
            "use weights='keep'"
        )


def _quantized(weight: Tensor, form: WeightForm, name: str) -> Stored:
    if weight.device.type == "meta":
        raise WeightError(f"{name}: the weight is on the meta device and holds no values; load it first")
    if weight.is_inference():
        warnings.warn(
            f"viditq: {name} was made under torch.inference_mode(), so writes in place to it leave no trace: call "
            "viditq_fx.repack(model) after such a write, or load the model outside inference_mode",
            stacklevel=2,
        )
    with torch.inference_mode(False), torch.no_grad():
        stored = quantize_weight(weight.detach().flatten(1), form)
        if not all(bool(torch.isfinite(vector).all()) for vector in stored[1:]):
            raise WeightError(
                f"{name}: the weight holds NaN or infinity, so it has no scale. If it was copied from a model "
                "whose weights viditq_fx released, load it from its checkpoint instead"
            )
        return stored


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
                entry.identity.current = False
                del _ENTRIES[weight]
                count += 1
            _BIASES.pop(weight, None)
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
    whole = sum(_form_bytes(form) for form in entry.packed.values())
    shares = (_form_bytes(g.packed) * weight.shape[0] // g.packed[1].shape[-1] for g in entry.joined.values())
    return whole + sum(shares)


def _form_bytes(form: Stored) -> int:
    stored, *rest = form
    return resident_bytes(stored) + sum(vector.untyped_storage().nbytes() for vector in rest)


def full_bytes(weight: Tensor) -> int:
    """Bytes of memory of a weight in full precision; 0 once released."""
    return 0 if is_released(weight) else weight.untyped_storage().nbytes()
