"""Every pass of the pipeline, a new one by default: a second run changes nothing, and what says that it changes no
numerics changes not one bit."""

from __future__ import annotations

import copy
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.small_models import tiny_dit, tiny_inputs
from viditq_fx.graph_edit import copy_graph_module
from viditq_fx.ops.packed_weights import joined_bias
from viditq_fx.passes.annotate_sites import SITE_KEY
from viditq_fx.passes.base import Match, PassContext
from viditq_fx.passes.insert_qdq import SCHEME_KEY
from viditq_fx.passes.pattern import Rewrite
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.recipe import Recipe, SitePlan
from viditq_fx.runtime import WeightArgument
from viditq_fx.scheme import QuantScheme
from viditq_fx.testing import as_module, capture

PASSES = default_passes()
EXACT = [step for step in PASSES if not step.changes_numerics]
EXAMPLES = [example for step in PASSES if isinstance(step, Rewrite) for example in step.examples]


class Gated(nn.Module):
    """What tiny_dit has not: dropout, keywords, RMSNorm, SwiGLU, cross attention, a write, a weight read twice."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.gate, self.up, self.down = nn.Linear(64, 128), nn.Linear(64, 128, bias=False), nn.Linear(128, 64)
        self.q, self.k, self.v, self.dead = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x, text):
        self.dead(x)
        heads = [p.unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q(x), self.k(text), self.v(text))]
        x = x + F.dropout(
            F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2), 0.1, self.training
        )
        h = self.norm(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        x.mul_(0.5)
        return F.linear(input=x, weight=self.q.weight, bias=self.q.bias), x


def gated():
    torch.manual_seed(0)
    return Gated().eval().requires_grad_(False)


class Rearranged(nn.Module):
    """Streams joined behind their norms, a 1x1 convolution, an activation joined with other channels."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(2))
        self.up, self.convolution, self.down = nn.Linear(64, 64), nn.Conv1d(64, 64, 1), nn.Linear(128, 64)

    def forward(self, x, text):
        h = self.up(torch.cat([norm(t) for norm, t in zip(self.norms, (text, x), strict=True)], dim=1))
        h = self.convolution(h.transpose(1, 2)).transpose(1, 2)
        return self.down(torch.cat([F.gelu(h), h], dim=-1))


def rearranged():
    torch.manual_seed(0)
    return Rearranged().eval().requires_grad_(False)


def balancing():
    """A recipe that balances the channels of every linear of a block of tiny_dit."""
    plans = {
        f"blocks.0.{name}": SitePlan(
            scheme=QuantScheme.parse("w8a8"), multiplier=torch.linspace(-2.0, -0.5, width)
        )
        for name, width in {"q": 64, "k": 64, "v": 64, "out": 64, "up": 64, "down": 256}.items()
    }
    return Recipe(scheme=QuantScheme.parse("w8a8"), sites=plans)


def of_zoo(name):
    """A tiny diffusion transformer of diffusers and the arguments of one call."""
    pytest.importorskip("diffusers")
    from tests.models.tiny_dits import TINY_DITS

    dit = TINY_DITS[name]
    model, inputs = dit.build(1), dit.make_inputs()

    class Positional(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *values):
            return self.model(**dict(zip(inputs, values, strict=True)))

    return Positional(), tuple(inputs.values())


MODELS = {
    "tiny dit": lambda: (tiny_dit(2), tiny_inputs()),
    "balanced": lambda: (tiny_dit(1), tiny_inputs()),
    "gated": lambda: (gated(), (torch.randn(2, 40, 64), torch.randn(2, 34, 64))),
    "rearranged": lambda: (rearranged(), (torch.randn(2, 40, 64), torch.randn(2, 34, 64))),
    "flux": lambda: of_zoo("flux_dev"),
    "wan": lambda: of_zoo("wan"),
    "stable audio": lambda: of_zoo("stable_audio"),
}
RECIPES = {"balanced": balancing()}
SLOW = {"flux", "wan", "stable audio"}


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in MODELS]
)
def captured(request):
    """(graph, values of its placeholders, recipe) of one model; tests work on copies."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    model, args = MODELS[request.param]()
    return *capture(model, *args), RECIPES.get(request.param)


class Prepared:
    """A copy of a captured graph as the passes before one leave it."""

    def __init__(self, captured, step, scheme="w8a8"):
        graph, self.values, recipe = captured
        self.gm = copy_graph_module(graph)
        self.ctx = PassContext(scheme=QuantScheme.parse(scheme), attention="int8", recipe=recipe)
        index = [known.name for known in PASSES].index(step.name)
        PassPipeline(passes=PASSES[:index]).run(self.gm, self.ctx)

    def outputs(self):
        """What the graph computes, packed weights made as the runtime makes them."""
        names = list(self.values)
        values = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in self.values.items()}
        for slot in self.ctx.weight_slots:
            indices = tuple(map(names.index, slot.sources))
            packing = WeightArgument(
                indices=indices, names=slot.sources, form=slot.form, frees_source=slot.frees_source
            )
            values[slot.quantized], values[slot.scale] = packing.packed(list(self.values.values()))
        values |= {slot.name: slot.value for slot in self.ctx.constant_slots}
        for slot in self.ctx.bias_slots:
            values[slot.joined] = joined_bias([self.values[name] for name in slot.sources])
        self.gm.recompile()
        placeholders = [node.name for node in self.gm.graph.nodes if node.op == "placeholder"]
        with torch.no_grad():
            return self.gm(*(values[name] for name in placeholders))

    def state(self):
        """All that a pass may change."""
        nodes = [
            (
                n.op,
                n.name,
                str(n.target),
                str(n.args),
                str(n.kwargs),
                n.meta.get(SITE_KEY),
                n.meta.get(SCHEME_KEY),
            )
            for n in self.gm.graph.nodes
        ]
        sites = {name: asdict(entry) for name, entry in self.ctx.sites.items()}
        slots = (list(self.ctx.weight_slots), list(self.ctx.bias_slots), dict(self.ctx.computed_by))
        return nodes, sites, asdict(self.ctx.report), slots


def check_second_run(prepared, step):
    """Run a pass twice; the second run matches nothing and leaves graph, sites, report and slots as they are."""
    first = step.run(prepared.gm, prepared.ctx)
    before = copy.deepcopy(prepared.state())
    again = [result for result in step.run(prepared.gm, prepared.ctx) if isinstance(result, Match)]
    assert not again, f"{step.name} matches again: {again}"
    for got, want in zip(prepared.state(), before, strict=True):
        assert got == want
    return first


@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)
def test_a_second_run_changes_nothing(captured, step):
    check_second_run(Prepared(captured, step), step)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.label)
def test_a_second_run_changes_nothing_in_any_example(example):
    program, inputs = example.program, example.inputs()
    is_module = isinstance(program, nn.Module)
    module = program if is_module else as_module(program, *inputs)
    graph = capture(module, *(inputs if is_module else inputs[:1]))
    for step in PASSES:
        check_second_run(Prepared((*graph, example.recipe), step), step)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a7", "w4a8", "w4a8-g128"])
@pytest.mark.parametrize("step", EXACT, ids=lambda step: step.name)
def test_what_changes_no_numerics_changes_no_bit(captured, step, scheme):
    prepared = Prepared(captured, step, scheme)
    before = prepared.outputs()
    step.run(prepared.gm, prepared.ctx)
    torch.testing.assert_close(prepared.outputs(), before, rtol=0, atol=0)


@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)
def test_every_pass_has_something_to_do_here(step):
    """Else the tests above could not fail for it: a new pass needs a model, above, that it changes."""
    for name in MODELS:
        if name in SLOW:
            continue
        model, args = MODELS[name]()
        prepared = Prepared((*capture(model, *args), RECIPES.get(name)), step)
        before = copy.deepcopy(prepared.state())
        step.run(prepared.gm, prepared.ctx)
        if prepared.state() != before:
            return
    pytest.fail(f"{step.name} changes none of {set(MODELS) - SLOW}")
