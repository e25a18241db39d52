"""Fold the activation of a feed-forward into the quantize that follows it.

quantize(act(x))         ->  activation_quantize(x, act)
quantize(act(x) * gate)  ->  activation_quantize(x, act, gate)        GEGLU, SwiGLU: halves of one tensor or two;
                                                                      or a vector, the balance of a recipe

A GELU that is concatenated with attention's output (the parallel block of Flux) is left to the compiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.nn import functional as F

from viditq_fx import ops
from viditq_fx.graph_edit import example
from viditq_fx.passes.base import PassContext
from viditq_fx.passes.dataflow import same_shape
from viditq_fx.passes.pattern import Example, Expression, Found, Pattern, call, quantized, variable
from viditq_fx.passes.quantize_roots import QuantizeRewrite


def gelu(x: Expression) -> Expression:
    return call("gelu", x)


def gelu_tanh(x: Expression) -> Expression:
    return call("gelu_tanh", x)


def silu(x: Expression) -> Expression:
    return call("silu", x)


def spelled_silu(x: Expression) -> Expression:
    return x * call("sigmoid", x)


def relu_squared(x: Expression) -> Expression:
    return call("square", call("relu", x))


def relu(x: Expression) -> Expression:
    return call("relu", x)


_ACTIVATIONS = (gelu_tanh, gelu, silu, spelled_silu, relu_squared, relu)


def _patterns() -> tuple[Pattern, ...]:
    plain, gated = [], []
    for act in _ACTIVATIONS:
        kind, value = act.__name__.removeprefix("spelled_"), act(variable("x"))
        gated.append(Pattern(f"{kind}*gate", quantized(value * variable("gate"))))
        plain.append(Pattern(kind, quantized(value)))
    return (*plain, *gated)  # x * sigmoid(x) is a SiLU before it is a gated product


def feed_forward(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Plain GELU, for an example."""
    return F.linear(F.gelu(x, approximate="tanh"), w)


def swiglu(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Halves of one tensor, the gate in front."""
    gate, value = x.chunk(2, dim=-1)
    return F.linear(value * F.silu(gate), w)


def by_channel(x: torch.Tensor, m: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A number for each channel in place of a gate, as balance puts it there."""
    return F.linear(F.gelu(x) * m, w)


def read_twice(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The activated value goes elsewhere too."""
    h = F.gelu(x)
    return F.linear(h, w) + h


def _drawn(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    gen = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=gen) for shape in shapes)


@dataclass(frozen=True, kw_only=True)
class FuseActivationQuantize(QuantizeRewrite):
    """One op from the up-projection's result to the down-projection's integers."""

    name: ClassVar[str] = "fuse_activation_quantize"
    changes_numerics: ClassVar[bool] = True
    patterns: ClassVar[tuple[Pattern, ...]] = _patterns()
    examples: ClassVar[tuple[Example, ...]] = (
        Example(label="GELU", program=feed_forward, inputs=lambda: _drawn((2, 20, 64), (64, 64)), matches=1),
        Example(label="SwiGLU", program=swiglu, inputs=lambda: _drawn((2, 20, 128), (64, 64)), matches=1),
        Example(
            label="GELU times a vector",
            program=by_channel,
            inputs=lambda: _drawn((2, 20, 64), (64,), (64, 64)),
            matches=1,
        ),
        Example(
            label="the value is used unquantized too",
            program=read_twice,
            inputs=lambda: _drawn((2, 20, 64), (64, 64)),
            matches=0,
            reason="also read by",
        ),
    )

    def accept(self, found: Found, ctx: PassContext) -> str | None:
        values = [found.values[name] for name in ("x", "gate") if name in found.values]
        if not all(isinstance(v, fx.Node) and isinstance(example(v), torch.Tensor) for v in values):
            return "an operand of the activation is no tensor"
        x, *gate = (example(v).shape for v in values)
        whole = example(found.root.args[0]).shape  # type: ignore[arg-type]
        if not same_shape(x, whole) or not all(
            same_shape(shape, whole) or same_shape(shape, whole[-1:]) for shape in gate
        ):
            return "the activation and its gate differ in shape"
        return None

    def operands(self, found: Found) -> tuple[object, ...]:
        kind = found.pattern.removesuffix("*gate")
        bits = found.attributes["quantize_per_token"]["bits"]
        return (found.values["x"], kind, found.values.get("gate"), bits)

    @property
    def op(self) -> ops.QuantOp:
        return ops.ACTIVATION_QUANTIZE
