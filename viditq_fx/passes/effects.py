"""Which nodes of a Dynamo graph write into tensors, and which may be removed when nothing reads them.

Dynamo's graph is not functional. What is not known to be pure stays, and what may write is taken
to write: a missed optimisation is cheap, a lost write is a wrong picture.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import fx

_INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in (
        *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift", "iconcat"),
    )
)
_INPLACE_METHODS = frozenset({"__setitem__"} | {f"__{op.__name__}__" for op in _INPLACE_OPERATORS})
_PURE_MODULES = frozenset(
    {"torch", "torch.functional", "torch.nn.functional", "torch._C._nn", "_operator", "math", "builtins"}
    | {"torch._C._linalg", "torch._C._fft", "torch._C._special", "torch.nn.init", "torch._VF"}
)
_PURE_NAMESPACES = frozenset({"aten", "prims", "viditq"})
_IMPURE_NAMES = ("rand", "bernoulli", "normal", "multinomial", "manual_seed", "seed", "record_function")
_IMPURE_PARTS = ("dropout", "print", "assert", "breakpoint", "uniform", "exponential")
_MAY_ALIAS = frozenset(
    {"view", "reshape", "unflatten", "flatten", "transpose", "permute", "chunk", "split", "unbind", "getitem"}
    | {"squeeze", "unsqueeze", "narrow", "expand", "contiguous", "t", "movedim", "select", "tensor_split"}
    | {
        "view_as",
        "reshape_as",
        "expand_as",
        "swapaxes",
        "diagonal",
        "unfold",
        "as_strided",
        "detach",
        "getattr",
    }
    | {"view_as_real", "view_as_complex", "real", "imag", "dropout", "relu", "to", "float", "type_as", "half"}
    | {"bfloat16", "type", "double", "alias", "split_with_sizes", "hsplit", "vsplit", "ravel", "adjoint"}
    | {"swapdims", "moveaxis", "broadcast_to", "dsplit", "unsafe_chunk", "unsafe_split"}
    | {"dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout"}
    | {"atleast_1d", "atleast_2d", "atleast_3d", "cpu", "cuda", "positive", "conj", "resolve_conj"}
)
"""Results that may share memory with the first argument; casts do where the dtype is the same already."""


_FRESH = frozenset(
    {"empty_like", "zeros_like", "ones_like", "full_like", "empty", "zeros", "ones", "full", "clone"}
    | {"new_empty", "new_zeros", "new_ones", "new_full", "linear", "layer_norm", "rms_norm", "add", "mul"}
    | {"cat", "stack", "matmul", "bmm", "softmax"}
)
"""Results that are always memory of their own, when the call is no write."""


def op_name(node: fx.Node) -> str:
    """Bare name of what a node calls: "linear", "scaled_dot_product_attention", "add_", ..."""
    target = node.target
    if isinstance(target, str):
        return target
    packet = getattr(target, "_overloadpacket", None)
    if packet is not None:
        return packet.__name__
    return getattr(target, "__name__", str(target))


def written_inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments that a node may write into."""
    if node.op == "call_method":
        name = str(node.target)
        written = name in _INPLACE_METHODS or (name.endswith("_") and not name.endswith("__"))
        return _first(node) if written else ()
    if node.op != "call_function":
        return ()
    outs = _nodes_in(node.kwargs.get("out"))
    if isinstance(node.target, torch._ops.OpOverload):
        return (*outs, *_written_by_schema(node, node.target._schema))
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        schemas = [getattr(node.target, name)._schema for name in node.target.overloads()]
        return tuple(node.all_input_nodes) if any(s.is_mutable for s in schemas) else outs
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return tuple(node.all_input_nodes) if "mutation" in node.target.name() else outs
    name = op_name(node)
    inplace_name = name.endswith("_") and not name.endswith("__")
    if node.target is operator.setitem or node.target in _INPLACE_OPERATORS or inplace_name:
        return (*_first(node), *outs)
    return (*_first(node), *outs) if _is_told_inplace(node) else outs


def is_mutation(node: fx.Node) -> bool:
    """Whether a node may write into one of its arguments."""
    return bool(written_inputs(node))


def write_roots(graph: fx.Graph) -> set[fx.Node]:
    """Every node whose memory some node of the graph may write, through however many views."""
    roots: set[fx.Node] = set()
    for node in graph.nodes:
        for target in written_inputs(node):
            roots.update(aliased_chain(target))
    return roots


def may_write(node: fx.Node, value: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether a node may write into `value`'s memory; `order` is each node's place in the graph.

    It cannot where it writes memory that was made after `value` was.
    """
    for target in written_inputs(node):
        *_, root = aliased_chain(target)
        if not (_makes_memory(root) and order[root] > order[value]):
            return True
    return False


def _makes_memory(node: fx.Node) -> bool:
    """Whether a node's result is memory of its own."""
    if node.op not in {"call_function", "call_method"} or is_mutation(node):
        return False
    ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "viditq"
    return ours or op_name(node) in _FRESH


class Writes:
    """The writes of one graph, and what they may change between two of its nodes."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._nodes = [node for node in graph.nodes if is_mutation(node)]
        self._order: dict[fx.Node, int] = {}
        self.roots = write_roots(graph)

    def between(self, start: fx.Node, end: fx.Node, values: Iterable[fx.Node]) -> fx.Node | None:
        """A node from `start` to `end` that may write one of the values; None if nothing does."""
        if not self._nodes:
            return None
        values = tuple(values)
        if any(node not in self._order for node in (start, end, *values)):  # a pass has inserted some
            self._order = {node: index for index, node in enumerate(self._graph.nodes)}
            self._nodes = [node for node in self._nodes if node in self._order]  # a pass has erased some
        order = self._order
        for node in self._nodes:
            if order[start] < order[node] < order[end] and any(may_write(node, v, order) for v in values):
                return node
        return None


def is_hidden_write(node: fx.Node) -> bool:
    """Whether nothing but what reads the node's result sees what it writes: it may go when its result does."""
    targets = written_inputs(node)
    return bool(targets) and all(
        list(target.users) == [node]
        and (is_hidden_write(target) if is_mutation(target) else _makes_memory(target))
        for target in targets
    )


def may_alias(node: fx.Node) -> bool:
    """Whether a node's result may share memory with its first argument though it writes nothing."""
    return op_name(node) in _MAY_ALIAS


def aliased_chain(node: fx.Node) -> Iterator[fx.Node]:
    """`node`, and what it may be a view of, innermost last."""
    while True:
        yield node
        first = node.args[0] if node.args else node.kwargs.get("input")
        if node.op not in {"call_function", "call_method"} or not isinstance(first, fx.Node):
            return
        if not may_alias(node) and not is_mutation(node):
            return
        node = first


def is_removable(node: fx.Node) -> bool:
    """Whether a node can go when nothing reads it: only what is known to be pure."""
    if node.op not in {"call_function", "call_method"} or is_mutation(node) or "out" in node.kwargs:
        return False
    name, target = op_name(node), node.target
    if name.startswith(("_", *_IMPURE_NAMES)) or any(part in name for part in _IMPURE_PARTS):
        return False
    if node.op == "call_method":
        return True
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in _PURE_NAMESPACES
    if isinstance(target, torch._ops.OpOverloadPacket | torch._ops.HigherOrderOperator):
        return False
    return _home(target) in _PURE_MODULES


def _home(target: Any) -> str:
    module = getattr(target, "__module__", None)
    # Builtins of torch (torch.cat, torch.empty_like) carry no module: they are found as its attributes.
    return module or ("torch" if getattr(torch, getattr(target, "__name__", ""), None) is target else "")


def _first(node: fx.Node) -> tuple[fx.Node, ...]:
    first = node.args[0] if node.args else node.kwargs.get("input")
    return (first,) if isinstance(first, fx.Node) else ()


def _nodes_in(value: Any) -> tuple[fx.Node, ...]:
    found: list[fx.Node] = []
    fx.map_arg(value, lambda n: found.append(n))
    return tuple(found)


def _written_by_schema(node: fx.Node, schema: Any) -> Iterator[fx.Node]:
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            yield from _nodes_in(value)


def _is_told_inplace(node: fx.Node) -> bool:
    """Whether the call says inplace=True, by name or by position."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    assert callable(node.target)
    position = _inplace_position(node.target)
    return position is not None and len(node.args) > position and node.args[position] is not False


@lru_cache(maxsize=512)
def _inplace_position(target: Callable[..., Any]) -> int | None:
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # builtins tell no signature; none of them takes `inplace`
        return None
    return names.index("inplace") if "inplace" in names else None
