"""Make packed weights inputs of the graph, in place of quantizing a parameter at every call.

    quantize_per_channel(w) with a parameter w             -> two new placeholders (int8 [N, K], fp32 [N])
    pack_int4(quantize_per_channel(w)), or per group       -> (uint8 [N, H], fp32 [N] or [G, N])
    quantize_weight_grid(w)                                -> these and the zero points
    any of them over transform_weight(w, m)                -> the same; the form says what is done when w is packed

Inputs and never constants: regional compilation runs one compiled block with the weights of many.
One parameter gives one pair, however many linears read it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from viditq_fx import ops
from viditq_fx.graph_edit import example
from viditq_fx.passes.annotate_sites import SITE_KEY, WIDE_KEY, beside
from viditq_fx.passes.base import BiasSlot, Match, Pass, PassContext, Reject, WeightSlot
from viditq_fx.passes.dataflow import weight_parameter
from viditq_fx.passes.effects import op_name
from viditq_fx.passes.insert_qdq import QUANTIZE_WEIGHT, TRANSFORM_KEY, quantized_weight
from viditq_fx.passes.site_plan import SLOT_KEY
from viditq_fx.scheme import WeightForm


@dataclass(frozen=True, kw_only=True)
class PlaceWeights(Pass):
    """Replace weight quantization by graph inputs and note which parameter each stands for."""

    name: ClassVar[str] = "place_weights"
    changes_numerics: ClassVar[bool] = False

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> tuple[Match | Reject, ...]:
        results: list[Match | Reject] = []
        slots: dict[tuple[tuple[str, ...], WeightForm], list[fx.Node]] = {}
        for node in list(gm.graph.nodes):
            if node.target not in QUANTIZE_WEIGHT:
                continue
            value, weight, packs = node.args[0], quantized_weight(node), _packs(node)
            assert isinstance(value, fx.Node)
            form = _form(node, nibbles=bool(packs))
            key = (tuple(source.name for source in _sources(weight)), form)
            if key not in slots:
                slots[key] = _new_inputs(gm.graph, _sources(weight)[0], node, packs)
            for pack in packs:
                pack.replace_all_uses_with(slots[key][0])
                gm.graph.erase_node(pack)
            for user in list(node.users):
                assert user.target is operator.getitem
                user.replace_all_uses_with(slots[key][user.args[1]])  # type: ignore[index]
                gm.graph.erase_node(user)
            results.append(Match(site=node.meta[SITE_KEY], detail=slots[key][0].name))
            gm.graph.erase_node(node)
            if value is not weight and not value.users:
                gm.graph.erase_node(value)
            _erase_idle(gm.graph, weight)
        _place_biases(gm.graph, ctx)
        placeholders = {n.name: n for n in gm.graph.nodes if n.op == "placeholder"}
        for (names, form), (quantized, scale, *_) in slots.items():
            frees = tuple(not placeholders[name].users for name in names)
            slot = WeightSlot(
                sources=names, quantized=quantized.name, scale=scale.name, form=form, frees_source=frees
            )
            ctx.weight_slots.append(slot)
        for name in {name for names, _ in slots for name in names}:
            if not placeholders[name].users:
                gm.graph.erase_node(placeholders[name])
        _fill_bytes(gm, ctx)
        return tuple(results)


def _form(pair: fx.Node, nibbles: bool) -> WeightForm:
    if pair.target is ops.QUANTIZE_FP8_PER_CHANNEL.overload:
        return WeightForm(floating=True)
    if pair.target is ops.QUANTIZE_WEIGHT_LOW_RANK.overload:
        rank, bits, *group = pair.args[3:]
    else:
        rank, (_, bits, *group) = 0, pair.args
    transform = pair.meta[TRANSFORM_KEY]
    return WeightForm(
        bits=int(bits),  # type: ignore[call-overload]
        group=(int(group[0]) or None) if group else None,  # type: ignore[call-overload]
        nibbles=nibbles,
        grid=(str(group[1]) or None) if len(group) > 1 else None,
        rank=int(rank),  # type: ignore[call-overload]
        rotation=transform.rotation,
        multiplier=transform.multiplier,
    )


def _packs(pair: fx.Node) -> list[fx.Node]:
    """The nodes that pack the integers of a weight two to a byte; then nothing else reads them."""
    readers = [user for item in pair.users if item.args[1] == 0 for user in item.users]
    packs = [user for user in readers if user.target is ops.PACK_INT4.overload]
    assert len(packs) in (0, len(readers)), f"{pair.format_node()}: packed and read as int8 too"
    return packs


def _sources(weight: fx.Node) -> list[fx.Node]:
    """The parameters of a weight: its own, or those of what `fuse_shared_input` joined."""
    parts = weight.args[0] if WIDE_KEY in weight.meta else [weight]
    assert isinstance(parts, list | tuple)
    sources = [weight_parameter(part) for part in parts if isinstance(part, fx.Node)]
    return [source for source in sources if source is not None]


def _erase_idle(graph: fx.Graph, weight: fx.Node) -> None:
    """Erase a joined or flattened weight that nothing reads any more, down to its parameters."""
    if not weight.users and weight.op != "placeholder":
        sources = weight.all_input_nodes
        graph.erase_node(weight)
        for source in sources:
            _erase_idle(graph, source)


def _place_biases(graph: fx.Graph, ctx: PassContext) -> None:
    """Make each joined bias an input too: joining it at every call would be a kernel of its own."""
    for node in [n for n in graph.nodes if n.target is torch.cat and WIDE_KEY in n.meta]:
        biases = node.args[0]
        assert isinstance(biases, list | tuple)
        sources = [bias for bias in biases if isinstance(bias, fx.Node)]
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        (joined,) = _placeholders(
            graph, last, [f"{sources[0].name.rstrip('_')}_joined"], [example(node)], node
        )
        ctx.bias_slots.append(BiasSlot(sources=tuple(s.name for s in sources), joined=joined.name))
        node.replace_all_uses_with(joined)
        graph.erase_node(node)


def _new_inputs(graph: fx.Graph, weight: fx.Node, like: fx.Node, packs: Sequence[fx.Node]) -> list[fx.Node]:
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    integers, *vectors = example(like)
    kind = "int4" if packs else "fp8" if integers.is_floating_point() else "int8"
    branch = ("down", "up") if like.target is ops.QUANTIZE_WEIGHT_LOW_RANK.overload else ()
    suffixes = (*(kind, "scale", "zero")[: 1 + len(vectors) - len(branch)], *branch)
    names = [f"{weight.name.rstrip('_')}_{suffix}" for suffix in suffixes]
    return _placeholders(graph, last, names, [example(packs[0]) if packs else integers, *vectors], like)


def _placeholders(
    graph: fx.Graph, last: fx.Node, names: Sequence[str], values: Sequence[Any], like: fx.Node
) -> list[fx.Node]:
    placeholders = []
    for name, value in zip(names, values, strict=True):
        with graph.inserting_after(last):
            node = graph.placeholder(name)
        node.target = node.name  # a weight that is joined here and read alone there begins two names alike
        node.meta = {
            "example_value": value.contiguous(),  # the store packs row-major, whatever the weight is
            "tensor_dict": {"_dynamo_static_input_type": "unguarded"},
            SLOT_KEY: node.name,
            SITE_KEY: like.meta[SITE_KEY],
        }
        node._dynamo_source = None  # type: ignore[attr-defined]
        placeholders.append(node)
        last = node
    return placeholders


def _fill_bytes(gm: fx.GraphModule, ctx: PassContext) -> None:
    for node in gm.graph.nodes:
        entry = ctx.sites.get(node.name)
        if entry is not None and entry.done is not None and op_name(node).startswith("linear_w"):
            tensors = [example(a) for a in (*node.args[2:4], *beside(node)) if isinstance(a, fx.Node)]
            entry.bytes_packed = sum(t.numel() * t.element_size() for t in tensors)
