"""QuantOp: one operator of the dialect with its meaning, its fake, its samples and its tolerances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

NAMESPACE = "viditq"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_REGISTRY: dict[str, QuantOp] = {}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Arguments of one call, made anew for each test so that no test sees another's mutation."""

    label: str
    args: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an implementation may be from the reference: |got - want| <= atol + rtol * |want|."""

    rtol: float
    atol: float


# One rounding of the output dtype, doubled: the fp32 epilogue may associate its products otherwise.
EPILOGUE_TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(rtol=1e-6, atol=1e-6),
    torch.float16: Tolerance(rtol=2e-3, atol=1e-4),
    torch.bfloat16: Tolerance(rtol=1.6e-2, atol=1e-3),
}


@dataclass(frozen=True, kw_only=True)
class QuantOp:
    """One op of the `viditq` namespace.

    `reference` is the meaning: it runs eagerly on any device. `fake` gives the output's metadata;
    None says that the reference is traced instead (it is composed of aten ops, and stays fusible).
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any] | None
    samples: Callable[[torch.device], Iterator[Sample]]
    tolerances: dict[torch.dtype, Tolerance] = field(default_factory=lambda: dict(EPILOGUE_TOLERANCES))

    @property
    def overload(self) -> Any:
        """The callable `torch.ops.viditq.<name>.default`."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default


def register(op: QuantOp) -> QuantOp:
    """Define `op` with torch. Ops without a fake are composite: every compiler sees through them."""
    assert op.name not in _REGISTRY, f"op {op.name} is defined twice"
    _LIBRARY.define(f"{op.name}{op.schema}", tags=(torch.Tag.pt2_compliant_tag,))
    if op.fake is None:
        _LIBRARY.impl(op.name, op.reference, "CompositeImplicitAutograd")
    else:
        _LIBRARY.impl(op.name, op.reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{op.name}", op.fake, lib=_LIBRARY)
        torch.library.register_autograd(f"{NAMESPACE}::{op.name}", _no_derivative(op.name), lib=_LIBRARY)
    _REGISTRY[op.name] = op
    return op


def _no_derivative(name: str) -> Callable[..., Any]:
    def backward(*_: Any) -> Any:
        raise RuntimeError(
            f"viditq::{name} is for inference and has no derivative: run the model under torch.no_grad() "
            "or torch.inference_mode(), or train the full-precision model"
        )

    return backward


def all_ops() -> tuple[QuantOp, ...]:
    """Every op defined so far, in order of definition."""
    return tuple(_REGISTRY.values())
