"""The canonical form of a node: one name and one order of operands for all the ways to write an op.

Operator, function or method, keyword or position, in place or not: what a pattern, or whoever else asks what a
value is, compares with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from viditq_fx import ops
from viditq_fx.graph_edit import example
from viditq_fx.passes.dataflow import same_size
from viditq_fx.passes.effects import is_mutation, op_name


@dataclass(frozen=True)
class Spelled:
    """One node in canonical spelling."""

    kind: str
    operands: tuple[Any, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


_CASTS = frozenset({"to", "type_as", "float", "half", "bfloat16", "type", "contiguous", "clone"})
_SHAPES = frozenset({"view", "reshape", "squeeze", "unsqueeze", "flatten", "expand", "view_as", "reshape_as"})
_ROUNDED = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_BINARY = {
    **dict.fromkeys(("add", "iadd"), "add"),
    **dict.fromkeys(("mul", "imul", "multiply"), "mul"),
    **dict.fromkeys(("sub", "isub", "subtract"), "sub"),
    **dict.fromkeys(("div", "truediv", "itruediv", "divide", "true_divide"), "div"),
}
_UNARY = {
    "rsqrt": "rsqrt",
    "silu": "silu",
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "square": "square",
}


def spelling(node: fx.Node) -> Spelled | None:
    """The canonical form of a node; None for what no pattern may speak of."""
    if node.op not in {"call_function", "call_method"}:
        return None
    name = op_name(node)
    if name in _BINARY and len(node.args) == 2 and not node.kwargs:
        return Spelled(_BINARY[name], tuple(node.args))
    if name in _UNARY and node.args:
        return Spelled(_UNARY[name], (node.args[0],))
    if name in _READERS:
        return _READERS[name](node)
    if name in _BINARY or name in _UNARY or is_mutation(node):
        return None
    return Spelled(name, tuple(node.args), node.kwargs)


def arguments(node: fx.Node, names: Sequence[str], **defaults: Any) -> dict[str, Any]:
    """A call's arguments by name, whether given by position or by keyword."""
    bound = dict(defaults)
    bound.update(zip(names, node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def constant(value: Any) -> Any:
    """A float that dynamic shapes made symbolic, as the number it is: an eps is the same in every call."""
    if isinstance(value, fx.Node) and isinstance(example(value), torch.SymFloat):
        return float(example(value))
    return value


def _layer_norm(node: fx.Node) -> Spelled | None:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    got = arguments(node, names, weight=None, bias=None, eps=1e-5)
    if len(got["normalized_shape"]) != 1:
        return None
    attributes = {"weight": got["weight"], "bias": got["bias"], "eps": constant(got["eps"])}
    return Spelled("layer_norm", (got["input"],), attributes)


def _rms_norm(node: fx.Node) -> Spelled | None:
    got = arguments(node, ("input", "normalized_shape", "weight", "eps"), weight=None, eps=None)
    if len(got["normalized_shape"]) != 1:
        return None
    eps = constant(got["eps"])
    if eps is None:  # torch takes that of the type it computes in, which for half precision is fp32
        wide = getattr(example(node), "dtype", None) == torch.float64
        eps = torch.finfo(torch.float64 if wide else torch.float32).eps
    return Spelled("rms_norm", (got["input"],), {"weight": got["weight"], "bias": None, "eps": eps})


def _gelu(node: fx.Node) -> Spelled:
    got = arguments(node, ("input",), approximate="none")
    return Spelled("gelu_tanh" if got["approximate"] == "tanh" else "gelu", (got["input"],))


def _power(node: fx.Node) -> Spelled | None:
    base, exponent = (arguments(node, ("input", "exponent")).get(name) for name in ("input", "exponent"))
    return Spelled("square", (base,)) if exponent == 2 else Spelled("pow", (base, exponent))


def _mean(node: fx.Node) -> Spelled | None:
    got = arguments(node, ("input", "dim", "keepdim"), dim=None, keepdim=False)
    last = (
        got["dim"] in (-1, (-1,), [-1]) and got["keepdim"] is True and set(got) <= {"input", "dim", "keepdim"}
    )
    return Spelled("row_mean", (got["input"],)) if last else None


def _quantize(node: fx.Node) -> Spelled:
    return Spelled("quantize_per_token", (node.args[0],), {"bits": node.args[1]})


_READERS: dict[str, Callable[[fx.Node], Spelled | None]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "gelu": _gelu,
    "pow": _power,
    "mean": _mean,
    ops.QUANTIZE_PER_TOKEN.name: _quantize,
}


def see_through(value: Any, passed: list[fx.Node]) -> Any:
    """What a value is but for casts, and views that change no size; the nodes skipped go to `passed`."""
    while isinstance(value, fx.Node) and value.op in {"call_function", "call_method"}:
        name = op_name(value)
        source = value.args[0] if value.args else None
        if not isinstance(source, fx.Node) or is_mutation(value):
            break
        if name not in _CASTS and not (name in _SHAPES and _same_shape(value, source)):
            break
        if not _same_numbers(value, source):
            break
        passed.append(value)
        value = source
    return value


def _same_numbers(a: fx.Node, b: fx.Node) -> bool:
    """Whether a cast changes values by the rounding of a float alone: one to integers or fp8 computes something."""
    one_, other = example(a), example(b)
    if not isinstance(one_, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    if one_.device != other.device:
        return False
    return one_.dtype == other.dtype or {one_.dtype, other.dtype} <= _ROUNDED


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    one_, other = example(a), example(b)
    if not isinstance(one_, torch.Tensor) or not isinstance(other, torch.Tensor) or one_.dim() != other.dim():
        return False
    return all(same_size(m, n) for m, n in zip(one_.shape, other.shape, strict=True))
