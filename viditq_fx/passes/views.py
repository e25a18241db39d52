"""Views that only move or regroup dimensions, read from a graph, and regroupings done again on another tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from viditq_fx.graph_edit import call, example
from viditq_fx.passes.dataflow import same_size
from viditq_fx.passes.effects import op_name

_PERMUTES = frozenset({"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims"})
_SIZED = frozenset({"view", "reshape"})


def source_of(node: Any, names: frozenset[str]) -> fx.Node | None:
    """The tensor that `node` is a view of, if it is a call of one of these names."""
    if not isinstance(node, fx.Node) or node.op not in {"call_function", "call_method"}:
        return None
    if op_name(node) not in names or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    return node.args[0] if isinstance(example(node.args[0]), torch.Tensor) else None


def permutation(node: Any) -> tuple[int, ...] | None:
    """The axes with node = source.permute(axes), in any spelling; None for what is no permutation."""
    source = source_of(node, _PERMUTES | {"getattr"})
    if source is None or len(node.all_input_nodes) > 1:
        return None
    # The call itself says where each dimension goes: dimension i of the probe has size i + 2.
    probe = torch.empty(tuple(range(2, example(source).dim() + 2)), device="meta")
    if op_name(node) == "getattr":
        if node.args[1] != "mT":
            return None
        moved = probe.mT
    else:
        moved = getattr(probe, op_name(node))(*node.args[1:], **node.kwargs)
    return tuple(size - 2 for size in moved.shape)


def regrouped_rows(node: fx.Node) -> fx.Node | None:
    """The tensor [..., K] whose rows `node` groups in another way, [B, S, K] as [B, H, W, K]; None otherwise."""
    source = source_of(node, _SIZED | {"unflatten", "flatten"})
    if source is None:
        return None
    whole, part = example(source), example(node)
    if whole.dim() < 2 or part.dim() < 2 or whole.dtype != part.dtype or whole.shape[-1] != part.shape[-1]:
        return None
    if op_name(node) in _SIZED:
        sizes = _sizes(node)
        return source if all(isinstance(size, int | fx.Node) for size in sizes) and sizes else None
    return source if _touched(node) < whole.dim() - 1 else None


def regroup(graph: fx.Graph, view: fx.Node, value: fx.Node, like: fx.Node) -> fx.Node:
    """Group the rows of `value` [..., N] as `view` groups those of `regrouped_rows(view)`."""
    if op_name(view) in _SIZED:
        return call(graph, torch.reshape, (value, (*_sizes(view)[:-1], example(value).shape[-1])), like)
    target = torch.unflatten if op_name(view) == "unflatten" else torch.flatten
    named: dict[str, Any] = dict(view.kwargs)
    return call(graph, target, (value, *view.args[1:]), like, **named)


def merges_space(node: fx.Node, source: fx.Node) -> bool:
    """Whether `node` is `source` [B, C, *S] as [B, C, S]."""
    if source_of(node, _SIZED | {"flatten"}) is not source or example(source).dim() < 4:
        return False
    whole, part = example(source), example(node)
    return (
        part.dtype == whole.dtype and part.dim() == 3 and all(map(same_size, part.shape[:2], whole.shape[:2]))
    )


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    given = node.args[1:] or tuple(node.kwargs.values())
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else tuple(given)


def _touched(node: fx.Node) -> int:
    """The last dimension, counted from the left, that a flatten or unflatten takes apart or joins."""
    names, default = (("dim",), None) if op_name(node) == "unflatten" else (("start_dim", "end_dim"), -1)
    given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    last = given.get(names[-1], default)
    dims = example(node.args[0]).dim()  # type: ignore[arg-type]
    return last % dims if isinstance(last, int) else dims
