"""Register our lowerings with Inductor: explicit, and safe to call twice."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from viditq_fx.lowering import inductor_compat as inductor
from viditq_fx.lowering.extern_linear import viditq_int_mm_linear
from viditq_fx.ops.base import QuantOp
from viditq_fx.ops.linear import LINEAR_W8A7, LINEAR_W8A8


def install(others: Iterable[QuantOp] = ()) -> None:
    """Have Inductor lower `linear_w8a8`, `linear_w8a7` and `others` like them; call it before every compilation.

    Without Triton nothing is registered, so both ops run their eager reference, as any op does that
    has no lowering. The registries that this fills are Inductor's own; a second call changes nothing.
    """
    inductor.register_extern(viditq_int_mm_linear)
    if not inductor.has_triton():
        return
    from viditq_fx.lowering.linear import lower_linear

    for op in (LINEAR_W8A8, LINEAR_W8A7, *others):
        inductor.register_lowering(op.overload, partial(lower_linear, op.overload))
