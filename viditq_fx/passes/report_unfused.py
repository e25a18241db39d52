"""Say of every quantize that took nothing in, although a norm or an activation stands above it, why not.

The passes that fuse say why they decline what their patterns match. This one speaks of what no pattern
matches: it looks up from the quantize, through arithmetic and views, for an op that patterns are made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from viditq_fx.passes.annotate_sites import SITE_KEY
from viditq_fx.passes.base import Match, Pass, PassContext, Reject
from viditq_fx.passes.dataflow import FIRST_ONLY
from viditq_fx.passes.effects import op_name
from viditq_fx.passes.fuse_activation_quantize import FuseActivationQuantize
from viditq_fx.passes.fuse_norm_quantize import FuseNormQuantize
from viditq_fx.passes.pattern import Expression
from viditq_fx.passes.quantize_roots import UNFUSED_KEY, QuantizeRewrite, sites_behind
from viditq_fx.passes.rows import move_of
from viditq_fx.passes.spelling import spelling

_ARITHMETIC = frozenset({"add", "mul", "sub", "div", "square", "row_mean", "quantize_per_token"})
_SEEN_THROUGH = frozenset(
    {"to", "type_as", "float", "half", "bfloat16", "type", "contiguous", "clone", "dropout"}
    | {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "view_as", "reshape_as"}
    | {"permute", "transpose", "swapaxes", "swapdims", "movedim", "getitem", "chunk", "split", "unbind"}
    | {"narrow", "select", "cat", "concat", "concatenate", "stack", "repeat", "roll", "pad", "tensor_split"}
    | {"neg", "pow", "clamp", "where", "masked_fill", "addcmul", "lerp", "rearrange", "tanh"}
)
_FAR = 12
"""Ops that it looks through: farther up, a norm belongs to another part of the block."""
_WHAT = "norm or activation upstream, not fused"


@dataclass(frozen=True, kw_only=True)
class ReportUnfused(Pass):
    """Changes nothing; fills `unfused` of the sites' reports."""

    name: ClassVar[str] = "report_unfused"
    changes_numerics: ClassVar[bool] = False
    takers: tuple[QuantizeRewrite, ...] = (FuseNormQuantize(), FuseActivationQuantize())

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> tuple[Match | Reject, ...]:
        results: list[Match | Reject] = []
        kinds = {kind for taker in self.takers for p in taker.patterns for kind in _kinds(p.expression)}
        for root in QuantizeRewrite.quantize_nodes(gm):
            reason = root.meta.get(UNFUSED_KEY)
            if reason is None:
                path = _nearest(root, kinds - _ARITHMETIC)
                if path is None:
                    continue
                reason = root.meta[UNFUSED_KEY] = f"{_WHAT}: {_why(path)}"
                results.append(Reject(site=root.meta[SITE_KEY], reason=reason))
            # What a rewrite said of its match says in the report, too, what it is about.
            told = reason if reason.startswith(_WHAT) else f"{_WHAT}: {reason}"
            for entry in sites_behind(root, ctx):
                entry.unfused = entry.unfused or told
        return tuple(results)


def _kinds(expression: Expression) -> Iterator[str]:
    """The ops of a pattern."""
    if expression.operands:
        yield expression.kind
    for operand in expression.operands:
        yield from _kinds(operand)


def _nearest(root: fx.Node, kinds: set[str]) -> list[fx.Node] | None:
    """The way from a norm or activation down to a quantize, both without; the norm is the last."""
    ahead, seen = [[source] for source in root.all_input_nodes], {root}
    while ahead:
        path = ahead.pop(0)
        node = path[-1]
        if node in seen or len(path) > _FAR:
            continue
        seen.add(node)
        spelled = spelling(node)
        if spelled is not None and spelled.kind in kinds:
            return path
        looked_through = spelled is not None and spelled.kind in _ARITHMETIC
        if looked_through or op_name(node) in _SEEN_THROUGH:
            sources = node.args[:1] if op_name(node) in FIRST_ONLY else node.all_input_nodes
            ahead += [[*path, source] for source in sources if isinstance(source, fx.Node)]
    return None


def _why(path: list[fx.Node]) -> str:
    *between, made = path
    name = f"{made.name} ({op_name(made)})"
    for node in between:
        if op_name(node) in {"cat", "concat", "concatenate"} and move_of(node) is None:
            return f"{name} is joined with other channels by {node.name}, and a row has one scale"
    steps = [node for node in reversed(between) if move_of(node) is None]
    listed = ", ".join(f"{node.name} ({op_name(node)})" for node in steps or reversed(between))
    return f"no pattern has what stands between {name} and the quantize: {listed or 'nothing'}"
