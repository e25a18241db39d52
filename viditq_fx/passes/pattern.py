"""Patterns over FX graphs, written once as functions and matched whatever the spelling.

    def modulated(x, scale, shift):
        return quantized(layer_norm(x) * (one() + scale) + shift)

A pattern matches up to: the operands' order of + and *, operator or function or method, float casts and
views that change no size, keyword or position, dropout that is idle. Variables bind any node, so it does
not matter whether a `scale` came from chunk, split, unbind or an index. Names of modules never decide.
"""

from __future__ import annotations

import inspect
import itertools
from abc import abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from viditq_fx.passes.annotate_sites import SITE_KEY, fqn_of_node
from viditq_fx.passes.base import Match, Pass, PassContext, Reject
from viditq_fx.passes.effects import Writes, is_hidden_write, is_mutation, written_inputs
from viditq_fx.passes.spelling import constant, see_through, spelling
from viditq_fx.recipe import Recipe
from viditq_fx.site import Site

# ------------------------------------------------------------------------------------- expressions


@dataclass(frozen=True, eq=False)
class Expression:
    """What a pattern function builds: a variable, a number, or a call of a kind of op."""

    kind: str
    operands: tuple[Expression, ...] = ()
    name: str = ""

    def __add__(self, other: Expression) -> Expression:
        return Expression("add", (self, other))

    def __mul__(self, other: Expression) -> Expression:
        return Expression("mul", (self, other))

    def __sub__(self, other: Expression) -> Expression:
        return Expression("sub", (self, other))

    def __truediv__(self, other: Expression) -> Expression:
        return Expression("div", (self, other))


@dataclass(frozen=True)
class Pattern:
    """An expression with a name for the report."""

    name: str
    expression: Expression

    @classmethod
    def of(cls, function: Callable[..., Expression], *given: Expression, name: str = "") -> Pattern:
        """Call a pattern function: `given` first, then a variable for each parameter that is left."""
        names = list(inspect.signature(function).parameters)[len(given) :]
        return cls(name or function.__name__, function(*given, *map(variable, names)))


def variable(name: str) -> Expression:
    """Any value, bound to `name`."""
    return Expression("variable", name=name)


def number(name: str) -> Expression:
    """Any Python number, bound to `name`."""
    return Expression("number", name=name)


def one() -> Expression:
    """The number 1."""
    return Expression("one")


def call(kind: str, *operands: Expression) -> Expression:
    """A call of an op of this kind (see `spelling`); its other arguments are bound as attributes.

    What `spelling` has no entry for is a kind by its bare name: call("softplus", x), call("pow", x, number("n")).
    """
    return Expression(kind, operands)


def whole(name: str, value: Expression) -> Expression:
    """A value that matches, bound to `name` as it stands: it stays, so that others may read it and what is inside."""
    return Expression("whole", (value,), name)


def quantized(value: Expression) -> Expression:
    """What `insert_qdq` put before a linear: quantize_per_token(value, bits)."""
    return call("quantize_per_token", value)


# ---------------------------------------------------------------------------------------- matching

_COMMUTATIVE = frozenset({"add", "mul"})


@dataclass(kw_only=True)
class Found:
    """One match: what each variable and attribute is, and the nodes that the replacement makes idle."""

    root: fx.Node
    pattern: str
    """Name of the pattern."""
    values: dict[str, Any] = field(default_factory=dict)
    """Variable or number -> node or Python value."""
    attributes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Kind of op -> its arguments that are no operands, e.g. attributes["layer_norm"]["eps"]."""
    interior: list[fx.Node] = field(default_factory=list)
    """Nodes strictly inside: between the variables and the root."""

    def read_outside(self, moved: Container[fx.Node] = ()) -> fx.Node | None:
        """A node that reads a value from inside the match, but for `moved`; None if the match is closed."""
        inside = {self.root, *self.interior}
        readers = (user for node in self.interior for user in node.users)
        return next((user for user in readers if user not in inside and user not in moved), None)


def find(pattern: Pattern, root: fx.Node) -> Found | None:
    """Match a pattern at a node."""
    return next(_match(pattern.expression, root, Found(root=root, pattern=pattern.name)), None)


def _match(expression: Expression, value: Any, found: Found) -> Iterator[Found]:
    """Every way to match; `found` is never changed, each way is a copy."""
    if expression.kind == "variable":
        yield from _bind(expression.name, value, found)
        return
    if expression.kind == "whole":
        if next(_match(expression.operands[0], value, found), None) is not None:
            yield from _bind(expression.name, value, found)
        return
    if expression.kind in {"number", "one"}:
        value = constant(value)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and (expression.kind == "number" or value == 1):
            yield from _bind(expression.name, value, found)
        return
    passed: list[fx.Node] = []
    node = value if value is found.root else see_through(value, passed)
    spelled = spelling(node) if isinstance(node, fx.Node) else None
    if (
        spelled is None
        or spelled.kind != expression.kind
        or len(spelled.operands) != len(expression.operands)
    ):
        return
    inside = [] if node is found.root else [*passed, node]
    here = Found(
        root=found.root,
        pattern=found.pattern,
        values=found.values,
        attributes={**found.attributes, spelled.kind: spelled.attributes},
        interior=[*found.interior, *inside],
    )
    orders = itertools.permutations(spelled.operands) if spelled.kind in _COMMUTATIVE else [spelled.operands]
    for operands in orders:
        yield from _match_all(expression.operands, tuple(operands), here)


def _match_all(expressions: tuple[Expression, ...], values: tuple[Any, ...], found: Found) -> Iterator[Found]:
    if not expressions:
        yield found
        return
    for first in _match(expressions[0], values[0], found):
        yield from _match_all(expressions[1:], values[1:], first)


def _bind(name: str, value: Any, found: Found) -> Iterator[Found]:
    """Bind a variable; one that is bound already must be the same value but for casts."""
    if not name:
        yield found
        return
    if name in found.values:
        if see_through(found.values[name], []) is not see_through(value, []):
            return
        yield found
        return
    if isinstance(value, fx.Node) or not isinstance(value, list | tuple | dict):
        yield Found(
            root=found.root,
            pattern=found.pattern,
            values={**found.values, name: value},
            attributes=found.attributes,
            interior=found.interior,
        )


# ----------------------------------------------------------------------------------------- rewrites


@dataclass(frozen=True, kw_only=True)
class Example:
    """A program that shows a rewrite at work, or declining; it is a test of the rewrite."""

    label: str
    program: Callable[..., Any]
    """A module, or a function of tensors, to be captured and run."""
    inputs: Callable[[], tuple[Any, ...]]
    matches: int
    reason: str = ""
    """Part of the Reject's reason where `matches` is 0 and the rewrite says why."""
    recipe: Recipe | None = None
    """What the linears are quantized by; site "" is a function's. None: w8a8 throughout."""


@dataclass(frozen=True, kw_only=True)
class Rewrite(Pass):
    """A pass made of patterns: where one matches and is accepted, a replacement takes its place."""

    patterns: ClassVar[tuple[Pattern, ...]]
    """Tried in order at each root; the first that matches and is accepted wins."""
    examples: ClassVar[tuple[Example, ...]] = ()

    def roots(self, gm: fx.GraphModule, ctx: PassContext) -> Iterator[fx.Node]:
        """Nodes at which the patterns may end: by default those of the kind that a pattern ends in."""
        kinds = {pattern.expression.kind for pattern in self.patterns}
        for node in gm.graph.nodes:
            spelled = spelling(node)
            if spelled is not None and spelled.kind in kinds:
                yield node

    @abstractmethod
    def accept(self, found: Found, ctx: PassContext) -> str | None:
        """Why a match must stay as it is; None if it may be replaced."""

    @abstractmethod
    def replace(self, gm: fx.GraphModule, found: Found, ctx: PassContext) -> str:
        """Put the replacement in place of `found.root` and say what it is, for the report."""

    def site(self, root: fx.Node) -> Site:
        """The site that a root belongs to: by default its own, or the module in which it stands."""
        return root.meta.get(SITE_KEY) or Site(fqn_of_node(root))

    def together(self, root: fx.Node) -> Sequence[fx.Node]:
        """Other roots that `replace` replaces with this one, and that may read what is inside; none by default."""
        return ()

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> tuple[Match | Reject, ...]:
        results: list[Match | Reject] = []
        writes = Writes(gm.graph)
        done: set[fx.Node] = set()
        for root in list(self.roots(gm, ctx)):
            if root in done:
                continue
            site, together = self.site(root), self.together(root)
            found, reason = self.first_accepted(root, ctx, writes, together)
            if found is not None:
                done.update(together)
                results.append(Match(site=site, detail=self.replace(gm, found, ctx)))
                erase_idle(gm.graph, found)
            elif reason is not None:
                results.append(Reject(site=site, reason=reason))
                self.declined(root, reason, ctx)
        return tuple(results)

    def declined(self, root: fx.Node, reason: str, ctx: PassContext) -> None:
        """Called at each root that matches and stays as it is; does nothing by default."""

    def first_accepted(
        self, root: fx.Node, ctx: PassContext, writes: Writes, moved: Container[fx.Node] = ()
    ) -> tuple[Found | None, str | None]:
        """(the first match at a root that may be replaced, None) or (None, why the first was declined).

        Nodes of `moved` may read what is inside.
        """
        reason = None
        for pattern in self.patterns:
            found = find(pattern, root)
            if found is None:
                continue
            declined = _declined(found, writes, moved) or self.accept(found, ctx)
            if declined is None:
                return found, None
            reason = reason or declined
        return None, reason


def _declined(found: Found, writes: Writes, moved: Container[fx.Node]) -> str | None:
    reader = found.read_outside(moved)
    if reader is not None:
        return f"a value inside the pattern is also read by {reader.name}"
    operands = [v for v in (*found.values.values(), *_attributes(found)) if isinstance(v, fx.Node)]
    return why_written(found.root, found.interior, operands, writes)


def why_written(
    root: fx.Node, interior: Sequence[fx.Node], operands: Sequence[fx.Node], writes: Writes
) -> str | None:
    """Why writes forbid one op at `root`, of these operands, in place of the nodes `interior`; None if none does."""
    inside = set(interior)
    for node in interior:
        if is_mutation(node) and not is_hidden_write(node):
            return f"{node.name} writes in place what others may read"
        hidden = any(u in inside and node in written_inputs(u) and is_hidden_write(u) for u in node.users)
        if node in writes.roots and not hidden:
            return "a value inside the pattern is written in place"
    # The replacement stands at the root: it reads the operands later than the nodes inside did.
    writers = (writes.between(node, root, operands) for node in interior)
    writer = next(filter(None, writers), None)
    if writer is not None:
        return f"an operand may be written in place by {writer.name}, before {root.name}"
    return None


def _attributes(found: Found) -> Iterator[Any]:
    for attributes in found.attributes.values():
        yield from attributes.values()


def erase_idle(graph: fx.Graph, found: Found) -> None:
    """Erase what a replacement left without readers."""
    idle = [found.root, *found.interior]
    while any(not node.users for node in idle):
        for node in [n for n in idle if not n.users]:
            graph.erase_node(node)
            idle.remove(node)
