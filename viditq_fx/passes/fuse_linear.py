"""Fold dequantize into the linear that reads it.

linear(dequantize(xq, s_x), dequantize(wq, s_w), b) -> linear_w8a8(xq, s_x, wq, s_w, b, dtype)
                                                    -> linear_w4a8(xq, s_x, pack_int4(wq), s_w, b, dtype)

and, where the weight has zero points z,            -> add_zero_point(linear(..., fp32), xq, s_x, s_w, z, dtype)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from viditq_fx import ops
from viditq_fx.graph_edit import call, example
from viditq_fx.passes.annotate_sites import SITE_KEY
from viditq_fx.passes.base import Match, Pass, PassContext, Reject
from viditq_fx.passes.insert_qdq import SCHEME_KEY, TRANSFORM_KEY
from viditq_fx.scheme import QuantScheme


@dataclass(frozen=True, kw_only=True)
class FuseLinear(Pass):
    """Turn each quantized linear into one integer linear; the value changes only by rounding."""

    name: ClassVar[str] = "fuse_linear"
    changes_numerics: ClassVar[bool] = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> tuple[Match | Reject, ...]:
        results: list[Match | Reject] = []
        for node in list(gm.graph.nodes):
            if SCHEME_KEY not in node.meta or node.target is not torch.nn.functional.linear:
                continue
            scheme = node.meta[SCHEME_KEY]
            x, w, bias = (*node.args, None)[:3]
            assert isinstance(x, fx.Node)
            assert isinstance(w, fx.Node)
            with gm.graph.inserting_before(node):
                stored = insert_pack(gm.graph, w.args[0], scheme, node)
                packed = _pack_input(gm.graph, x.args[0], scheme, node)
                fused, whole = insert_linear(
                    gm.graph, packed, x.args[:2], (stored, *w.args[1 : 2 + bool(scheme.grid)]), bias, node
                )
            node.replace_all_uses_with(whole)
            entry = ctx.sites.pop(node.name)
            entry.done = str(scheme)
            ctx.sites[fused.name] = entry
            gm.graph.erase_node(node)
            for dequantize in (x, w):
                if not dequantize.users:
                    gm.graph.erase_node(dequantize)
            results.append(Match(site=fused.meta[SITE_KEY], detail=fused.name))
        return tuple(results)


def insert_linear(
    graph: fx.Graph, packed: Any, x: Any, weight: tuple[Any, ...], bias: Any, like: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """Insert the linear of `like`'s scheme: (its own node, the node of its result, zero points taken off).

    `packed` is the input as the linear reads it, `x` its integers and scales, `weight` what is stored.
    """
    scheme, dtype = like.meta[SCHEME_KEY], example(like).dtype
    if scheme.rank:  # the branch is added in fp32, and casts
        dtype = torch.float32
    stored, scale, *zero = weight
    operands = (packed, x[1], stored, scale, bias, torch.float32 if zero else dtype)
    extra = (example(x[0]).shape[-1],) if scheme.block and scheme.input_bits == 4 else ()
    fused = whole = call(graph, ops.linear_of(scheme).overload, (*operands, *extra), like)
    if zero:
        operands = (fused, x[0], x[1], scale, zero[0], dtype)
        whole = call(graph, ops.ADD_ZERO_POINT.overload, operands, like)
    for node in (fused, whole):
        for key in (SITE_KEY, SCHEME_KEY, TRANSFORM_KEY):
            node.meta[key] = like.meta[key]
    return fused, whole


def _pack_input(graph: fx.Graph, integers: Any, scheme: QuantScheme, like: fx.Node) -> Any:
    """The input as the linear of a scheme takes it: linears that share it share what packs it."""
    if not (scheme.block and scheme.input_bits == 4):
        return integers
    known = [user for user in integers.users if user.target is ops.PACK_INT4.overload]
    return known[0] if known else insert_pack(graph, integers, scheme, like)


def insert_pack(graph: fx.Graph, integers: Any, scheme: QuantScheme, like: fx.Node) -> Any:
    """The weight as the linear of a scheme takes it: the integers themselves, or 4-bit ones two to a byte."""
    if not scheme.weight_form.nibbles:
        return integers
    packed = call(graph, ops.PACK_INT4.overload, (integers,), like)
    packed.meta[SITE_KEY], packed.meta[SCHEME_KEY] = integers.meta[SITE_KEY], scheme
    return packed
