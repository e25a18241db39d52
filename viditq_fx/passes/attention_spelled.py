"""Softmax attention spelled out: softmax(scale * q k^T + mask) v as products, by whatever ops.

The two products are one attention: its operands play the parts of query, key and value, as those of
`scaled_dot_product_attention` do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from viditq_fx.graph_edit import example
from viditq_fx.passes.effects import op_name
from viditq_fx.passes.spelling import arguments, constant, see_through, spelling

_PRODUCTS = frozenset({"matmul", "bmm"})


@dataclass(frozen=True, kw_only=True)
class SpelledAttention:
    """One attention that is written as two products."""

    root: fx.Node
    """The product with the values."""
    scores: fx.Node
    """The product of queries and keys."""
    query: fx.Node
    """[..., Lq, D], before any scale."""
    key: fx.Node
    """[..., D, Lk] as it is multiplied; see `key_is_transposed`."""
    key_is_transposed: bool
    """Whether `key` is [..., Lk, D] instead: the node in front of the transpose."""
    value: fx.Node
    mask: fx.Node | None
    """What is added to the scores."""
    scale: float
    interior: tuple[fx.Node, ...]
    """Nodes between the operands and the root."""

    def read_outside(self) -> fx.Node | None:
        """A node that reads scores or probabilities besides this attention; None if nothing does."""
        inside = {self.root, *self.interior}
        return next((user for node in self.interior for user in node.users if user not in inside), None)


def spelled_attentions(graph: fx.Graph) -> list[SpelledAttention]:
    """Every attention of a graph that is written as products, in order."""
    found = (read_spelled(node) for node in graph.nodes)
    return [attention for attention in found if attention is not None]


def read_spelled(node: fx.Node) -> SpelledAttention | None:
    """The attention whose product with the values is this node, if it is one."""
    operands = _product(node)
    if operands is None:
        return None
    inside: list[fx.Node] = []
    softmax = see_through(operands[0], inside)
    if not _is_softmax(softmax):
        return None
    inside.append(softmax)
    scores, mask, scale = _scores(arguments(softmax, ("input", "dim"))["input"], inside)
    pair = _product(scores) if scores is not None else None
    if pair is None or scores is None:
        return None
    inside.append(scores)
    query, q_scale = _unscaled(pair[0], inside)
    key, transposed, k_scale = _key(pair[1], inside)
    if not isinstance(query, fx.Node) or not isinstance(key, fx.Node):
        return None
    return SpelledAttention(
        root=node,
        scores=scores,
        query=query,
        key=key,
        key_is_transposed=transposed,
        value=operands[1],
        mask=mask,
        scale=scale * q_scale * k_scale,
        interior=tuple(inside),
    )


def _product(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The two activations that a node multiplies as matrices."""
    if not isinstance(node, fx.Node) or node.op not in {"call_function", "call_method"}:
        return None
    if op_name(node) not in _PRODUCTS:
        return None
    got = arguments(node, ("input", "other"))
    left, right = got.get("input"), got.get("other", got.get("mat2"))
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    values = [example(left), example(right)]
    if not all(isinstance(value, torch.Tensor) and value.dim() >= 3 for value in values):
        return None
    return left, right


def _is_softmax(node: Any) -> bool:
    if not isinstance(node, fx.Node) or op_name(node) != "softmax":
        return False
    value = example(node)
    dim = arguments(node, ("input", "dim"), dim=None)["dim"]
    return isinstance(value, torch.Tensor) and dim in (-1, value.dim() - 1)


def _scores(value: Any, inside: list[fx.Node]) -> tuple[fx.Node | None, fx.Node | None, float]:
    """(product, what is added, scale) of what a softmax takes."""
    mask, scale = None, 1.0
    while True:
        node = see_through(value, inside)
        if _product(node) is not None:
            return node, mask, scale
        spelled = spelling(node) if isinstance(node, fx.Node) else None
        if spelled is None or len(spelled.operands) != 2:
            return None, None, 1.0
        one, other = spelled.operands
        if spelled.kind == "add" and mask is None and scale == 1.0:
            if not _leads_to_product(one):
                one, other = other, one
            if not isinstance(other, fx.Node):
                return None, None, 1.0
            value, mask = one, other
        elif (factor := _factor(spelled.kind, one, other)) is not None:
            value, scale = factor[0], scale * factor[1]
        else:
            return None, None, 1.0
        inside.append(node)


def _leads_to_product(value: Any) -> bool:
    node = _unscaled(value, [])[0]
    return _product(see_through(node, [])) is not None


def _factor(kind: str, one: Any, other: Any) -> tuple[Any, float] | None:
    """(operand, number) of a product with a number or a division by one."""
    one, other = constant(one), constant(other)
    if kind == "mul" and isinstance(one, int | float):
        one, other = other, one
    if kind not in {"mul", "div"} or not isinstance(other, int | float) or not isinstance(one, fx.Node):
        return None
    if kind == "div" and other == 0:
        return None
    return one, float(other) if kind == "mul" else 1.0 / other


def _unscaled(value: Any, inside: list[fx.Node]) -> tuple[Any, float]:
    """A value without the numbers that it is multiplied by, and their product."""
    scale = 1.0
    while True:
        passed: list[fx.Node] = []
        node = see_through(value, passed)
        spelled = spelling(node) if isinstance(node, fx.Node) else None
        factor = _factor(spelled.kind, *spelled.operands) if spelled and len(spelled.operands) == 2 else None
        if factor is None:
            return value, scale
        inside += [*passed, node]
        value, scale = factor[0], scale * factor[1]


def _key(value: fx.Node, inside: list[fx.Node]) -> tuple[Any, bool, float]:
    """(keys, whether they are [..., Lk, D], scale): the transpose is looked through where it is one."""
    value, scale = _unscaled(value, inside)
    passed: list[fx.Node] = []
    node = see_through(value, passed)
    source = _transposed(node)
    if source is None:
        return value, False, scale
    inside += [*passed, node]
    source, more = _unscaled(source, inside)
    return source, True, scale * more


def _transposed(node: Any) -> fx.Node | None:
    """What a node swaps the last two axes of."""
    if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source, name, rest = node.args[0], op_name(node), node.args[1:]
    value = example(source)
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return None
    rank = value.dim()
    if name == "getattr":
        return source if rest and rest[0] == "mT" else None
    axes = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    if not all(isinstance(axis, int) for axis in axes):
        return None
    axes = [axis % rank for axis in axes]  # type: ignore[operator]
    if name in {"transpose", "swapaxes", "swapdims"}:
        return source if sorted(axes) == [rank - 2, rank - 1] else None
    order = [*range(rank - 2), rank - 1, rank - 2]
    return source if name == "permute" and axes == order else None
