"""Ops that move rows (last axes) about and leave each row whole: what is done to a row may be done before them.

    f(cat([a, b], 1)) == cat([f(a), f(b)], 1)        for any f of the last axis alone, bit for bit

Cat, permute, transpose, reshape, flatten, slices, chunk, split and the like, as long as they spare the last axis.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from viditq_fx import ops
from viditq_fx.graph_edit import call, example, getitem
from viditq_fx.passes.dataflow import same_size
from viditq_fx.passes.effects import is_mutation, op_name
from viditq_fx.passes.spelling import arguments

_CATS = frozenset({"cat", "concat", "concatenate"})
_VIEWS = frozenset({"view", "reshape"})
_SWAPS = {
    "transpose": ("dim0", "dim1"),
    "swapdims": ("dim0", "dim1"),
    "swapaxes": ("axis0", "axis1"),
}
_PARTS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "chunk": (torch.chunk, ("chunks",)),
    "split": (torch.split, ("split_size_or_sections",)),
    "unbind": (torch.unbind, ()),
}
"""Op with several results -> its function and what it takes between the tensor and `dim`."""
_IDENTITIES = frozenset({"contiguous", "to", "type_as", "float", "double", "type"})
_WIDER = {
    torch.float16: frozenset({torch.float32, torch.float64}),
    torch.bfloat16: frozenset({torch.float32, torch.float64}),
    torch.float32: frozenset({torch.float64}),
}


@dataclass(frozen=True, kw_only=True)
class Move:
    """What one node does with whole rows, ready to be done with others."""

    sources: tuple[fx.Node, ...]
    """The tensors whose rows, all or some, unchanged, make up the node's value."""
    target: Callable[..., Any] | None = None
    """What is called; None where the rows stay where they are (contiguous, a cast that loses nothing)."""
    rest: tuple[Any, ...] = ()
    """Its arguments after the tensors."""
    item: int | None = None
    """Which of several results is meant."""

    def over(self, sources: Sequence[fx.Node], like: fx.Node, *, scales: bool) -> fx.Node:
        """Insert the same move over the integers of the sources, or over their scales: one for each row."""
        if self.target is None:
            return sources[0]
        graph, rest = like.graph, self.rest
        if self.target is torch.cat and not scales:
            return call(graph, ops.CAT_INT8.overload, (list(sources), *rest), like, torch.cat)
        if self.target is torch.reshape and scales:
            rest = ((*rest[0][:-1], 1),)
        first = list(sources) if self.target is torch.cat else sources[0]
        node = call(graph, self.target, (first, *rest), like)
        return node if self.item is None else getitem(graph, node, self.item, like)


def move_of(node: fx.Node) -> Move | None:
    """What a node does with rows; None where it does anything else, or may.

    A cast moves rows where the quantize of its result is that of its input: where it loses no bit.
    """
    value = example(node)
    if node.op not in {"call_function", "call_method"} or not isinstance(value, torch.Tensor):
        return None
    if value.dim() < 2 or is_mutation(node) or "out" in node.kwargs:
        return None
    move = _cat(node) if op_name(node) in _CATS else _move_of_one(node)
    if move is None or not all(_same_rows(source, value) for source in move.sources):
        return None
    return move


def _same_rows(source: Any, value: torch.Tensor) -> bool:
    """Whether rows are as long, and their numbers the same but for a wider type."""
    given = example(source) if isinstance(source, fx.Node) else None
    if not isinstance(given, torch.Tensor) or given.dim() < 2 or given.device != value.device:
        return False
    exact = given.dtype == value.dtype or value.dtype in _WIDER.get(given.dtype, ())
    return exact and same_size(given.shape[-1], value.shape[-1])


def _cat(node: fx.Node) -> Move | None:
    got = arguments(node, ("tensors", "dim"), dim=node.kwargs.get("axis", 0))
    if not isinstance(got["tensors"], list | tuple) or not _spares_last((got["dim"],), example(node).dim()):
        return None
    return Move(sources=tuple(got["tensors"]), target=torch.cat, rest=(got["dim"],))


def _move_of_one(node: fx.Node) -> Move | None:
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, fx.Node):
        return None
    name, whole = op_name(node), example(source)
    if not isinstance(whole, torch.Tensor):
        return _part(node, source) if name == "getitem" else None
    if name in _IDENTITIES:
        return Move(sources=(source,))
    if name == "getitem":
        index = node.args[1]
        taken = _index_spares_last(index, whole.dim())
        return Move(sources=(source,), target=node.target, rest=(index,)) if taken else None  # type: ignore[arg-type]
    called = _call_of(node, name, whole.dim())
    return None if called is None else Move(sources=(source,), target=called[0], rest=called[1])


def _call_of(node: fx.Node, name: str, rank: int) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """(function, arguments) of an op of one tensor of this rank that spares the last axis."""
    if name in _VIEWS:
        # Rows of a reshape's result are those of its input, in order, where they are as long.
        sizes = _listed(node, ("shape", "size"))
        given = bool(sizes) and all(isinstance(size, int | fx.Node) for size in sizes)
        return (torch.reshape, (sizes,)) if given else None
    if name == "permute":
        dims = _listed(node, ("dims",))
        kept = bool(dims) and isinstance(dims[-1], int) and dims[-1] % rank == rank - 1
        return (torch.permute, (dims,)) if kept else None
    if name in _SWAPS:
        got = arguments(node, ("input", *_SWAPS[name]))
        dims = tuple(got[axis] for axis in _SWAPS[name])
        return (torch.transpose, dims) if _spares_last(dims, rank) else None
    if name == "flatten":
        got = arguments(node, ("input", "start_dim", "end_dim"), start_dim=0, end_dim=-1)
        dims = (got["start_dim"], got["end_dim"])
        return (torch.flatten, dims) if _spares_last(dims, rank) else None
    if name == "unflatten" and not node.kwargs and len(node.args) == 3:
        dim, sizes = node.args[1:]
        return (torch.unflatten, (dim, sizes)) if _spares_last((dim,), rank) else None
    if name in {"unsqueeze", "squeeze"}:
        dim = arguments(node, ("input", "dim"), dim=None)["dim"]
        # Counted in the larger of the two shapes, the new or lost axis must stand before the last.
        spared = _spares_last((dim,), rank + 1 if name == "unsqueeze" else rank)
        return (getattr(torch, name), (dim,)) if spared else None
    if name in {"narrow", "select"}:
        names = ("input", "dim", "start", "length") if name == "narrow" else ("input", "dim", "index")
        got = arguments(node, names)
        rest = tuple(got[key] for key in names[1:])
        return (getattr(torch, name), rest) if _spares_last(rest[:1], rank) else None
    return None


def _part(node: fx.Node, parts: fx.Node) -> Move | None:
    """One of the results of chunk, split or unbind."""
    source = parts.args[0] if parts.args else None
    if op_name(parts) not in _PARTS or not isinstance(source, fx.Node) or is_mutation(parts):
        return None
    target, between = _PARTS[op_name(parts)]
    got = arguments(parts, ("input", *between, "dim"), dim=0)
    value, index = example(source), node.args[1]
    if not isinstance(value, torch.Tensor) or not isinstance(index, int):
        return None
    if not _spares_last((got["dim"],), value.dim()) or any(key not in got for key in between):
        return None
    return Move(
        sources=(source,), target=target, rest=(*(got[key] for key in between), got["dim"]), item=index
    )


def _listed(node: fx.Node, keywords: Sequence[str]) -> tuple[Any, ...]:
    """Sizes or axes, given as one list or one by one; empty when there are none."""
    listed: Any = node.args[1:] or tuple(node.kwargs[key] for key in keywords if key in node.kwargs)
    return tuple(listed[0]) if len(listed) == 1 and isinstance(listed[0], list | tuple) else tuple(listed)


def _spares_last(dims: Sequence[Any], rank: int) -> bool:
    return all(isinstance(dim, int) and dim % rank != rank - 1 for dim in dims)


def _index_spares_last(index: Any, rank: int) -> bool:
    """Whether x[index] takes whole rows: numbers, slices, None and `...` in front of the last axis."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(p is None or p is Ellipsis or type(p) is int or isinstance(p, slice) for p in parts):
        return False
    if any(p is Ellipsis for p in parts):
        place = next(i for i, p in enumerate(parts) if p is Ellipsis)
        tail = parts[place + 1 :]
        spared = not tail or tail[-1] == slice(None)
        return spared and sum(p is not None for p in (*parts[:place], *tail)) < rank
    named = sum(p is not None for p in parts)
    return named < rank or (named == rank and parts[-1] == slice(None))


def halves_of(node: fx.Node) -> fx.Node | None:
    """x where a node is cat([x[:n], x[n:]]) along one axis, whatever n: a stream split and joined again."""
    move = move_of(node) if op_name(node) in _CATS else None
    halves = [move_of(source) for source in move.sources] if move is not None else []
    if len(halves) != 2 or not all(half is not None and half.target is operator.getitem for half in halves):
        return None
    (head, tail), rank = halves, example(node).dim()
    assert move is not None
    assert head is not None
    assert tail is not None
    left, right = (_slices(half.rest[0], rank) for half in (head, tail))
    axis = move.rest[0] % rank
    if left is None or right is None or head.sources != tail.sources:
        return None
    cut = left[axis].stop
    if cut is None or (left[axis], right[axis]) != (slice(None, cut), slice(cut, None)):
        return None
    left[axis] = right[axis] = slice(None)
    return head.sources[0] if left == right == [slice(None)] * rank else None


def _slices(index: Any, rank: int) -> list[slice] | None:
    """One slice an axis; None where the index is not made of slices alone."""
    parts = list(index) if isinstance(index, tuple) else [index]
    plain = all(isinstance(part, slice) for part in parts)
    return [*parts, *[slice(None)] * (rank - len(parts))] if plain else None
