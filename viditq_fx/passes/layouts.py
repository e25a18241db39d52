"""How values lie in memory: what reads a tensor may take its strides for granted."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from viditq_fx.graph_edit import example, fake_mode_of
from viditq_fx.passes.dataflow import same_size
from viditq_fx.passes.effects import is_mutation, may_alias

_OURS = frozenset({"aten", "prims", "viditq"})


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike; the stride of a dimension of size 1 says nothing."""
    return all(
        same_size(size, 1) or same_size(one, other)
        for size, one, other in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def wants_memory_of_its_own(node: fx.Node, value: torch.Tensor) -> bool:
    """Whether a reader of `node`, maybe through views, cannot do with `value`: the same numbers, strided otherwise.

    A `view` may be none of other strides; what leaves the graph is read by code that saw the model's own; an op from
    outside may want contiguous memory where the model gave it that.
    """
    ahead: list[tuple[fx.Node, Any]] = [(node, value)]
    while ahead:
        source, held = ahead.pop()
        for user in source.users:
            if _takes_layout(user, example(source), held):
                return True
            if not isinstance(example(user), torch.Tensor | tuple | list):
                continue
            if is_mutation(user) and user.args and user.args[0] is source:
                ahead.append((user, held))
            elif may_alias(user) and user.args and user.args[0] is source:
                try:
                    ahead.append((user, _rerun(user, source, held)))
                except (RuntimeError, ValueError):  # a view that those strides do not allow
                    return True
    return False


def _takes_layout(user: fx.Node, model: Any, held: Any) -> bool:
    if not isinstance(model, torch.Tensor):
        return False
    if user.op == "output":
        return not same_layout(model, held)
    if not isinstance(user.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return False
    foreign = str(user.target).partition(".")[0] not in _OURS
    return foreign and model.is_contiguous() and not same_layout(model, held)


def _rerun(user: fx.Node, source: fx.Node, held: Any) -> Any:
    """What a view of `source` is where that is `held`, as fake values."""

    def value(node: fx.Node) -> Any:
        return held if node is source else example(node)

    args, named = fx.map_arg(user.args, value), fx.map_arg(user.kwargs, value)
    with fake_mode_of(user), torch.no_grad():
        if user.op == "call_method":
            return getattr(args[0], str(user.target))(*args[1:], **named)
        assert callable(user.target)
        return user.target(*args, **named)
