"""Rewrites that end in a quantize: they fold what makes a linear's input into the op that quantizes it."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from viditq_fx import ops
from viditq_fx.graph_edit import call, example
from viditq_fx.ops.quantize import fake_per_token
from viditq_fx.passes.annotate_sites import SITE_KEY
from viditq_fx.passes.base import PassContext
from viditq_fx.passes.insert_qdq import SCHEME_KEY
from viditq_fx.passes.pattern import Found, Rewrite
from viditq_fx.passes.rows import move_of
from viditq_fx.report import SiteReport

UNFUSED_KEY = "viditq_unfused"
"""Key of a quantize's meta: why it took in nothing of what makes its input."""


@dataclass(frozen=True, kw_only=True)
class QuantizeRewrite(Rewrite):
    """A rewrite whose roots are quantize_per_token nodes and whose replacement returns (integers, scales)."""

    @property
    @abstractmethod
    def op(self) -> ops.QuantOp:
        """The op of the dialect that takes the place of the match."""

    @abstractmethod
    def operands(self, found: Found) -> tuple[object, ...]:
        """Its arguments."""

    @staticmethod
    def quantize_nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
        """The quantize nodes of a graph that a pass put before linears, but those with scales of calibration.

        These have nothing to find over a row, so compilers fold them into what is in front by themselves; and a scale
        by position is of the places that tokens have in front of the linear, not above a permute or a cat.
        """
        for node in gm.graph.nodes:
            if node.target is ops.QUANTIZE_PER_TOKEN.overload and SITE_KEY in node.meta:
                yield node

    def roots(self, gm: fx.GraphModule, ctx: PassContext) -> Iterator[fx.Node]:
        return self.quantize_nodes(gm)

    def replace(self, gm: fx.GraphModule, found: Found, ctx: PassContext) -> str:
        root = found.root
        with gm.graph.inserting_before(root):
            fused = call(gm.graph, self.op.overload, self.operands(found), root, fake_per_token)
        fused.meta[SITE_KEY], fused.meta[SCHEME_KEY] = root.meta[SITE_KEY], root.meta[SCHEME_KEY]
        root.replace_all_uses_with(fused)
        for entry in sites_behind(fused, ctx):
            # Streams that a cat joins may end in different norms: all of them are named.
            names = {*filter(None, (entry.prologue or "").split(", ")), found.pattern}
            entry.prologue = ", ".join(sorted(names))
        return found.pattern

    def declined(self, root: fx.Node, reason: str, ctx: PassContext) -> None:
        root.meta[UNFUSED_KEY] = reason


def sites_behind(pair: fx.Node, ctx: PassContext) -> Iterator[SiteReport]:
    """The linears that read a quantize's results, also through what moves their rows."""
    ahead, seen = list(pair.users), set[fx.Node]()
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name in ctx.sites:
            yield ctx.sites[node.name]
        elif isinstance(example(node), tuple | list) or node.target is operator.getitem or move_of(node):
            ahead += node.users
