"""oneDNN's blocked copies of int8 weights, kept beside the plain tensor that stands for them.

A graph input has to be a plain tensor, and oneDNN wants a layout of its own (making it takes as
long as several GEMMs). So the plain int8 weight [N, K] is the key, and its blocked copy is found
by identity. Where we own the plain tensor its memory is given back once the copy exists: the
integers are in memory once, and `plain_weight` reads them back bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# The one place where the copies live. Keyed by the tensor and not held by it: a tensor that goes
# away takes its copy along, and every compiled graph that reads the weight shares one copy.
_BLOCKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_OWNED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def own(w_NK: Tensor) -> Tensor:
    """Declare that only this package reads `w_NK`, so its plain memory may be given back."""
    _OWNED[w_NK] = True
    return w_NK


def blocked_weight(w_NK: Tensor) -> Tensor:
    """The oneDNN tensor for int8 [N, K], made at the first call and found by identity afterwards.

    Raises RuntimeError where oneDNN has no int8 linear.
    """
    found = _BLOCKED.get(w_NK)
    version = 0 if w_NK.is_inference() else w_NK._version
    if found is None or found[1] != version:
        packed = torch.ops.onednn.qlinear_prepack(plain_weight(w_NK), None)
        found = _BLOCKED[w_NK] = (packed, version)
        if w_NK in _OWNED:
            w_NK.untyped_storage().resize_(0)
    return found[0]


def is_freed(w_NK: Tensor) -> bool:
    """Whether the plain memory of a weight was given back."""
    return w_NK.numel() > 0 and w_NK.untyped_storage().nbytes() == 0


def plain_weight(w_NK: Tensor) -> Tensor:
    """`w_NK` itself, or its integers read back from the blocked copy where the plain memory is gone."""
    if torch.compiler.is_compiling() or type(w_NK) is not Tensor or not is_freed(w_NK):
        return w_NK
    return _BLOCKED[w_NK][0].to_dense().t().contiguous()


def restore(w_NK: Tensor) -> Tensor:
    """Give a weight its plain memory back and drop the blocked copy: before it is moved or saved."""
    if is_freed(w_NK):
        plain = plain_weight(w_NK)
        w_NK.untyped_storage().resize_(plain.numel())
        w_NK.copy_(plain)
    _BLOCKED.pop(w_NK, None)
    return w_NK


def resident_bytes(w_NK: Tensor) -> int:
    """Bytes of memory that stand for an int8 weight now, plain and blocked together."""
    found = _BLOCKED.get(w_NK)
    blocked = int(torch.ops.mkldnn._nbytes(found[0])) if found is not None else 0
    return w_NK.untyped_storage().nbytes() + blocked
