"""Making nodes that Dynamo, AOTAutograd and Inductor take for Dynamo's own."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

_INHERITED = ("nn_module_stack", "stack_trace", "source_fn_stack")


def example(node: fx.Node) -> Any:
    """The fake value of a node, or None."""
    return node.meta.get("example_value")


def call(
    graph: fx.Graph,
    target: Any,
    args: tuple[Any, ...],
    like: fx.Node,
    fake: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> fx.Node:
    """Insert a call at the graph's insertion point, with its fake value and `like`'s provenance.

    `fake` gives that value from the fake arguments, where running `target` on them takes long.
    AOTAutograd's cache is bypassed for nodes that carry no `example_value`.
    """
    node = graph.call_function(target, args, kwargs)
    for key in _INHERITED:
        if key in like.meta:
            node.meta[key] = like.meta[key]
    fake_mode = fake_mode_of(node)
    values, named = fx.map_arg(args, example), fx.map_arg(kwargs, example)
    with fake_mode, torch.no_grad():
        node.meta["example_value"] = (fake or target)(*values, **named)
    return node


def getitem(graph: fx.Graph, node: fx.Node, index: int, like: fx.Node) -> fx.Node:
    """Insert `node[index]`."""
    item = graph.call_function(operator.getitem, (node, index))
    for key in _INHERITED:
        if key in like.meta:
            item.meta[key] = like.meta[key]
    item.meta["example_value"] = example(node)[index]
    return item


def fake_mode_of(node: fx.Node) -> Any:
    """The fake mode of a node's inputs."""
    for source in node.all_input_nodes:
        value = example(source)
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, FakeTensor):
                return tensor.fake_mode
    raise AssertionError(f"no input of {node.format_node()} carries a fake tensor")


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose placeholders can be added and erased: Dynamo re-reads those of its own `gm`."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, mapping)
    new_output = graph.output(result)
    new_output.meta = copy.copy(gm.graph.output_node().meta)
    for old, new in mapping.items():
        if old.op == "placeholder" and hasattr(old, "_dynamo_source"):
            setattr(new, "_dynamo_source", getattr(old, "_dynamo_source"))  # noqa: B009, B010
    duplicate = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    duplicate.meta = copy.copy(gm.meta)
    for name in ("_param_name_to_source", "dynamo_flat_name_to_original_fqn"):
        if hasattr(gm, name):
            setattr(duplicate, name, getattr(gm, name))
    return duplicate
