"""Find every linear, name it as a Site, find its role, and plan its precision."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from viditq_fx import ops
from viditq_fx.graph_edit import example
from viditq_fx.ops.fp8 import LINEAR_W8A8_FP8, why_no_fp8
from viditq_fx.passes.base import Match, Pass, PassContext, Reject
from viditq_fx.passes.convolution import is_pointwise_conv, row_sizes, why_no_linear
from viditq_fx.passes.dataflow import DataFlow, source_name, weight_parameter
from viditq_fx.passes.effects import op_name, write_roots
from viditq_fx.passes.opaque import why_opaque
from viditq_fx.passes.policy import keeps, reason_to_keep
from viditq_fx.passes.roles import find_roles, linear_input
from viditq_fx.passes.selection import weigh
from viditq_fx.passes.site_plan import site_plan
from viditq_fx.report import SiteReport
from viditq_fx.scheme import BLOCK, SCHEME_MARK, QuantScheme, group_of
from viditq_fx.site import Site, fqn_of_source

SITE_KEY = "viditq_site"
"""Key of a node's meta that holds its Site."""
WIDE_KEY = "viditq_wide"
"""Key of the meta of a linear that runs several sites at once: the sites are its slices."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class AnnotateSites(Pass):
    """Give each linear a Site in its node's meta and a line in the report, with a plan or a reason."""

    name: ClassVar[str] = "annotate_sites"
    changes_numerics: ClassVar[bool] = False

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> tuple[Match | Reject, ...]:
        flow, written = DataFlow(gm.graph), write_roots(gm.graph)
        roles = find_roles(gm.graph, flow)
        results: list[Match | Reject] = []
        found: dict[fx.Node, Match | Reject] = {}
        for node in gm.graph.nodes:
            if node.name in ctx.sites or WIDE_KEY in node.meta:
                continue
            hidden = why_opaque(node)
            if hidden is not None and flow.is_content(node):
                results.append(_opaque_site(node, hidden, ctx))
            if node not in roles:
                continue
            site = Site(fqn_of_node(node))
            node.meta[SITE_KEY] = site
            entry = _describe(node, roles[node])
            ctx.sites[node.name] = entry
            ctx.report.sites.append(entry)
            found[node] = _plan(node, site, entry, ctx, written)
        for node, reason in weigh({node: rows_of(node) for node in found}, ctx).items():
            entry, site = ctx.sites[node.name], node.meta[SITE_KEY]
            entry.planned, entry.reason = None, reason
            found[node] = Reject(site=site, reason=reason)
        return (*results, *found.values())


def fqn_of_node(node: fx.Node) -> str:
    """Module path of the innermost module that a node stands in; equal to its name in named_modules()."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return fqn_of_source(next(reversed(stack.values()))[0])


def move_site(old: fx.Node, new: fx.Node, ctx: PassContext) -> None:
    """Let `new` be the site that `old` was: for a pass that puts one linear in another's place."""
    new.meta.update({key: value for key, value in old.meta.items() if str(key).startswith("viditq_")})
    if old.name in ctx.sites:
        ctx.sites[new.name] = ctx.sites.pop(old.name)
    for part, (wide, fqn) in ctx.computed_by.items():
        if wide == old.name:
            ctx.computed_by[part] = (new.name, fqn)


def scheme_of_linear(node: fx.Node) -> str:
    """Name of the scheme of a linear of the dialect: what the layer told, or in a graph without such marks (one that
    went through another tracer) as far as its op, what quantizes its input and its scales tell.

    There 6-bit weights are int8, a refined grid is a grid, and one group of 64 or less is all of K: they are called w8,
    -asym and -g128.
    """
    told = node.meta.get("custom", {}).get(SCHEME_MARK)
    if told is not None:
        return str(told)
    if node.target is LINEAR_W8A8_FP8.overload:
        return "fp8"
    quantize, bits = _input_quantize(node), _BITS[op_name(node)]
    rotates = False
    if quantize is not None:
        rotates = quantize.target is ops.ROTATE_QUANTIZE.overload and bool(quantize.args[2] != 1)
        bits = int(quantize.args[_BITS_AT[quantize.target]])  # type: ignore[call-overload]
    return str(
        QuantScheme(
            weight_bits=4 if op_name(node).startswith("linear_w4") else 8,
            input_bits=bits,
            group=_group(node),
            grid="minmax" if any(u.target is ops.ADD_ZERO_POINT.overload for u in node.users) else None,
            rotate=rotates,
            block=BLOCK if node.target in _BLOCKS else None,
            rank=_rank(node),
        )
    )


_BITS = {"linear_w8a8": 8, "linear_w8a7": 7, "linear_w4a8": 8, "linear_w4a8_block": 8, "linear_w4a4": 4}
_BITS_AT = {
    ops.QUANTIZE_PER_TOKEN.overload: 1,
    ops.QUANTIZE_PER_BLOCK.overload: 1,
    ops.ROTATE_QUANTIZE.overload: 3,
}
"""Op that quantizes an input -> which of its arguments is the width."""
_BLOCKS = (ops.LINEAR_W4A8_BLOCK.overload, ops.LINEAR_W4A4.overload)


def beside(linear: fx.Node) -> list[object]:
    """What else is stored of an integer linear's weight: zero points, and the two factors of a low-rank branch."""
    found: list[object] = []
    result = linear
    for op, first, last in ((ops.ADD_ZERO_POINT, 4, 5), (ops.ADD_LOW_RANK, 2, 4)):
        added = next((user for user in result.users if user.target is op.overload), None)
        if added is not None:
            found += added.args[first:last]
            result = added
    return found


def _rank(linear: fx.Node) -> int:
    """Of the low-rank branch that is added to an integer linear; 0 without one."""
    found = beside(linear)
    branch = len(found) >= 2
    return int(example(found[-2]).shape[0]) if branch else 0  # type: ignore[arg-type]


def _group(linear: fx.Node) -> int | None:
    """Input channels that share a scale of an integer linear's weight; None: all of them do."""
    scale = example(linear.args[3])  # type: ignore[arg-type]
    return group_of(int(scale.shape[0]), _depth(linear, ())) if scale.dim() == 2 else None


def _input_quantize(node: fx.Node) -> fx.Node | None:
    """The op of the dialect that makes the integers that a linear reads; None where it is out of sight."""
    value = node.args[0]
    if isinstance(value, fx.Node) and value.target is ops.PACK_INT4.overload:
        value = value.args[0]
    pair = value.args[0] if isinstance(value, fx.Node) and value.target is operator.getitem else None
    return pair if isinstance(pair, fx.Node) and pair.target in _BITS_AT else None


def hint(size: Any) -> int | None:
    """The size that a dimension had at compile time; None for an unbacked one."""
    if isinstance(size, int):
        return size
    node = getattr(size, "node", None)
    value = getattr(node, "hint", None) if node is not None else None
    return int(value) if isinstance(value, int) else None


def rows_of(node: fx.Node) -> int | None:
    """M of a linear at compile time; None where a size is not known."""
    hints = [hint(size) for size in row_sizes(node)]
    return None if None in hints else math.prod(h for h in hints if h is not None)


def _describe(node: fx.Node, role: str) -> SiteReport:
    weight = _weight_node(node)
    value = example(weight) if weight is not None else None
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) and value.dim() >= 2 else (0, 0)
    return SiteReport(
        fqn=fqn_of_node(node),
        role=role,
        rows=str(math.prod(row_sizes(node))),
        depth=_depth(node, shape),
        width=int(shape[0]),
        weight=source_name(weight_parameter(weight) or weight) if weight is not None else None,
        bytes_full=value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0,
    )


def _depth(node: fx.Node, weight_shape: tuple[int, ...]) -> int:
    """K: packed weights are narrower than their rows are long."""
    if not op_name(node).startswith("linear_w"):
        return int(weight_shape[1])
    if node.target is ops.LINEAR_W4A4.overload:
        return int(node.args[6])  # type: ignore[call-overload]
    return int(example(node.args[0]).shape[-1])  # type: ignore[arg-type]


def _weight_node(node: fx.Node) -> fx.Node | None:
    index = 2 if op_name(node).startswith("linear_w") else 1
    weight = node.args[index] if len(node.args) > index else None
    return weight if isinstance(weight, fx.Node) else None


def _plan(
    node: fx.Node, site: Site, entry: SiteReport, ctx: PassContext, written: set[fx.Node]
) -> Match | Reject:
    if op_name(node).startswith("linear_w"):
        entry.planned = entry.done = scheme_of_linear(node)
        stored = map(example, (*node.args[2:4], *beside(node)))  # type: ignore[arg-type]
        entry.bytes_packed = sum(t.numel() * t.element_size() for t in stored)
        entry.bytes_full = 0
        return Match(site=site, detail="already an integer linear")
    scheme, reason = _wanted(entry, rows_of(node), ctx)
    if reason is None:
        entry.planned = str(scheme)
        reason = _why_impossible(node, written)
        if reason is None and scheme.floating:
            reason = why_no_fp8(example(node).device)
    if reason is not None:
        entry.reason = reason
        return Reject(site=site, reason=reason)
    return Match(site=site, detail=entry.role)


def _wanted(entry: SiteReport, rows: int | None, ctx: PassContext) -> tuple[QuantScheme, str | None]:
    """(the scheme of a site, None), or why it is kept: the user's patterns first, then the recipe, then the policy."""
    plan = site_plan(entry.fqn, ctx)
    kept = next((pattern for pattern in ctx.keep if keeps(pattern, entry)), None)
    if plan is None or kept is not None:
        return ctx.scheme, reason_to_keep(entry, rows, ctx.keep)
    if plan.scheme is None:
        return ctx.scheme, f"kept by the recipe: {plan.reason or 'no reason given'}"
    return plan.scheme, None


def _why_impossible(node: fx.Node, written: set[fx.Node]) -> str | None:
    convolution = is_pointwise_conv(node)
    reason = why_no_linear(node) if convolution else None
    if reason is not None:
        return reason
    weight = _weight_node(node)
    parameter = weight_parameter(weight) if weight is not None else None
    if weight is None or parameter is None:
        return "its weight is computed in the graph, not a parameter: it cannot be packed once"
    if parameter in written:
        return "its weight is written inside the graph: what is packed beforehand would be out of date"
    value, source = example(weight), example(linear_input(node))
    if value.dtype not in _FLOATS:
        return f"weight dtype {value.dtype}: only fp32, bf16 and fp16 weights are packed"
    if source.dtype not in _FLOATS:
        return f"input dtype {source.dtype}: only fp32, bf16 and fp16 inputs are quantized"
    if value.device.type == "meta" or value.device != source.device:
        return f"weight on {value.device} but input on {source.device}"
    if value.dim() != 2 and not convolution:
        return f"weight has {value.dim()} dimensions: a linear's weight is [N, K]"
    return None


def _opaque_site(node: fx.Node, reason: str, ctx: PassContext) -> Reject:
    """A line in the report for GEMMs that no pass can see into: refused, unless the user keeps them."""
    site = Site(fqn_of_node(node))
    entry = SiteReport(fqn=site.fqn, role="other", rows="", depth=0, width=0, reason=reason)
    kept = next((pattern for pattern in ctx.keep if keeps(pattern, entry)), None)
    if kept is None:
        entry.planned = str(ctx.scheme)
    else:
        entry.reason = f"kept by pattern {kept!r}"
    ctx.sites[node.name] = entry
    ctx.report.sites.append(entry)
    return Reject(site=site, reason=entry.reason or reason)
