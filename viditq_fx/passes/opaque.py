"""Calls that hide a GEMM with a parameter from the passes, and the sentence that says so.

No linear is left out in silence: what is not spelled F.linear and holds a weight gets a line in the
report with its reason.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from viditq_fx.graph_edit import example
from viditq_fx.passes.dataflow import is_parameter
from viditq_fx.passes.effects import aliased_chain, op_name

_PRODUCTS = frozenset({"matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "addbmm", "tensordot", "inner"})
_FUSED = {
    "multi_head_attention_forward": "F.multi_head_attention_forward hides its four projections in one call",
    "_transformer_encoder_layer_fwd": "nn.TransformerEncoderLayer's fast path hides its linears in one call",
    "_native_multi_head_attention": "nn.MultiheadAttention's fast path hides its projections in one call",
    "bilinear": "a bilinear layer is not a GEMM of one input: only F.linear is quantized",
}


def why_opaque(node: fx.Node) -> str | None:
    """Why the linears inside this call are not sites of their own; None if there are none."""
    if node.op not in {"call_function", "call_method"}:
        return None
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return _why_higher_order(node)
    name = op_name(node)
    if name in _FUSED:
        return _FUSED[name]
    if (name in _PRODUCTS or node.target is operator.matmul) and any(map(_is_weight, node.all_input_nodes)):
        return f"a product with a parameter spelled as {name}: only F.linear (nn.Linear) is quantized"
    return None


def _is_weight(node: fx.Node) -> bool:
    """A parameter of two or three dimensions, or a view or cast of one."""
    *_, root = aliased_chain(node)
    value = example(root)
    return (
        isinstance(value, torch.Tensor) and value.dim() in {2, 3} and _has_rows(value) and is_parameter(root)
    )


def _has_rows(value: torch.Tensor) -> bool:
    return value.is_floating_point() and value.shape[-2] != 1


def _why_higher_order(node: fx.Node) -> str | None:
    count = sum(_count_linears(argument, node) for argument in node.args)
    if not count:
        return None
    linears = "a linear" if count == 1 else f"{count} linears"
    return f"{linears} inside torch's higher-order op {node.target.name()}: its body is left as it is"  # type: ignore[union-attr]


def _count_linears(argument: Any, node: fx.Node) -> int:
    """Linears in the sub-graph that an argument of a higher-order op names, sub-graphs in it included."""
    owner = node.graph.owning_module
    if not isinstance(argument, fx.Node) or argument.op != "get_attr" or owner is None:
        return 0
    body = owner
    for step in str(argument.target).split("."):
        body = getattr(body, step, None)
    if not isinstance(body, fx.GraphModule):
        return 0
    inner = [n for module in body.modules() if isinstance(module, fx.GraphModule) for n in module.graph.nodes]
    return sum(n.target is torch.nn.functional.linear for n in inner)
