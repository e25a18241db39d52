"""Move a quantize up through ops that move whole rows, to where a norm or an activation makes its input.

quantize(cat([modulate(norm(a)), modulate(norm(b))], 1))
    ->  q_a, s_a = quantize(modulate(norm(a)));  q_b, s_b = ...;  cat([q_a, q_b], 1), cat([s_a, s_b], 1)

A quantize knows a row alone, so integers and scales are the same bit for bit. It moves where a rewrite after this
pass then takes a norm or an activation into it, and where nothing else reads the full-precision value: only
then is a pass over memory saved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from viditq_fx import ops
from viditq_fx.graph_edit import call, getitem
from viditq_fx.ops.quantize import fake_per_token
from viditq_fx.passes.annotate_sites import SITE_KEY
from viditq_fx.passes.base import Match, Pass, PassContext, Reject
from viditq_fx.passes.effects import Writes
from viditq_fx.passes.fuse_activation_quantize import FuseActivationQuantize
from viditq_fx.passes.fuse_norm_quantize import FuseNormQuantize
from viditq_fx.passes.insert_qdq import SCHEME_KEY
from viditq_fx.passes.pattern import find
from viditq_fx.passes.quantize_roots import UNFUSED_KEY, QuantizeRewrite
from viditq_fx.passes.rows import Move, halves_of, move_of
from viditq_fx.site import Site

Pair = tuple[fx.Node, fx.Node]
"""Integers and scales."""


@dataclass(kw_only=True)
class Climb:
    """The way from one quantize up to where the rows of its input are made."""

    root: fx.Node
    moves: dict[fx.Node, Move] = field(default_factory=dict)
    leaves: list[fx.Node] = field(default_factory=list)
    """Where the way ends: at values whose rows are made there."""
    made: list[fx.Node] = field(default_factory=list)
    """Those of the leaves that end a pattern of a rewrite."""

    @property
    def between(self) -> list[fx.Node]:
        """What stands between root and leaves: the moves, and the calls that they take one result of."""
        calls = [node.args[0] for node, move in self.moves.items() if move.item is not None]
        return [*self.moves, *(node for node in calls if isinstance(node, fx.Node))]


@dataclass(frozen=True, kw_only=True)
class HoistQuantize(Pass):
    """Quantize before a cat or a permute, not after it, where that brings a norm to its quantize."""

    name: ClassVar[str] = "hoist_quantize"
    changes_numerics: ClassVar[bool] = False
    takers: tuple[QuantizeRewrite, ...] = (FuseNormQuantize(), FuseActivationQuantize())
    """The rewrites that a quantize is moved for."""

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> tuple[Match | Reject, ...]:
        results: list[Match | Reject] = []
        writes = Writes(gm.graph)
        roots = [r for r in QuantizeRewrite.quantize_nodes(gm) if move_of(r.args[0]) is not None]  # type: ignore[arg-type]
        climbs = [climb for climb in map(self._climb, roots) if climb.moves and climb.made]
        while climbs:
            # Each is judged as if all others move; one that stays is a reader of what the others share with it.
            moved = _idle_after(climbs)
            refused = {climb.root: self._why_not(climb, moved, writes, ctx) for climb in climbs}
            climbs = [climb for climb in climbs if refused[climb.root] is None]
            for root, reason in refused.items():
                if reason is not None:
                    reason = f"norm or activation upstream, not fused: {reason}"
                    root.meta[UNFUSED_KEY] = reason
                    results.append(Reject(site=_site(root), reason=reason))
            if not any(refused.values()):
                break
        lift = _Lift(gm.graph, writes)
        results += [lift.move(climb) for climb in climbs]
        return tuple(results)

    def _climb(self, root: fx.Node) -> Climb:
        climb, seen = Climb(root=root), set[fx.Node]()
        ahead = [root.args[0]]
        while ahead:
            value = ahead.pop()
            assert isinstance(value, fx.Node)
            if value in seen:
                continue
            seen.add(value)
            ends, move = self._ends_pattern(value, root), move_of(value)
            if move is not None and not ends:
                climb.moves[value] = move
                ahead += reversed(move.sources)
            else:
                climb.leaves.append(value)
                climb.made += [value] if ends else []
        return climb

    def _ends_pattern(self, value: fx.Node, root: fx.Node) -> bool:
        with _Probe(value, root) as probe:
            return any(find(pattern, probe) for taker in self.takers for pattern in taker.patterns)

    def _why_not(self, climb: Climb, moved: set[fx.Node], writes: Writes, ctx: PassContext) -> str | None:
        """Why a quantize stays below; None if at least one leaf is then taken into it."""
        for node in climb.between:
            reader = next((user for user in node.users if user not in moved), None)
            if reader is not None:
                return f"{node.name} is also read by {reader.name}"
        for node in climb.between:
            writer = writes.between(node, climb.root, (*climb.moves, *climb.leaves))
            if writer is not None:
                return f"{writer.name} may write in place before the quantize what it reads"
        reasons = []
        for leaf in climb.made:
            twins = {twin for twin in _twins(leaf, climb.root) if _same_value(leaf, twin, climb.root, writes)}
            with _Probe(leaf, climb.root) as probe:
                for taker in self.takers:
                    found, reason = taker.first_accepted(probe, ctx, writes, moved | twins)
                    if found is not None:
                        return None
                    reasons += [reason] if reason is not None else []
        return reasons[0]


class _Probe:
    """A quantize of `value` in front of `root`, as long as it is asked what would become of it."""

    def __init__(self, value: fx.Node, root: fx.Node) -> None:
        graph = value.graph
        with graph.inserting_before(root):
            self.node = _quantize(value, root)

    def __enter__(self) -> fx.Node:
        return self.node

    def __exit__(self, *_: object) -> None:
        self.node.graph.erase_node(self.node)


class _Lift:
    """Makes the quantizes above and moves their results; what two climbs share is made once."""

    def __init__(self, graph: fx.Graph, writes: Writes) -> None:
        self._graph = graph
        self._writes = writes
        self._made: dict[tuple[fx.Node, object], Pair] = {}

    def move(self, climb: Climb) -> Match:
        """Do it for one quantize, in front of it: what stands there was checked to have its values still."""
        root = climb.root
        with self._graph.inserting_before(root):
            pair = self._moved(root.args[0], climb)  # type: ignore[arg-type]
        _redirect(root, pair)
        for node in sorted(climb.between, reverse=True):
            if not node.users:
                self._graph.erase_node(node)
        names = ", ".join(leaf.name for leaf in climb.leaves)
        return Match(site=_site(pair[0]), detail=f"quantized before it is moved: {names}")

    def _moved(self, value: fx.Node, climb: Climb) -> Pair:
        root = climb.root
        known = self._made.get((value, root.args[1]))
        if known is not None and self._writes.between(known[0], root, (value,)) is None:
            return known
        move = climb.moves.get(value)
        if move is None:
            pair = self._quantized(value, root)
        else:
            whole = halves_of(value)
            if whole is not None and whole in {*climb.moves, *climb.leaves}:
                pair = self._moved(whole, climb)
            else:
                parts = [self._moved(source, climb) for source in move.sources]
                q, s = ([part[i] for part in parts] for i in (0, 1))
                pair = move.over(q, root, scales=False), move.over(s, root, scales=True)
        for node in pair:
            node.meta[SITE_KEY], node.meta[SCHEME_KEY] = root.meta[SITE_KEY], root.meta[SCHEME_KEY]
        self._made[value, root.args[1]] = pair
        return pair

    def _quantized(self, leaf: fx.Node, root: fx.Node) -> Pair:
        """A quantize of a leaf: one that is there, or a new one that also serves those further below."""
        twins = [twin for twin in _twins(leaf, root) if _same_value(leaf, twin, root, self._writes)]
        before = next((twin for twin in sorted(twins) if twin < root), None)
        source = before or _quantize(leaf, root)
        pair = getitem(self._graph, source, 0, root), getitem(self._graph, source, 1, root)
        for twin in twins:
            if twin > root:
                _redirect(twin, pair)
        return pair


def _quantize(value: fx.Node, root: fx.Node) -> fx.Node:
    pair = call(value.graph, ops.QUANTIZE_PER_TOKEN.overload, (value, root.args[1]), root, fake_per_token)
    pair.meta[SITE_KEY], pair.meta[SCHEME_KEY] = root.meta[SITE_KEY], root.meta[SCHEME_KEY]
    return pair


def _twins(leaf: fx.Node, root: fx.Node) -> list[fx.Node]:
    """Quantizes of a leaf that give the integers that `root` wants of it."""
    wanted = (root.target, (leaf, root.args[1]))
    return [user for user in leaf.users if (user.target, user.args) == wanted and user is not root]


def _same_value(leaf: fx.Node, one: fx.Node, other: fx.Node, writes: Writes) -> bool:
    return writes.between(min(one, other), max(one, other), (leaf,)) is None


def _redirect(quantize: fx.Node, pair: Pair) -> None:
    """Let what reads a quantize's results read those of another, and erase it."""
    for item in list(quantize.users):
        item.replace_all_uses_with(pair[item.args[1]])  # type: ignore[call-overload, index]
        item.graph.erase_node(item)
    quantize.graph.erase_node(quantize)


def _idle_after(climbs: list[Climb]) -> set[fx.Node]:
    """The quantizes that move, and what nothing reads once they have."""
    idle = {climb.root for climb in climbs}
    for node in sorted({node for climb in climbs for node in climb.between}, reverse=True):
        if all(user in idle for user in node.users):
            idle.add(node)
    return idle


def _site(node: fx.Node) -> Site:
    return node.meta[SITE_KEY]
