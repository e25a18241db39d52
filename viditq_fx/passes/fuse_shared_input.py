"""One wide integer GEMM for all projections that read the same quantized input.

y_i = linear_w8a8(xq, s_x, wq_i, s_i, b_i)  ->  y_1, y_2, ... = split(linear_w8a8(xq, s_x, wq, s, b))
    with (wq, s) = quantize_per_channel(cat(w_i)),  b = cat(b_i);  4-bit weights and groups likewise

q, k and v of one attention, k and v of cross attention, gate and up of a SwiGLU, q, k, v and the MLP of a
parallel block. The sums are the same integers, so every value stays bit for bit; the results are views, copied
where a reader wants memory of the projection's own (`view` across its last dimension, a graph break).
`place_weights` then has the parts joined when they are packed, once, and not at every call.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from viditq_fx import ops
from viditq_fx.graph_edit import call, example, getitem
from viditq_fx.passes.annotate_sites import SITE_KEY, WIDE_KEY
from viditq_fx.passes.base import Match, Pass, PassContext, Reject
from viditq_fx.passes.dataflow import is_parameter, weight_parameter
from viditq_fx.passes.effects import write_roots
from viditq_fx.passes.fuse_linear import insert_linear, insert_pack
from viditq_fx.passes.insert_qdq import (
    QUANTIZE_WEIGHT,
    SCHEME_KEY,
    TRANSFORM_KEY,
    insert_weight_quantize,
    quantized_weight,
)
from viditq_fx.passes.layouts import wants_memory_of_its_own

_LINEARS = frozenset(op.overload for op in ops.LINEARS)


@dataclass(frozen=True, kw_only=True)
class FuseSharedInput(Pass):
    """Join integer linears that read the same integers into one."""

    name: ClassVar[str] = "fuse_shared_input"
    changes_numerics: ClassVar[bool] = False

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> tuple[Match | Reject, ...]:
        groups: dict[Any, list[fx.Node]] = defaultdict(list)
        written = write_roots(gm.graph)
        for node in gm.graph.nodes:
            if node.target in _LINEARS and node.name in ctx.sites and _can_join(node, written):
                groups[_key(node)].append(node)
        results: list[Match | Reject] = []
        for members in (part for group in groups.values() for part in _by_attention(group, ctx)):
            # A weight read twice is packed once; joined with itself it would be packed twice.
            if len(members) > 1 and len({_parameter_of(m) for m in members}) == len(members):
                results += _join(gm.graph, members, ctx)
        return tuple(results)


def _can_join(node: fx.Node, written: set[fx.Node]) -> bool:
    """Whether a linear's weight and bias can be joined before the call: both are parameters, written by nothing."""
    if _parameter_of(node) is None or node.args[4] in written:
        return False
    return node.meta[SCHEME_KEY].rank == 0  # a branch is one weight's own


def _by_attention(group: list[fx.Node], ctx: PassContext) -> list[list[fx.Node]]:
    """Split a group where a second attention begins.

    Every block of a model may read one text: joined, its keys and values of all blocks would be alive
    from the first block to the last.
    """
    parts: list[list[fx.Node]] = []
    seen: set[str] = set()
    for node in group:
        role = ctx.sites[node.name].role
        if not parts or role in seen:
            parts.append([])
            seen = set()
        if role.startswith("attn."):
            seen.add(role)
        parts[-1].append(node)
    return parts


def _key(node: fx.Node) -> tuple[Any, ...]:
    """What has to be the same for two linears to be joined."""
    x, scale, _, _, bias, *_ = node.args
    parameter = _parameter_of(node)
    assert parameter is not None
    weight = example(parameter)
    bias_dtype = example(bias).dtype if isinstance(bias, fx.Node) else None
    return (
        node.target,
        str(node.meta[SCHEME_KEY]),
        node.meta[TRANSFORM_KEY],
        x,
        scale,
        str(example(_result_of(node)).dtype),
        weight.dtype,
        weight.device,
        bias_dtype,
    )


def _parameter_of(node: fx.Node) -> fx.Node | None:
    """The full-precision parameter that a linear's integers are quantized from in the graph, if they are."""
    pair, bias = _pair_of(node), node.args[4]
    if pair is None or (isinstance(bias, fx.Node) and not is_parameter(bias)):
        return None
    return weight_parameter(quantized_weight(pair))


def _result_of(node: fx.Node) -> fx.Node:
    """The node that holds a linear's result: what takes the zero points off, where the weight has them."""
    corrected = [user for user in node.users if user.target is ops.ADD_ZERO_POINT.overload]
    return corrected[0] if corrected else node


def _pair_of(node: fx.Node) -> fx.Node | None:
    """The quantize of a linear's weight; None for a weight that was packed apart (`quantize_`)."""
    integers = node.args[2]
    if isinstance(integers, fx.Node) and integers.target is ops.PACK_INT4.overload:
        integers = integers.args[0]
    pair = integers.args[0] if isinstance(integers, fx.Node) and integers.args else None
    quantizes = isinstance(pair, fx.Node) and pair.target in QUANTIZE_WEIGHT
    return pair if isinstance(pair, fx.Node) and quantizes else None


def _join(graph: fx.Graph, members: list[fx.Node], ctx: PassContext) -> list[Match | Reject]:
    first = members[0]
    packed, x_scale, _, _, bias, *_ = first.args
    scheme = first.meta[SCHEME_KEY]
    like = _result_of(first)
    # What the zero points are taken off with is the input before it is packed.
    x = like.args[1] if like is not first else packed
    parameters = [parameter for parameter in map(_parameter_of, members) if parameter is not None]
    biases = [member.args[4] for member in members]
    with graph.inserting_before(first):
        weights = [
            w if example(w).dim() == 2 else call(graph, torch.flatten, (w, 1), first) for w in parameters
        ]
        joined = call(graph, torch.cat, (weights, 0), first)
        pair = insert_weight_quantize(graph, joined, scheme, first.meta[TRANSFORM_KEY], first, ctx)
        wide_bias = None if bias is None else call(graph, torch.cat, (biases, 0), first)
        integers, *vectors = (getitem(graph, pair, index, first) for index in range(len(example(pair))))
        integers.meta[SITE_KEY] = first.meta[SITE_KEY]
        stored = insert_pack(graph, integers, scheme, first)
        wide, whole = insert_linear(graph, packed, (x, x_scale), (stored, *vectors), wide_bias, like)
        widths = [int(example(weight).shape[0]) for weight in weights]
        parts = call(graph, torch.functional.split, (whole, widths, -1), first)
    for node in (joined, pair, integers, stored, *vectors, wide_bias, wide, whole, parts):
        if node is not None:
            node.meta[SITE_KEY], node.meta[SCHEME_KEY], node.meta[WIDE_KEY] = (
                first.meta[SITE_KEY],
                scheme,
                True,
            )
    leader = ctx.sites[first.name].fqn
    return [_take_part(graph, member, parts, i, (wide.name, leader), ctx) for i, member in enumerate(members)]


def _take_part(
    graph: fx.Graph, member: fx.Node, parts: fx.Node, index: int, wide: tuple[str, str], ctx: PassContext
) -> Match:
    """Put a slice of the wide result in place of a member."""
    with graph.inserting_after(parts):
        part = getitem(graph, parts, index, member)
    part.meta[SITE_KEY] = member.meta[SITE_KEY]
    pair = _pair_of(member)
    assert pair is not None
    stored, whole, result = member.args[2], part, _result_of(member)
    if wants_memory_of_its_own(result, example(part)):
        with graph.inserting_after(part):
            whole = call(graph, torch.clone, (part,), member, memory_format=torch.contiguous_format)
    result.replace_all_uses_with(whole)
    if result is not member:
        graph.erase_node(result)
    entry = ctx.sites.pop(member.name)
    entry.joined = wide[1]
    entry.bytes_packed = member.meta[SCHEME_KEY].weight_form.nbytes(entry.width, entry.depth)
    ctx.sites[part.name], ctx.computed_by[part.name] = entry, wide
    graph.erase_node(member)
    value, matrix = pair.args[0], quantized_weight(pair)
    assert isinstance(value, fx.Node)
    packs = [stored] if isinstance(stored, fx.Node) and stored.target is ops.PACK_INT4.overload else []
    for node in [*packs, *pair.users, pair, *([value] if value is not matrix else [])]:
        if not node.users:
            graph.erase_node(node)
    if not matrix.users and matrix.op != "placeholder":  # a convolution's weight, flattened
        graph.erase_node(matrix)
    return Match(site=part.meta[SITE_KEY], detail=f"part {index} of {wide[0]}")
