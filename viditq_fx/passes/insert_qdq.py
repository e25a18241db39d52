"""Put quantize and dequantize nodes round the operands of every planned linear.

    linear(x, w, b) -> linear(dequantize(quantize_per_token(x)), dequantize(quantize_per_channel(w)), b)

or what the site's scheme has in their place: quantize_per_group(w), quantize_weight_grid(w) with zero points,
quantize_per_block(x), quantize_static(x, scale). Where the site is balanced or rotated, both operands are first:

    linear(x, w, b) -> linear(dequantize(rotate_quantize(x, m)), dequantize(quantize(transform_weight(w, m))), b)

The graph still runs and shows, in plain nodes, what will be rounded where.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from viditq_fx import ops
from viditq_fx.graph_edit import call, example, getitem
from viditq_fx.ops.fp8 import fake_fp8_per_channel, fake_fp8_per_token
from viditq_fx.ops.low_rank import fake_low_rank
from viditq_fx.ops.quantize import fake_dequantized, fake_per_channel, fake_per_group, fake_per_token
from viditq_fx.ops.rotate import fake_rotate_quantize, fake_rotated
from viditq_fx.ops.static_scale import fake_static
from viditq_fx.passes.annotate_sites import SITE_KEY
from viditq_fx.passes.base import Match, Pass, PassContext, Reject
from viditq_fx.passes.effects import is_mutation, may_write
from viditq_fx.passes.site_plan import Transform, input_scale, multiplier_input, transform_of
from viditq_fx.scheme import QuantScheme
from viditq_fx.site import Site

SCHEME_KEY = "viditq_scheme"
"""Key of a node's meta that holds the scheme of the site it belongs to."""
TRANSFORM_KEY = "viditq_transform"
"""Key of the meta of a linear, and of what quantizes its weight, that holds their Transform."""
QUANTIZE_WEIGHT = (
    ops.QUANTIZE_PER_CHANNEL.overload,
    ops.QUANTIZE_PER_GROUP.overload,
    ops.QUANTIZE_WEIGHT_GRID.overload,
    ops.QUANTIZE_WEIGHT_LOW_RANK.overload,
    ops.QUANTIZE_FP8_PER_CHANNEL.overload,
)
"""Ops that return (integers or e4m3 numbers, scales) of a weight, zero points where its grid has them, a branch."""
_Key = tuple[object, ...]
"""What is quantized, and all that its integers depend on."""


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
                for key in [key for key in quantized if may_write(node, key[0], order)]:  # type: ignore[arg-type]
                    del quantized[key]
            entry = ctx.sites.get(node.name)
            if entry is None or entry.planned is None or entry.reason is not None or SCHEME_KEY in node.meta:
                continue
            if node.target is not torch.nn.functional.linear:
                continue
            scheme = QuantScheme.parse(entry.planned)
            site: Site = node.meta[SITE_KEY]
            transform = transform_of(site.fqn, entry.depth, scheme, ctx)
            x = node.args[0]
            _wrap_input(gm.graph, node, scheme, transform, quantized, ctx)
            _wrap_weight(gm.graph, node, x, scheme, transform, ctx)
            node.meta[SCHEME_KEY], node.meta[TRANSFORM_KEY] = scheme, transform
            results.append(Match(site=site, detail=str(scheme)))
        return tuple(results)


def _wrap_input(
    graph: fx.Graph,
    linear: fx.Node,
    scheme: QuantScheme,
    transform: Transform,
    quantized: dict[_Key, tuple[fx.Node, fx.Node]],
    ctx: PassContext,
) -> None:
    """Quantize the input; linears that share it and all that its integers depend on share one quantize."""
    x = linear.args[0]
    assert isinstance(x, fx.Node)
    with graph.inserting_before(linear):
        scale = None
        if scheme.calibrated:
            scale = input_scale(graph, linear.meta[SITE_KEY].fqn, scheme, linear, ctx)
        # Equal scales of calibration are one node, see input_scale.
        key = (x, scheme.input_bits, scheme.floating, scheme.block, transform, scale)
        if key not in quantized:
            pair = _quantize_input(graph, linear, scheme, transform, scale, ctx)
            quantized[key] = (getitem(graph, pair, 0, linear), getitem(graph, pair, 1, linear))
            _stamp((pair, *quantized[key]), linear, scheme, "input")
        q, scale = quantized[key]
        if scheme.block is None:
            operands = (q, scale, example(x).dtype)
            value = call(graph, ops.DEQUANTIZE_PER_TOKEN.overload, operands, linear, fake_dequantized)
        else:
            operands = (q, scale, scheme.block, example(x).dtype)
            value = call(graph, ops.DEQUANTIZE_PER_BLOCK.overload, operands, linear, fake_dequantized)
        _stamp((value,), linear, scheme, "input")
    linear.update_arg(0, value)


def _quantize_input(
    graph: fx.Graph,
    linear: fx.Node,
    scheme: QuantScheme,
    transform: Transform,
    scale: fx.Node | None,
    ctx: PassContext,
) -> fx.Node:
    """Insert the op that gives (integers, scales) of a linear's input."""
    x, bits = linear.args[0], scheme.input_bits
    assert isinstance(x, fx.Node)
    if scheme.floating:
        return call(graph, ops.QUANTIZE_FP8_PER_TOKEN.overload, (x,), linear, fake_fp8_per_token)
    multiplier = multiplier_input(graph, transform, x, ctx)
    if scale is not None:
        if transform:
            operands = (x, multiplier, transform.rotation)
            x = call(graph, ops.ROTATE.overload, operands, linear, fake_rotated)
        return call(graph, ops.QUANTIZE_STATIC.overload, (x, scale, bits), linear, fake_static)
    if transform.rotation > 1 or (transform and scheme.block is not None):
        operands = (x, multiplier, transform.rotation, bits, scheme.block or 0)
        return call(graph, ops.ROTATE_QUANTIZE.overload, operands, linear, fake_rotate_quantize)
    if scheme.block is not None:
        return call(graph, ops.QUANTIZE_PER_BLOCK.overload, (x, bits, scheme.block), linear)
    if multiplier is not None:  # by itself, so that it is folded into the norm or the activation that makes x
        x = call(graph, torch.mul, (x, multiplier), linear)
    return call(graph, ops.QUANTIZE_PER_TOKEN.overload, (x, bits), linear, fake_per_token)


def insert_weight_quantize(
    graph: fx.Graph,
    weight: fx.Node,
    scheme: QuantScheme,
    transform: Transform,
    like: fx.Node,
    ctx: PassContext,
) -> fx.Node:
    """Insert what gives (integers [N, K], scales[, zero points]) of a weight in this scheme."""
    value = weight
    if transform and not scheme.rank:
        multiplier = multiplier_input(graph, transform, weight, ctx)
        operands = (weight, multiplier, transform.rotation)
        value = call(graph, ops.TRANSFORM_WEIGHT.overload, operands, like, fake_rotated)
        _stamp((value,), like, scheme, "weight")
    if scheme.rank:
        op, fake = ops.QUANTIZE_WEIGHT_LOW_RANK, fake_low_rank
        moved = (multiplier_input(graph, transform, weight, ctx), transform.rotation)
        operands = (weight, *moved, scheme.rank, scheme.weight_bits, scheme.group or 0, scheme.grid or "")
    elif scheme.floating:
        op, fake, operands = ops.QUANTIZE_FP8_PER_CHANNEL, fake_fp8_per_channel, (value,)
    elif scheme.grid is not None:
        op, fake = ops.QUANTIZE_WEIGHT_GRID, None
        operands = (value, scheme.weight_bits, scheme.group or 0, scheme.grid)
    elif scheme.group is None:
        op, fake, operands = ops.QUANTIZE_PER_CHANNEL, fake_per_channel, (value, scheme.weight_bits)
    else:
        op, fake = ops.QUANTIZE_PER_GROUP, fake_per_group
        operands = (value, scheme.weight_bits, scheme.group)
    pair = call(graph, op.overload, operands, like, fake)
    pair.meta[TRANSFORM_KEY] = transform
    return pair


def quantized_weight(pair: fx.Node) -> fx.Node:
    """The weight that an op of QUANTIZE_WEIGHT quantizes, as it was before any transform."""
    weight = pair.args[0]
    assert isinstance(weight, fx.Node)
    if weight.target is ops.TRANSFORM_WEIGHT.overload:
        weight = weight.args[0]
        assert isinstance(weight, fx.Node)
    return weight


def _wrap_weight(
    graph: fx.Graph, linear: fx.Node, x: object, scheme: QuantScheme, transform: Transform, ctx: PassContext
) -> None:
    """Quantize the weight; `x` is the linear's input as it is in full precision."""
    w = linear.args[1]
    assert isinstance(w, fx.Node)
    assert isinstance(x, fx.Node)
    with graph.inserting_before(linear):
        pair = insert_weight_quantize(graph, w, scheme, transform, linear, ctx)
        parts = [getitem(graph, pair, index, linear) for index in range(len(example(pair)))]
        if scheme.grid is not None:
            back, group = ops.DEQUANTIZE_WEIGHT_GRID, (scheme.group or 0,)
        elif scheme.group is not None:
            back, group = ops.DEQUANTIZE_PER_GROUP, (scheme.group,)
        else:
            back, group = ops.DEQUANTIZE_PER_CHANNEL, ()
        operands = (*parts[: 3 if scheme.grid else 2], *group, example(w).dtype)
        value = call(graph, back.overload, operands, linear, fake_dequantized)
        _stamp((pair, *parts, value), linear, scheme, "weight")
    linear.update_arg(1, value)
    if scheme.rank:
        with graph.inserting_after(linear):
            operands = (linear, x, *parts[-2:], example(linear).dtype)
            added = call(graph, ops.ADD_LOW_RANK.overload, operands, linear)
        _stamp((added,), linear, scheme, "weight")
        linear.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)


def _stamp(nodes: tuple[fx.Node, ...], linear: fx.Node, scheme: QuantScheme, role: str) -> None:
    site: Site = linear.meta[SITE_KEY]
    for node in nodes:
        node.meta[SITE_KEY] = Site(site.fqn, role)
        node.meta[SCHEME_KEY] = scheme
