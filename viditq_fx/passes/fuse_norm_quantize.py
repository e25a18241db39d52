"""Fold adaLN into the quantize that follows it.

quantize(norm(x) * (1 + scale) + shift)  ->  norm_modulate_quantize(x, norm, ..., scale, 1, shift)

The norm is a LayerNorm or an RMSNorm, called or spelled out, affine or not; scale and shift may each be
absent, or per sample, frame or token; a factor that is not `1 + scale` is taken whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import fx
from torch.nn import functional as F

from viditq_fx import ops
from viditq_fx.graph_edit import example
from viditq_fx.passes.base import PassContext
from viditq_fx.passes.dataflow import same_size
from viditq_fx.passes.pattern import (
    Example,
    Expression,
    Found,
    Pattern,
    call,
    number,
    one,
    quantized,
    variable,
)
from viditq_fx.passes.quantize_roots import QuantizeRewrite


def layer_norm(x: Expression) -> Expression:
    return call("layer_norm", x)


def rms_norm(x: Expression) -> Expression:
    return call("rms_norm", x)


def spelled_rms_norm(x: Expression) -> Expression:
    return x * call("rsqrt", call("row_mean", call("square", x)) + number("eps"))


def spelled_rms_norm_affine(x: Expression) -> Expression:
    return spelled_rms_norm(x) * variable("weight")


def scale_and_shift(norm: Expression, scale: Expression, shift: Expression) -> Expression:
    return norm * (one() + scale) + shift


def factor_and_shift(norm: Expression, factor: Expression, shift: Expression) -> Expression:
    return norm * factor + shift


def scale_only(norm: Expression, scale: Expression) -> Expression:
    return norm * (one() + scale)


def factor_only(norm: Expression, factor: Expression) -> Expression:
    return norm * factor


def shift_only(norm: Expression, shift: Expression) -> Expression:
    return norm + shift


def unmodulated(norm: Expression) -> Expression:
    return norm


NORMS = (layer_norm, rms_norm, spelled_rms_norm_affine, spelled_rms_norm)
MODULATIONS = (scale_and_shift, scale_only, factor_and_shift, factor_only, shift_only, unmodulated)
_SHORT = {"unmodulated": "", "shift_only": "+shift"}


def label_of(norm: Callable[[Expression], Expression], modulation: Callable[..., Expression]) -> str:
    """What a report calls one of NORMS and one of MODULATIONS: "layer_norm+modulate"."""
    label = norm.__name__.removeprefix("spelled_").removesuffix("_affine")
    return label + _SHORT.get(modulation.__name__, "+modulate")


def _pattern(norm: Callable[[Expression], Expression], modulation: Callable[..., Expression]) -> Pattern:
    name = label_of(norm, modulation)
    inner = Pattern.of(modulation, norm(variable("x")), name=name)
    return Pattern(name, quantized(inner.expression))


def adaln(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The plain spelling, for an example."""
    return F.linear(F.layer_norm(x, (64,)) * (1 + scale[:, None]) + shift[:, None], w)


def norm_read_twice(x: torch.Tensor, scale: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The modulated value goes elsewhere too."""
    h = F.layer_norm(x, (64,)) * (1 + scale[:, None])
    return F.linear(h, w) + h


def _drawn(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    gen = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=gen) for shape in shapes)


@dataclass(frozen=True, kw_only=True)
class FuseNormQuantize(QuantizeRewrite):
    """One op from the norm's input to the integers."""

    name: ClassVar[str] = "fuse_norm_quantize"
    changes_numerics: ClassVar[bool] = True
    patterns: ClassVar[tuple[Pattern, ...]] = tuple(_pattern(n, m) for n, m in product(NORMS, MODULATIONS))
    examples: ClassVar[tuple[Example, ...]] = (
        Example(
            label="adaLN then linear",
            program=adaln,
            inputs=lambda: _drawn((2, 20, 64), (2, 64), (2, 64), (64, 64)),
            matches=1,
        ),
        Example(
            label="the value is used unquantized too",
            program=norm_read_twice,
            inputs=lambda: _drawn((2, 20, 64), (2, 64), (64, 64)),
            matches=0,
            reason="also read by",
        ),
    )

    def accept(self, found: Found, ctx: PassContext) -> str | None:
        x, root = found.values["x"], found.root
        if not isinstance(x, fx.Node) or not isinstance(example(x), torch.Tensor):
            return "the norm's input is no tensor"
        whole = example(root.args[0]).shape  # type: ignore[arg-type]
        if len(whole) != example(x).dim() or not all(map(same_size, whole, example(x).shape)):
            return "scale or shift broadcasts the norm's result to another shape"
        weight = found.values.get("weight")
        if weight is not None and (not isinstance(weight, fx.Node) or example(weight).dim() != 1):
            return "the norm's factor is no weight over channels"
        for name in ("scale", "factor", "shift"):
            value = found.values.get(name)
            if value is not None and not isinstance(value, fx.Node):
                return f"{name} is a number"
        return None

    def operands(self, found: Found) -> tuple[object, ...]:
        values, norm = found.values, "layer_norm" if "layer_norm" in found.attributes else "rms_norm"
        attributes = found.attributes.get(norm, {})
        scale = values.get("scale", values.get("factor"))
        return (
            values["x"],
            norm,
            attributes.get("weight", values.get("weight")),
            attributes.get("bias"),
            float(attributes.get("eps", values.get("eps", 0.0))),
            scale,
            1.0 if "scale" in values else 0.0,
            values.get("shift"),
            found.attributes["quantize_per_token"]["bits"],
        )

    @property
    def op(self) -> ops.QuantOp:
        return ops.NORM_MODULATE_QUANTIZE
