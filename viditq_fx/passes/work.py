"""Multiply-adds of every linear and attention of a graph, so that a report can say what share is quantized.

linear: 2 * M * K * N      attention: 2 * B * H * Lq * Lk * (D + Dv), masks and causality not deducted
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from viditq_fx.graph_edit import example
from viditq_fx.passes.annotate_sites import fqn_of_node, hint
from viditq_fx.passes.attention_form import FORM_KEY, PART_KEY
from viditq_fx.passes.base import PassContext
from viditq_fx.passes.convolution import row_sizes
from viditq_fx.passes.dataflow import DataFlow
from viditq_fx.passes.effects import op_name
from viditq_fx.passes.roles import ATTENTION_NAMES, MATMULS
from viditq_fx.report import SiteReport

ATTENTION = "attention"
"""Role of an attention call in a report."""
_NOT_QUANTIZED = (
    "a product of two activations, or attention in a call of its own: no softmax attention that we know"
)
_OPERANDS = ("query", "key", "value")
_PRODUCTS = MATMULS - {"einsum", "baddbmm", "addmm"}


def count_work(graph: fx.Graph, ctx: PassContext) -> None:
    """Fill in the FLOPs of each site, and list the attention calls that are no sites of their own.

    Symbolic sizes count as their hints, and the entry says so. Call it while attention is still whole.
    """
    flow: DataFlow | None = None
    for node in graph.nodes:
        shape = _attention_shape(node)
        entry = ctx.sites.get(node.name)
        if shape is None and entry is None and op_name(node) in _PRODUCTS and PART_KEY not in node.meta:
            flow = flow or DataFlow(graph)
            shape = _product_shape(node, flow)
        if entry is None and shape is not None:
            entry = SiteReport(fqn=fqn_of_node(node), role=ATTENTION, rows="", depth=0, width=0)
            entry.reason, entry.rows = _NOT_QUANTIZED, str(math.prod(shape[0]))
            entry.depth, entry.width = _known(shape[1]), _known(shape[2])
            ctx.report.attention.append(entry)
        if entry is not None:
            _fill(entry, shape or _linear_shape(node, entry))


_Shape = tuple[tuple[Any, ...], Any, Any, Any]
"""(sizes whose product is M, K, N, multiply-adds for each M * K * N)."""


def _fill(entry: SiteReport, shape: _Shape | None) -> None:
    if shape is None:
        return
    rows, depth, width, per = shape
    sizes = (*rows, depth, width)
    hints = [hint(size) for size in sizes]
    entry.flops_hinted = any(not isinstance(size, int) for size in sizes)
    entry.flops = 0 if None in hints else int(2 * per * math.prod(h for h in hints if h is not None))


def _known(size: Any) -> int:
    return hint(size) or 0


def _linear_shape(node: fx.Node, entry: SiteReport) -> _Shape | None:
    value = example(node)
    if not isinstance(value, torch.Tensor) or not entry.width:
        return None
    return row_sizes(node), entry.depth, entry.width, 1


def _attention_shape(node: fx.Node) -> _Shape | None:
    form = node.meta.get(FORM_KEY)
    given: dict[str, Any] = dict(zip(_OPERANDS, node.args, strict=False)) | dict(node.kwargs)
    if form is not None:
        given = {key: getattr(form, key) for key in _OPERANDS}
    elif op_name(node) not in ATTENTION_NAMES:
        return None
    values = [example(x) if isinstance(x := given.get(key), fx.Node) else None for key in _OPERANDS]
    if not all(isinstance(value, torch.Tensor) and value.dim() >= 3 for value in values):
        return None
    q, v = (value.shape for value in (values[0], values[2]) if value is not None)
    depth, value_depth = _known(q[-1]), _known(v[-1])
    return tuple(q[:-1]), q[-1], v[-2], 1 + value_depth / depth if depth else 2


def _product_shape(node: fx.Node, flow: DataFlow) -> _Shape | None:
    """A matmul of two activations: half an attention spelled out."""
    operands = [n for n in node.all_input_nodes if isinstance(example(n), torch.Tensor)]
    value = example(node)
    if len(operands) != 2 or not all(map(flow.is_content, operands)) or not isinstance(value, torch.Tensor):
        return None
    if value.dim() < 2:
        return None
    return tuple(value.shape[:-1]), example(operands[0]).shape[-1], value.shape[-1], 1
