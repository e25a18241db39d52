"""Check a rewrite by its own examples: how the suite checks ours, for authors of others. Needs torch alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from viditq_fx.graph_edit import copy_graph_module
from viditq_fx.passes.base import Match, PassContext, Reject
from viditq_fx.passes.effects import op_name
from viditq_fx.passes.extra import Anchored, Order
from viditq_fx.passes.pattern import Example, Rewrite
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.passes.verify import verify
from viditq_fx.recipe import Recipe
from viditq_fx.scheme import QuantScheme


def check_rewrite(rewrite: Rewrite | Anchored, *, rtol: float = 1e-5) -> None:
    """Run every example of a rewrite, see `check_example`. Raises AssertionError saying which fails, and how."""
    examples = _step_of(rewrite).examples
    assert examples, f"{_step_of(rewrite).name} has no examples"
    assert any(example.matches for example in examples), f"no example of {_step_of(rewrite).name} matches"
    for example in examples:
        check_example(rewrite, example, rtol=rtol)


def check_example(rewrite: Rewrite | Anchored, example: Example, *, rtol: float = 1e-5) -> None:
    """Hold a rewrite to one example, on the graph that the passes before it leave.

    The matches are as many as the example says, its reason is given, the invariants hold, a second run changes
    nothing, and the result is that of the graph before: within `rtol`, or bitwise if it changes no numerics.
    Raises AssertionError for what is not so, VerifyError for a broken invariant.
    """
    step, who = _step_of(rewrite), f"{_step_of(rewrite).name}: {example.label}"
    graph = prepared(example.program, *example.inputs(), upto=rewrite, recipe=example.recipe)
    before, nodes = graph.run(), targets(graph.gm)
    results = step.run(graph.gm, graph.ctx)
    matches = sum(isinstance(result, Match) for result in results)
    reasons = [result.reason for result in results if isinstance(result, Reject)]
    assert matches == example.matches, (
        f"{who}: {matches} matches, the example says {example.matches}; rejects: {reasons}; the graph was {nodes}"
    )
    assert any(example.reason in reason for reason in reasons) or not example.reason, (
        f"{who}: no reject says {example.reason!r}; rejects: {reasons}"
    )
    verify(graph.gm, graph.ctx, after=step.name)
    error = max((relative_error(a, b) for a, b in zip(graph.run(), before, strict=True)), default=0.0)
    limit = rtol if step.changes_numerics else 0.0
    assert error <= limit, f"{who}: the result is off by {error:.1e} (relative), {limit:.0e} is allowed"
    nodes = targets(graph.gm)
    again = [result for result in step.run(graph.gm, graph.ctx) if isinstance(result, Match)]
    assert not again, f"{who}: a second run matches again: {again}"
    assert targets(graph.gm) == nodes, f"{who}: a second run changes the graph"


@dataclass(kw_only=True)
class Prepared:
    """A captured graph, its context, and the values that it was captured with."""

    gm: fx.GraphModule
    ctx: PassContext
    values: dict[str, Any]
    """Placeholder name -> what Dynamo would pass for it."""

    def run(self) -> tuple[Any, ...]:
        """The graph's results, as it is now."""
        self.gm.recompile()
        names = [node.name for node in self.gm.graph.nodes if node.op == "placeholder"]
        given = self.values | {slot.name: slot.value for slot in self.ctx.constant_slots}
        with torch.no_grad():
            return self.gm(*(given[name] for name in names))


def prepared(
    program: Callable[..., Any], *inputs: Any, upto: Rewrite | Anchored | str, recipe: Recipe | None = None
) -> Prepared:
    """The graph of `program(*inputs)` as the passes before `upto` leave it.

    A function's tensors but the first are held by a module: only a parameter is packed as a weight. Without a recipe
    all linears are w8a8.
    """
    module = program if isinstance(program, nn.Module) else as_module(program, *inputs)
    args = inputs if isinstance(program, nn.Module) else inputs[:1]
    gm, values = capture(module, *args)
    ctx = PassContext(scheme=QuantScheme.parse("w8a8") if recipe is None else recipe.scheme, recipe=recipe)
    order = Order(default_passes())
    name = upto if isinstance(upto, str) else _step_of(upto).name
    if name not in [step.name for step in order.passes]:
        order.add(upto)
    names = [step.name for step in order.passes]
    assert "place_weights" not in names[: names.index(name)], f"{name} stands after place_weights: no values"
    PassPipeline(passes=tuple(order.passes[: names.index(name)])).run(gm, ctx)
    return Prepared(gm=gm, ctx=ctx, values=values)


def capture(
    model: Callable[..., Any], *args: Any, dynamic: bool | None = False
) -> tuple[fx.GraphModule, dict[str, Any]]:
    """(a copy of Dynamo's graph of a call, the value of each of its placeholders by name)."""
    graphs: list[tuple[fx.GraphModule, dict[str, Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        graphs.append((copy_graph_module(gm), dict(zip(names, example_inputs, strict=True))))
        return gm.forward

    def call(*args: Any) -> Any:
        return model(*args)

    # Code of its own: Dynamo counts recompilations by code object, and gives up after eight.
    fresh = FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    with torch.no_grad():
        torch.compile(fresh, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    assert len(graphs) == 1, f"Dynamo made {len(graphs)} graphs of one call"
    return graphs[0]


def as_module(program: Callable[..., Any], *inputs: Any) -> nn.Module:
    """A module that holds all inputs but the first as parameters: module(x) is program(x, *the others)."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in inputs[1:])

        def forward(self, x: Tensor) -> Any:
            return program(
                x, *(self.held[i] for i in range(len(self.held)))
            )  # torch 2.11 unpacks no ParameterList

    return Holder()


def targets(gm: fx.GraphModule) -> list[str]:
    """Bare names of what a graph calls, in order, without getitem."""
    nodes = [n for n in gm.graph.nodes if n.op not in {"placeholder", "output"}]
    return [op_name(n) for n in nodes if op_name(n) != "getitem"]


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in fp64; 0 where both are zero."""
    error = (got.double() - want.double()).norm()
    return float(error / want.double().norm()) if error else 0.0


def _step_of(rewrite: Rewrite | Anchored) -> Rewrite:
    step = rewrite.step if isinstance(rewrite, Anchored) else rewrite
    assert isinstance(step, Rewrite), f"a rewrite, alone or in before or after, is checked; got {step!r}"
    return step
