"""Recipes with ranges of the timestep, compiled: each call runs its range's bits on integers, without recompiling."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._python_dispatch import TorchDispatchMode

import viditq_fx as vq
from tests.small_models import tiny_dit, tiny_inputs
from viditq_fx import range_graph
from viditq_fx.calibration.timesteps import range_of
from viditq_fx.ops.packed_weights import full_bytes, packed_bytes
from viditq_fx.runtime import executions
from viditq_fx.timestep import as_fp32, range_names, range_on_host

EDGES = (250.0, 500.0, 750.0)
STEPS = [1000.0 - 50 * step for step in range(20)]
SIGNS = torch.where(torch.arange(64) % 3 == 0, -0.5, 2.0)
SITES = {
    **dict.fromkeys(("k", "q", "v"), ("w4a8-rot", "w8a8-rot", "w4a8-rot", "w4a8-rot")),
    "out": ("w4a8", "w8a8", "w4a8", "w8a8"),
    "up": ("w8a8", "w4a4", "w8a8", "w8a8"),
    "down": ("w6a6", "w6a6", "w6a6", "w6a6"),
}
"""Site of the block -> its scheme in each range: the first and the third are the same."""


def plan(names):
    schemes = tuple(map(vq.QuantScheme.parse, names))
    rotated = schemes[0].rotate
    return vq.SitePlan(
        scheme=schemes[0],
        by_range=schemes if len(set(schemes)) > 1 else (),
        rotation=16 if rotated else 1,
        multiplier=SIGNS if rotated else None,
    )


def recipe(edges=EDGES, timestep=None, sites=SITES, prefix="blocks.0."):
    return vq.Recipe(
        scheme=vq.QuantScheme.parse("w8a8"),
        sites={prefix + name: plan(names) for name, names in sites.items()},
        range_edges=edges,
        timestep=timestep,
    )


@pytest.fixture
def without_inductor(monkeypatch):
    """Inductor's code is tested below and elsewhere; graphs, passes, kernels and reports are the real ones."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)


def compiled(model, plans, **options):
    return torch.compile(model, backend="viditq", options={"recipe": plans, **options}, fullgraph=True)


def ran(one):
    """Site -> scheme that an execution carried out; only on integers."""
    assert {site.outcome for site in one.report.sites if site.planned} == {"quantized"}
    return {site.fqn: site.done for site in one.report.sites if site.done is not None}


def asked(plans, index):
    return {path: str(plan.scheme) for path, plan in plans.at_range(index).sites.items()}


@pytest.mark.slow
def test_twenty_steps_run_their_ranges_bits_as_plain_recipes_do_and_nothing_recompiles(monkeypatch):
    torch._dynamo.reset()
    model, plans, (x, _) = tiny_dit(1), recipe(), tiny_inputs()
    alone = [compiled(copy.deepcopy(model), plans.at_range(index)) for index in range(4)]
    reads = []
    monkeypatch.setattr(range_graph, "range_on_host", lambda *args: reads.append(0) or range_on_host(*args))
    run = compiled(model, plans)
    with torch.no_grad():
        run(x, torch.full((2,), STEPS[0]))
        counted = dict(torch._dynamo.utils.counters["stats"])
        reads.clear()
        with executions() as steps:
            outputs = [run(x, torch.full((2,), step)) for step in STEPS]
        assert dict(torch._dynamo.utils.counters["stats"]) == counted  # no graph was captured again
        assert len(reads) == len(steps) == len(STEPS)
        places = [range_of(EDGES, step) for step in STEPS]
        assert sorted(set(places)) == [0, 1, 2, 3]
        for place, step, output, one in zip(places, STEPS, outputs, steps, strict=True):
            assert ran(one) == asked(plans, place)
            assert place in one.report.in_ranges
            assert torch.equal(output, alone[place](x, torch.full((2,), step)))
    reports = {id(one.report): one.report for one in steps}.values()
    assert sorted(report.in_ranges for report in reports) == [(0, 2), (1,), (3,)]
    told = steps[0].report.ranges
    assert told.graphs == (0, 1, 0, 2)
    weights = {"k": 1, "q": 1, "v": 1, "out": 1, "up": 4, "down": 4}
    bits = [
        sum(n * vq.QuantScheme.parse(SITES[s][i]).weight_bits for s, n in weights.items()) / 12
        for i in range(4)
    ]
    assert told.weight_bits == pytest.approx(bits)
    block = model.blocks[0]
    linears = [getattr(block, name) for name in SITES]
    forms = [
        dict.fromkeys(plan(SITES[name]).in_range(i).scheme.weight_form for i in range(4)) for name in SITES
    ]
    nbytes = [
        sum(form.nbytes(*linear.weight.shape) for form in kinds)
        for linear, kinds in zip(linears, forms, strict=True)
    ]
    assert [len(kinds) for kinds in forms] == [2, 2, 2, 2, 2, 1]
    assert told.bytes_packed == sum(nbytes)
    once = sum(packed_bytes(linear.weight) for linear in linears)
    apart = [
        sum(packed_bytes(getattr(one.blocks[0], name).weight) for name in SITES)
        for one in (alone[index]._orig_mod for index in (0, 1, 3))
    ]
    assert max(apart) < once < sum(apart)  # forms that ranges have in common are kept once


class Forms(nn.Module):
    """Takes a timestep of any shape and dtype."""

    def __init__(self):
        super().__init__()
        self.body = tiny_dit(1)

    def forward(self, x, when):
        return self.body(x, when.float().reshape(-1)[:1].expand(2))


@pytest.mark.parametrize(
    ("edges", "timesteps"),
    [
        (EDGES, [torch.tensor([1000, 20]), torch.tensor([499, 0]), torch.tensor([250, 250])]),
        ((0.25, 0.5, 0.75), [torch.tensor(t) for t in (0.0, 0.25, 0.3, 0.5, 0.9, 1.0)]),
        ((0.1, 0.2, 0.3), [torch.full((2, 3), t) for t in (0.3, 0.29999, 0.2, 0.1)]),
        (EDGES, [torch.full((2, 1, 4), t, dtype=torch.bfloat16) for t in (750.0, 300.0, 100.0)]),
    ],
    ids=["integers by sample", "0 to 1 rising", "by frame on the edges", "bf16"],
)
def test_any_timestep_chooses_its_range(edges, timesteps, without_inductor):
    model, plans, (x, _) = Forms().eval(), recipe(edges, "when", prefix="body.blocks.0."), tiny_inputs()
    run = compiled(model, plans)
    with torch.no_grad(), executions() as steps:
        for timestep in timesteps:
            run(x, timestep)
    for one, timestep in zip(steps, timesteps, strict=True):
        largest = timestep.to(torch.float32).max()
        assert ran(one) == asked(plans, int((torch.tensor(edges) <= largest).sum()))


class CountReads(TorchDispatchMode):
    """Counts what waits for a device: reading a tensor's value."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_choosing_reads_one_number():
    with CountReads() as counted:
        assert range_on_host(torch.tensor([[3.0, 250.0], [0.0, 1.0]]), as_fp32(EDGES)) == 1
    assert counted.reads == 1
    assert range_names((0.25, 0.5)) == ["t < 0.25", "0.25 <= t < 0.5", "0.5 <= t"]


def test_released_weights_have_all_forms_before_they_go(without_inductor):
    plans, (x, _) = recipe(), tiny_inputs()
    times = [torch.full((2,), t) for t in (900.0, 600.0, 300.0, 100.0)]
    kept, released = (compiled(tiny_dit(1), plans, weights=mode) for mode in ("keep", "release"))
    with torch.no_grad():
        for t in times:
            assert torch.equal(kept(x, t), released(x, t))
        block = released._orig_mod.blocks[0]
        assert all(full_bytes(getattr(block, name).weight) == 0 for name in SITES)
        # New weights, as a LoRA that is loaded: in all forms again, and gone again.
        for run in (kept, released):
            torch.manual_seed(3)
            run._orig_mod.blocks[0].up.weight = nn.Parameter(torch.randn(256, 64), requires_grad=False)
        for t in times:
            assert torch.equal(kept(x, t), released(x, t))
        assert full_bytes(block.up.weight) == 0


def test_what_one_range_reads_in_full_precision_is_not_released(without_inductor):
    sites = SITES | {"up": ("w8a8", "fp8", "w8a8", "w8a8")}  # refused on a CPU
    plans, (x, _) = recipe(sites=sites), tiny_inputs()
    run = compiled(tiny_dit(1), plans, weights="release")
    with torch.no_grad(), executions() as steps:
        for t in (900.0, 300.0, 100.0):
            run(x, torch.full((2,), t))
    block = run._orig_mod.blocks[0]
    assert full_bytes(block.up.weight) > 0 == full_bytes(block.down.weight)
    assert [one.report.site("blocks.0.up").done for one in steps] == ["w8a8", None, "w8a8"]
    assert "also reads it in full precision" in steps[0].report.site("blocks.0.up").reason


class Timeless(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = tiny_dit(1)

    def forward(self, x, when=None):
        return self.body(x, torch.zeros(2) if when is None else torch.full((2,), when))


def test_what_cannot_choose_a_range_is_refused(without_inductor):
    x, t = tiny_inputs()
    inside = recipe(prefix="body.blocks.0.")
    with pytest.raises(BackendCompilerFailed) as caught, torch.no_grad():
        compiled(Timeless(), inside)(x)
    message = str(caught.value.inner_exception)
    assert "body.blocks.0.q: the recipe has a scheme for each of 4 ranges of the timestep" in message
    assert (
        "no tensor argument 'timestep' or 'timesteps' or 't': compile the whole model in one graph" in message
    )
    with (
        pytest.raises(BackendCompilerFailed, match="pass the timestep as a tensor"),
        torch.no_grad(),
    ):
        compiled(Timeless(), recipe(timestep="when", prefix="body.blocks.0."))(x, 5.0)
    elsewhere = recipe(prefix="other.")
    here = {"body.blocks.0.q": vq.SitePlan(scheme=vq.QuantScheme.parse("w8a8"))}
    with torch.no_grad(), executions() as steps:  # plain recipes, and ranges of other sites, need no timestep
        compiled(Timeless(), inside.at_range(1))(x)
        compiled(Timeless(), replace(elsewhere, sites={**elsewhere.sites, **here}))(x)
    assert [one.report.ranges for one in steps] == [None, None]
    assert ran(steps[0]) == asked(inside, 1)
    with pytest.raises(
        vq.RecipeError, match=r"holds its weight in one: compile the model.*recipe\.at_range\(i\)"
    ):
        vq.quantize_(tiny_dit(1), (x, t), recipe=recipe())
    assert vq.quantize_(tiny_dit(1), (x, t), recipe=recipe().at_range(3)).site("blocks.0.out").done == "w8a8"
    with pytest.raises(vq.OptionError, match="give one of the two"):
        vq.explain(tiny_dit(1), x, t, options={"recipe": recipe(), "low_scheme": "w8a7"})


def test_explain_tells_the_bits_of_all_ranges(without_inductor):
    (x, _), t = tiny_inputs(), torch.full((2,), 300.0)
    report = vq.explain(tiny_dit(1), x, t, options={"recipe": recipe(), "weights": "release"}, graphs=True)
    assert [found.graphs for found in report.ranges] == [(0, 1, 0, 2)]
    (note,) = (note for note in report.notes if "by range of the timestep" in note)
    assert note.endswith("what ran here is the graph of 250 <= t < 500.")
    assert "t < 250: 6; 250 <= t < 500: 6; 500 <= t < 750: 6; 750 <= t: 6.33 (3 graphs, " in note
    assert {site.fqn: site.done for site in report.sites if site.done} == asked(recipe(), 1)
    assert report.to_dict()["ranges"][0]["edges"] == EDGES
    assert report.snapshots
    assert "by range of the timestep" in str(report)
