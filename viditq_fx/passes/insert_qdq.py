"""Put quantize and dequantize nodes round the operands of every planned linear.

    linear(x, w, b) -> linear(dequantize(quantize_per_token(x)), dequantize(quantize_per_channel(w)), b)

or quantize_per_group(w), where the scheme has groups. The graph still runs and shows, in plain nodes, what will
be rounded where.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from viditq_fx import ops
from viditq_fx.graph_edit import call, example, getitem
from viditq_fx.ops.fp8 import fake_fp8_per_channel, fake_fp8_per_token
from viditq_fx.ops.quantize import fake_dequantized, fake_per_channel, fake_per_group, fake_per_token
from viditq_fx.passes.annotate_sites import SITE_KEY
from viditq_fx.passes.base import Match, Pass, PassContext, Reject
from viditq_fx.passes.effects import is_mutation, may_write
from viditq_fx.scheme import QuantScheme
from viditq_fx.site import Site

SCHEME_KEY = "viditq_scheme"
"""Key of a node's meta that holds the scheme of the site it belongs to."""
QUANTIZE_WEIGHT = (
    ops.QUANTIZE_PER_CHANNEL.overload,
    ops.QUANTIZE_PER_GROUP.overload,
    ops.QUANTIZE_FP8_PER_CHANNEL.overload,
)
"""Ops that return (integers or e4m3 numbers, scales) of a weight."""
_Key = tuple[fx.Node, int, bool]
"""What is quantized, its bits, and whether they are floating point."""


@dataclass(frozen=True, kw_only=True)
class InsertQdq(Pass):
    """Insert the nodes that change numerics; everything after this pass keeps them."""

    name: ClassVar[str] = "insert_qdq"
    changes_numerics: ClassVar[bool] = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> tuple[Match | Reject, ...]:
        results: list[Match | Reject] = []
        quantized: dict[_Key, tuple[fx.Node, fx.Node]] = {}
        order = {node: index for index, node in enumerate(gm.graph.nodes)}
        for node in order:
            if is_mutation(node):
                for key in [key for key in quantized if may_write(node, key[0], order)]:
                    del quantized[key]
            entry = ctx.sites.get(node.name)
            if entry is None or entry.planned is None or entry.reason is not None or SCHEME_KEY in node.meta:
                continue
            if node.target is not torch.nn.functional.linear:
                continue
            scheme = QuantScheme.parse(entry.planned)
            site: Site = node.meta[SITE_KEY]
            _wrap_input(gm.graph, node, scheme, quantized)
            _wrap_weight(gm.graph, node, scheme)
            node.meta[SCHEME_KEY] = scheme
            results.append(Match(site=site, detail=str(scheme)))
        return tuple(results)


def _wrap_input(
    graph: fx.Graph,
    linear: fx.Node,
    scheme: QuantScheme,
    quantized: dict[_Key, tuple[fx.Node, fx.Node]],
) -> None:
    """Quantize the input; linears that share it share one quantize."""
    x = linear.args[0]
    assert isinstance(x, fx.Node)
    key = (x, scheme.input_bits, scheme.floating)
    with graph.inserting_before(linear):
        if key not in quantized:
            if scheme.floating:
                pair = call(graph, ops.QUANTIZE_FP8_PER_TOKEN.overload, (x,), linear, fake_fp8_per_token)
            else:
                operands = (x, scheme.input_bits)
                pair = call(graph, ops.QUANTIZE_PER_TOKEN.overload, operands, linear, fake_per_token)
            quantized[key] = (getitem(graph, pair, 0, linear), getitem(graph, pair, 1, linear))
            _stamp((pair, *quantized[key]), linear, scheme, "input")
        q, scale = quantized[key]
        operands = (q, scale, example(x).dtype)
        value = call(graph, ops.DEQUANTIZE_PER_TOKEN.overload, operands, linear, fake_dequantized)
        _stamp((value,), linear, scheme, "input")
    linear.update_arg(0, value)


def insert_weight_quantize(graph: fx.Graph, weight: fx.Node, scheme: QuantScheme, like: fx.Node) -> fx.Node:
    """Insert the op that gives (integers [N, K], scales) of a weight in this scheme."""
    if scheme.floating:
        op, fake, operands = ops.QUANTIZE_FP8_PER_CHANNEL, fake_fp8_per_channel, (weight,)
    elif scheme.group is None:
        op, fake, operands = ops.QUANTIZE_PER_CHANNEL, fake_per_channel, (weight, scheme.weight_bits)
    else:
        op, fake = ops.QUANTIZE_PER_GROUP, fake_per_group
        operands = (weight, scheme.weight_bits, scheme.group)
    return call(graph, op.overload, operands, like, fake)


def _wrap_weight(graph: fx.Graph, linear: fx.Node, scheme: QuantScheme) -> None:
    w = linear.args[1]
    assert isinstance(w, fx.Node)
    with graph.inserting_before(linear):
        pair = insert_weight_quantize(graph, w, scheme, linear)
        q, scale = getitem(graph, pair, 0, linear), getitem(graph, pair, 1, linear)
        back, group = ops.DEQUANTIZE_PER_CHANNEL, ()
        if scheme.group is not None:
            back, group = ops.DEQUANTIZE_PER_GROUP, (scheme.group,)
        operands = (q, scale, *group, example(w).dtype)
        value = call(graph, back.overload, operands, linear, fake_dequantized)
        _stamp((pair, q, scale, value), linear, scheme, "weight")
    linear.update_arg(1, value)


def _stamp(nodes: tuple[fx.Node, ...], linear: fx.Node, scheme: QuantScheme, role: str) -> None:
    site: Site = linear.meta[SITE_KEY]
    for node in nodes:
        node.meta[SITE_KEY] = Site(site.fqn, role)
        node.meta[SCHEME_KEY] = scheme
