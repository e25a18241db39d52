"""Data flow of a Dynamo graph: which values depend on what, mutation and metadata edges included.

Dynamo's graph is not functional: rotary embeddings write lanes with `setitem`, so the written
tensor depends on the write. And some edges carry only metadata: `x.type_as(y)` does not depend
on y's values. Both matter to every question about roles.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Iterable
from enum import Flag, auto
from types import CodeType
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import statically_known_true

from viditq_fx.graph_edit import example
from viditq_fx.passes.convolution import channel_dim, is_pointwise_conv, row_sizes
from viditq_fx.passes.effects import aliased_chain, op_name, written_inputs

_METADATA_ONLY = frozenset(
    {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones"}
    | {"new_empty", "new_full", "new_tensor", "size", "dim", "stride", "numel"}
)
_ORDER_KEEPING = frozenset({"view", "reshape", "flatten", "squeeze"})
_VALUES = frozenset({"T", "mT", "H", "mH", "real", "imag", "data"})
"""Attributes of a tensor that hold its values; the others tell its shape, dtype or device."""
FIRST_ONLY = frozenset(
    {"type_as", "expand_as", "view_as", "reshape_as", "to", "add_zero_point", "add_low_rank"}
)
"""Ops that take values from their first argument, and at most a shape, a type or a correction from the others."""


class Taint(Flag):
    """What a value depends on. Anything that depends on content is content, whatever else it holds."""

    NONE = 0
    PARAMETER = auto()
    CONDITION = auto()
    """Timestep, class, guidance, pooled text: one vector for a sample, or per frame."""
    STRUCTURE = auto()
    """Masks, positions, token types."""
    CONTENT = auto()
    PROJECTED = auto()
    """Content that has passed a linear: a sinusoid of it is an activation, not an embedding of positions."""


def is_parameter(node: fx.Node) -> bool:
    """Whether a placeholder (or attribute) holds a parameter or buffer of the compiled module."""
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    source = source_name(node)
    if "_parameters[" in source or "_buffers[" in source:
        return True
    return isinstance(example(node), torch.nn.Parameter)


def weight_parameter(node: fx.Node) -> fx.Node | None:
    """The parameter [N, ...] that a linear's weight [N, K] is, flattened or not; None for a computed one."""
    root = node
    while not is_parameter(root):
        source = root.args[0] if root.args else None
        if op_name(root) not in _ORDER_KEEPING or not isinstance(source, fx.Node):
            return None
        if len(root.all_input_nodes) > 1:  # a size that the graph computes
            return None
        root = source
    whole, value = example(root), example(node)
    same_rows = root is node or (whole.dtype == value.dtype and whole.shape[:1] == value.shape[:1])
    return root if same_rows else None


def source_name(node: fx.Node) -> str:
    """Dynamo's name of where a placeholder comes from, or "" when it has none."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "") if source is not None else ""
    return name if isinstance(name, str) else name()


def is_argument(node: fx.Node, name: str) -> bool:
    """Whether a placeholder is an argument of the compiled function, and no entry of a dict that is one.

    Its own parameter, or what it takes by name in **kwargs.
    """
    own, told = f"L[{name!r}]", source_name(node)
    if told == own:
        return True
    base = getattr(getattr(node, "_dynamo_source", None), "base", None)
    local = getattr(base, "local_name", None)  # only what is a local itself has one
    if local is None or told != f"L[{local!r}][{name!r}]":
        return False
    from torch._dynamo.symbolic_convert import InstructionTranslator  # slow to import, and loaded by then

    return local == _keywords_of(InstructionTranslator.current_tx().f_code)


def _keywords_of(code: CodeType) -> str | None:
    """What a function calls its **kwargs; None where it takes none."""
    named = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    return code.co_varnames[named] if code.co_flags & inspect.CO_VARKEYWORDS else None


def is_constant_argument(name: str) -> bool:
    """Whether the graph that is being compiled was captured for one value of this argument, as for a Python number."""
    tracing = TracingContext.try_get()
    guards = () if tracing is None else tracing.guards_context.dynamo_guards
    constant = ("CONSTANT_MATCH", "EQUALS_MATCH")
    return any(guard.name == f"L[{name!r}]" and guard.create_fn_name() in constant for guard in guards)


class DataFlow:
    """Value dependencies of one graph, and what each value is tainted by."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = tuple(graph.nodes)
        self._written: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.nodes:
            for target in written_inputs(node):
                for written in aliased_chain(target):
                    self._written[written].append(node)
        self.taint = self._propagate()

    def inputs(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Nodes whose values `node`'s value depends on, writes into it included."""
        name = op_name(node)
        direct: Iterable[fx.Node] = node.all_input_nodes
        if name in _METADATA_ONLY or (
            name == "getattr" and node.op == "call_function" and node.args[1] not in _VALUES
        ):
            direct = ()
        elif name in FIRST_ONLY and node.args and isinstance(node.args[0], fx.Node):
            direct = (node.args[0],)
        return (*direct, *self._written.get(node, ()))

    def _propagate(self) -> dict[fx.Node, Taint]:
        batch = _batch_size(self.nodes)
        pooling = batch if _has_tokens(self.nodes) else None
        taint: dict[fx.Node, Taint] = {}
        for _ in range(2):  # a write may stand after its first reader: the second sweep carries it back
            for node in self.nodes:
                value = _leaf_taint(node, batch)
                for source in self.inputs(node):
                    value |= taint.get(source, Taint.NONE)
                taint[node] = _transform(node, value, pooling)
        return taint

    def is_content(self, node: fx.Node) -> bool:
        """Whether the node's value depends on the model's content input."""
        return Taint.CONTENT in self.taint[node]


def _batch_size(nodes: tuple[fx.Node, ...]) -> object:
    """First dimension of the first content-shaped placeholder; None when there is none."""
    for node in nodes:
        value = example(node)
        if node.op == "placeholder" and isinstance(value, torch.Tensor) and not is_parameter(node):
            if value.is_floating_point() and value.dim() >= 3:
                return value.shape[0]
    return None


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal, without asking in a way that adds a guard to the compiled graph."""
    return statically_known_true(a == b)


def same_shape(one: torch.Size, other: torch.Size) -> bool:
    """Whether two shapes are equal, as `same_size` asks of sizes."""
    return len(one) == len(other) and all(map(same_size, one, other))


def _is_linear(node: fx.Node) -> bool:
    if node.target is torch.nn.functional.linear or op_name(node).startswith("linear_w"):
        return True
    return is_pointwise_conv(node)


def _is_linear_over(node: fx.Node, rows: object) -> bool:
    """Whether a node is a linear with this many rows."""
    if not _is_linear(node) or (is_pointwise_conv(node) and channel_dim(node) == 0):  # one sample, no batch
        return False
    value = example(node)
    return (
        isinstance(value, torch.Tensor) and value.dim() >= 2 and same_size(math.prod(row_sizes(node)), rows)
    )


def _has_tokens(nodes: tuple[fx.Node, ...]) -> bool:
    """Whether the placeholder that gave the batch has more rows than samples, i.e. rows are tokens."""
    for node in nodes:
        value = example(node)
        if node.op == "placeholder" and isinstance(value, torch.Tensor) and not is_parameter(node):
            if value.is_floating_point() and value.dim() >= 3:
                return not same_size(_rows(value), value.shape[0])
    return False


def _rows(value: torch.Tensor) -> Any:
    return math.prod(value.shape[:-1])


def _leaf_taint(node: fx.Node, batch: object) -> Taint:
    if node.op == "get_attr":
        return Taint.PARAMETER
    if node.op != "placeholder":
        return Taint.NONE
    if is_parameter(node):
        return Taint.PARAMETER
    value = example(node)
    if not isinstance(value, torch.Tensor):
        return Taint.NONE
    if value.dtype == torch.bool:
        return Taint.STRUCTURE
    if value.dim() <= 1:
        return Taint.CONDITION
    if not value.is_floating_point() and not value.is_complex():
        return Taint.STRUCTURE
    if value.dim() == 2 and batch is not None and same_size(value.shape[0], batch):
        return Taint.CONDITION
    return Taint.CONTENT


def _transform(node: fx.Node, taint: Taint, batch: object) -> Taint:
    name = op_name(node)
    if batch is not None and Taint.CONTENT in taint and _is_linear_over(node, batch):
        # One row for each sample is a pooled vector (text, image): it conditions, as a given one does.
        return (taint & ~Taint.CONTENT) | Taint.CONDITION
    if _is_linear(node) and Taint.CONTENT in taint:
        return taint | Taint.PROJECTED
    if name in {"sin", "cos"} and Taint.CONTENT in taint and Taint.PROJECTED not in taint:
        # A sinusoid of an input is an embedding of times or positions.
        return (taint & ~Taint.CONTENT) | Taint.CONDITION
    if name == "embedding":
        value = example(node)
        tokens = isinstance(value, torch.Tensor) and value.dim() >= 3
        return Taint.CONTENT if tokens else Taint.CONDITION
    return taint
