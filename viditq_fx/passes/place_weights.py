"""Make packed weights inputs of the graph, in place of quantizing a parameter at every call.

    quantize_per_channel(w) with a parameter w -> two new placeholders (int8 [N, K], fp32 [N])

Inputs and never constants: regional compilation runs one compiled block with the weights of many.
One parameter gives one pair, however many linears read it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from viditq_fx import ops
from viditq_fx.graph_edit import example
from viditq_fx.passes.annotate_sites import SITE_KEY
from viditq_fx.passes.base import Match, Pass, PassContext, Reject, WeightSlot
from viditq_fx.passes.effects import op_name

SLOT_KEY = "viditq_slot"
"""Key of a placeholder's meta: this input holds a packed weight or its scales."""


@dataclass(frozen=True, kw_only=True)
class PlaceWeights(Pass):
    """Replace weight quantization by graph inputs and note which parameter each stands for."""

    name: ClassVar[str] = "place_weights"
    changes_numerics: ClassVar[bool] = False

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> tuple[Match | Reject, ...]:
        results: list[Match | Reject] = []
        slots: dict[tuple[str, int], tuple[fx.Node, fx.Node]] = {}
        for node in list(gm.graph.nodes):
            if node.target is not ops.QUANTIZE_PER_CHANNEL.overload:
                continue
            weight, bits = node.args
            assert isinstance(weight, fx.Node)
            assert isinstance(bits, int)
            if (weight.name, bits) not in slots:
                slots[weight.name, bits] = _new_inputs(gm.graph, weight, node)
            quantized, scale = slots[weight.name, bits]
            for user in list(node.users):
                assert user.target is operator.getitem
                user.replace_all_uses_with(quantized if user.args[1] == 0 else scale)
                gm.graph.erase_node(user)
            results.append(Match(site=node.meta[SITE_KEY], detail=quantized.name))
            gm.graph.erase_node(node)
        for (name, bits), (quantized, scale) in slots.items():
            source = next(n for n in gm.graph.nodes if n.name == name)
            frees = not source.users
            ctx.weight_slots.append(
                WeightSlot(
                    source=name, quantized=quantized.name, scale=scale.name, bits=bits, frees_source=frees
                )
            )
            if frees:
                gm.graph.erase_node(source)
        _fill_bytes(gm, ctx)
        return tuple(results)


def _new_inputs(graph: fx.Graph, weight: fx.Node, like: fx.Node) -> tuple[fx.Node, fx.Node]:
    values = example(like)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    placeholders = []
    for suffix, value in zip(("int8", "scale"), values, strict=True):
        with graph.inserting_after(last):
            node = graph.placeholder(f"{weight.name.rstrip('_')}_{suffix}")
        node.meta = {
            "example_value": value.contiguous(),  # the store packs row-major, whatever the weight is
            "tensor_dict": {"_dynamo_static_input_type": "unguarded"},
            SLOT_KEY: weight.name,
            SITE_KEY: like.meta[SITE_KEY],
        }
        node._dynamo_source = None  # type: ignore[attr-defined]
        placeholders.append(node)
        last = node
    return placeholders[0], placeholders[1]


def _fill_bytes(gm: fx.GraphModule, ctx: PassContext) -> None:
    for node in gm.graph.nodes:
        entry = ctx.sites.get(node.name)
        if entry is not None and entry.done is not None and op_name(node).startswith("linear_w"):
            tensors = [example(a) for a in node.args[2:4] if isinstance(a, fx.Node)]
            entry.bytes_packed = sum(t.numel() * t.element_size() for t in tensors)
