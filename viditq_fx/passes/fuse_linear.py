"""Fold dequantize into the linear that reads it.

linear(dequantize(xq, s_x), dequantize(wq, s_w), b) -> linear_w8a8(xq, s_x, wq, s_w, b, dtype)
                                                    -> linear_w4a8(xq, s_x, pack_int4(wq), s_w, b, dtype)
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
from viditq_fx.passes.insert_qdq import SCHEME_KEY
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
                operands = (x.args[0], x.args[1], stored, w.args[1], bias, example(node).dtype)
                fused = call(gm.graph, ops.LINEARS[str(scheme)].overload, operands, node)
            fused.meta[SITE_KEY], fused.meta[SCHEME_KEY] = node.meta[SITE_KEY], scheme
            node.replace_all_uses_with(fused)
            entry = ctx.sites.pop(node.name)
            entry.done = str(scheme)
            ctx.sites[fused.name] = entry
            gm.graph.erase_node(node)
            for dequantize in (x, w):
                if not dequantize.users:
                    gm.graph.erase_node(dequantize)
            results.append(Match(site=fused.meta[SITE_KEY], detail=fused.name))
        return tuple(results)


def insert_pack(graph: fx.Graph, integers: Any, scheme: QuantScheme, like: fx.Node) -> Any:
    """The weight as the linear of a scheme takes it: the integers themselves, or 4-bit ones two to a byte."""
    if not scheme.weight_form.nibbles:
        return integers
    packed = call(graph, ops.PACK_INT4.overload, (integers,), like)
    packed.meta[SITE_KEY], packed.meta[SCHEME_KEY] = integers.meta[SITE_KEY], scheme
    return packed
