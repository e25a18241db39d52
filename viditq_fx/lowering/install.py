"""Register our lowerings with Inductor: explicit, and safe to call twice."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from viditq_fx.lowering import inductor_compat as inductor
from viditq_fx.lowering.extern_linear import viditq_int_mm_linear, viditq_scaled_mm_linear
from viditq_fx.ops.base import QuantOp


def install(others: Iterable[QuantOp] = ()) -> None:
    """Have Inductor lower our quantized linears and `others` like them; call it before every compilation.

    Without Triton nothing is registered, so these ops run their eager reference, as any op does that
    has no lowering. The registries that this fills are Inductor's own; a second call changes nothing.
    """
    for extern in (viditq_int_mm_linear, viditq_scaled_mm_linear):
        inductor.register_extern(extern)
    if not inductor.has_triton():
        return
    from viditq_fx.lowering.linear import ROUTES, lower_linear

    for overload in (*ROUTES, *(op.overload for op in others)):
        inductor.register_lowering(overload, partial(lower_linear, overload))
