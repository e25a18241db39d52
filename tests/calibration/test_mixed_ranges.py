"""Mixed precision by range of the timestep: each unit is measured in the steps of one range, and the table says so."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import viditq_fx as vq
from tests.small_models import tiny_dit, tiny_inputs
from viditq_fx.calibration.sensitivity import relative_square
from viditq_fx.calibration.swap import StepRanges
from viditq_fx.calibration.units import Unit
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.runtime import executions

RECIPE = vq.Recipe(scheme=vq.QuantScheme.parse("w8a8"))
STEPS = [900.0, 800.0, 700.0, 500.0, 300.0, 200.0, 100.0]
EDGES = (250.0, 600.0)
CALLS = (2, 2, 3)
UNITS = ["blocks.0.down", "blocks.0.k", "blocks.0.out", "blocks.0.up"]


def draw(model, steps=STEPS, seen=None):
    """Euler steps from noise."""
    x, _ = tiny_inputs()
    for step in steps:
        x = x - model(x, torch.full((2,), step)) / len(steps)
        if seen is not None:
            seen.append(sum(isinstance(layer, QuantLinear) for layer in model.modules()))
    return x


def measured(model=None, run=draw, recipe=RECIPE, **asked):
    return vq.measure_sensitivity(
        tiny_dit(1) if model is None else model, run, recipe, **({"ranges": 3} | asked)
    )


@pytest.fixture(scope="module")
def table():
    return measured()


def content(table):
    """All of a table that can be compared."""
    names = ("units", "schemes", "metrics", "edges", "calls", "timestep", "parts")
    return [dict(table.errors), *(getattr(table, name) for name in names)]


def test_a_unit_is_in_integers_in_the_steps_of_one_range_alone(table):
    assert (table.edges, table.calls, table.timestep) == (EDGES, CALLS, "timestep")
    assert [unit.name for unit in table.units] == UNITS
    model, quantized = tiny_dit(1), tiny_dit(1)
    down = QuantLinear.from_linear(quantized.blocks[0].down, vq.QuantScheme.parse("w4a8"))
    quantized.blocks[0].down = down
    reference = draw(model)
    for part, places in enumerate([(5, 6), (3, 4), (0, 1, 2)]):

        def choose(x, t, places=places):
            return (quantized if STEPS.index(float(t[0])) in places else model)(x, t)

        x, _ = tiny_inputs()
        for step in STEPS:
            x = x - choose(x, torch.full((2,), step)) / len(STEPS)
        assert table.loss(table.units[0], "w4a8", part) == pytest.approx(
            relative_square(reference, x), rel=1e-3
        )
    losses = [table.loss(table.units[0], "w4a8", part) for part in range(3)]
    assert len(set(losses)) == 3
    assert all(
        table.loss(unit, "w8a8", part) < table.loss(unit, "w4a8", part)
        for unit in table.units
        for part in range(3)
    )


def test_one_range_is_the_table_of_before(table, tmp_path):
    whole = measured(ranges=1)
    assert (whole.edges, whole.calls, whole.in_ranges) == ((), (), ())
    assert dict(whole.errors) == dict(table.errors)  # groups are measured over all steps
    document = json.loads(whole.save(tmp_path / "a.json").read_text())
    assert document["version"] == 1
    assert not document.keys() & {"edges", "calls", "timestep"}
    assert set(document["units"][0]["losses"]) == {"w4a8", "w8a8"}
    assert content(vq.SensitivityTable.load(tmp_path / "a.json")) == content(whole)


def test_interrupted_and_resumed_by_unit_and_range(table, tmp_path):
    file, runs = tmp_path / "table.json", []

    def run(model):
        runs.append(0)
        if len(runs) == 9:  # two in full precision, one group, then unit 0 in ranges 0, 1 and half of 2
            raise KeyboardInterrupt
        return draw(model)

    with pytest.raises(KeyboardInterrupt):
        measured(run=run, resume=file)
    kept = vq.SensitivityTable.load(file)
    assert [len(part.get(UNITS[0], {})) for part in kept.parts] == [2, 2, 0]
    with pytest.raises(
        vq.RecipeError, match=r"no 'visual' loss of unit 'blocks\.0\.down' at 'w4a8' in range 2"
    ):
        kept.loss(kept.units[0], "w4a8", 2)
    resumed = measured(run=run, resume=file)
    assert len(runs) == 9 + 2 + 2 * (4 * 3 - 2)
    assert content(resumed) == content(table) == content(vq.SensitivityTable.load(file))
    with pytest.raises(vq.RecipeError, match=r"was begun with ranges \(250\.0, 600\.0\), now \(400\.0,\)"):
        measured(resume=file, ranges=2)


def test_the_layers_come_back_also_after_an_error_inside_a_call():
    model, seen = tiny_dit(1), []
    before = dict(model.named_modules())

    def breaks(norm, args):
        if sum(isinstance(layer, QuantLinear) for layer in model.modules()) == 1:
            raise ZeroDivisionError

    def run(given):
        seen.clear()
        return draw(given, seen=seen)

    late = model.blocks[0].norm.register_forward_pre_hook(breaks)
    with pytest.raises(ZeroDivisionError):
        measured(model, run)
    late.remove()
    assert seen == [0] * 5  # between calls the model is its own: the first unit, up to the lowest range
    assert dict(model.named_modules()) == before
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("timesteps", "count", "edges", "calls"),
    [
        ([3.0, 2.0, 1.0, 0.0], 2, (1.5,), (2, 2)),
        (
            [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0],
            4,
            (0.125, 0.375, 0.75),
            (2, 2, 2, 2),
        ),  # two calls a step
        ([900.0, 500.0, 900.0, 100.0], 3, (300.0, 700.0), (1, 1, 2)),
        ([float(t) for t in range(20)], 4, (4.5, 9.5, 14.5), (5, 5, 5, 5)),
    ],
)
def test_ranges_are_equal_shares_of_the_timesteps(timesteps, count, edges, calls):
    assert StepRanges.of(timesteps, count, nn.Identity()) == StepRanges(edges=edges, calls=calls)
    assert StepRanges.of(timesteps[::-1], count, nn.Identity()) == StepRanges(edges=edges, calls=calls)


class Timeless(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = tiny_dit(1)

    def forward(self, x, when=None):
        return self.body(x, torch.zeros(2) if when is None else when)


def test_mistakes_are_told():
    for asked, message in [
        ({"ranges": 0}, "ranges=0; give how many"),
        ({"ranges": True}, "ranges=True"),
        ({"ranges": 8}, "at 7 different timesteps; let it draw with as many steps"),
    ]:
        with pytest.raises(vq.RecipeError, match=message):
            measured(**asked)
    with pytest.raises(vq.RecipeError, match="7 of 7 calls of this Timeless have no timestep"):
        measured(Timeless())
    runs = []

    def drifts(model):
        runs.append(0)
        draw(model, STEPS if len(runs) < 3 else [900.0])
        return torch.ones(1)

    with pytest.raises(vq.RecipeError, match=r"at no timestep of the range 't < 250', and did in full"):
        measured(run=drifts)
    found = measured(Timeless(), recipe=replace(RECIPE, timestep="when"), ranges=2)
    assert found.timestep == "when"


def test_tables_in_ranges_on_disk(table, tmp_path):
    file = table.save(tmp_path / "table.json")
    assert content(vq.SensitivityTable.load(file)) == content(table)
    text = file.read_text()
    document = json.loads(text)
    assert document["version"] == 2
    for change in (
        lambda d: d.update(version=1),
        lambda d: d.update(version=3),
        lambda d: d.update(edges=[]),
        lambda d: d.update(edges=[600.0, 250.0]),
        lambda d: d.update(calls=[2, 2]),
        lambda d: d.update(calls=[2, 2, 0]),
        lambda d: d.update(calls=[2, 2, 3.5]),
        lambda d: d.pop("timestep"),
        lambda d: d["units"][0].update(losses=d["units"][0]["losses"][0]),
        lambda d: d["units"][0]["losses"].pop(),
        lambda d: d["units"][0]["losses"].append([]),
        lambda d: d["units"][0]["losses"][1]["w4a8"].update(visual="much"),
    ):
        bad = json.loads(text)
        change(bad)
        file.write_text(json.dumps(bad))
        with pytest.raises(vq.RecipeError, match=r"table\.json"):
            vq.SensitivityTable.load(file)


def test_the_heat_map_has_a_column_for_each_range(table, tmp_path):
    pytest.importorskip("matplotlib")
    assert table.plot(tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    swapped = replace(table, in_ranges=table.in_ranges[::-1])
    assert swapped.plot(tmp_path / "b.png").read_bytes() != (tmp_path / "a.png").read_bytes()


def made(losses, weights, edges=(250.0, 600.0), calls=CALLS, schemes=("w4a8", "w8a8")):
    """A table of units with these losses [unit][range][scheme] and numbers of weights."""
    units = tuple(
        Unit(sites=(f"{index:02}",), shapes=((128, count),), group="visual")
        for index, count in enumerate(weights)
    )
    parts = tuple(
        {
            unit.name: {s: {"visual": loss} for s, loss in zip(schemes, rows[part], strict=True)}
            for unit, rows in zip(units, losses, strict=True)
        }
        for part in range(len(calls))
    )
    return vq.SensitivityTable(
        schemes=schemes,
        metrics=("visual",),
        units=units,
        losses={},
        errors={"visual": 0.5},
        edges=edges,
        calls=calls,
        timestep="timestep",
        in_ranges=parts,
    )


def names(recipe):
    return {path: [str(scheme) for scheme in plan.by_range] for path, plan in recipe.sites.items()}


@pytest.mark.parametrize("method", ["greedy", "milp"])
def test_bits_go_to_the_unit_and_range_that_need_them(method):
    if method == "milp":
        pytest.importorskip("scipy")
    table = made(
        [[(1.0, 0.0), (9.0, 0.0), (1.0, 0.0)], [(1.0, 0.0), (2.0, 0.0), (8.0, 0.0)], [(0.1, 0.0)] * 3],
        [100, 100, 100],
    )
    # Ranges have 2, 2 and 3 of 7 calls: 5 of the 21 unit-calls at 8 bits.
    recipe = vq.allocate(table, RECIPE, budget=4 + 4 * 5 / 21, method=method)
    assert names(recipe) == {"00": ["w4a8", "w8a8", "w4a8"], "01": ["w4a8", "w4a8", "w8a8"], "02": []}
    assert (recipe.range_edges, recipe.ranges, recipe.timestep) == (EDGES, 3, "timestep")
    assert str(recipe.sites["02"].scheme) == "w4a8"
    mixed = recipe.provenance["mixed"]
    assert mixed["ranges"] == {"edges": list(EDGES), "calls": list(CALLS), "bits": [4.0, 16 / 3, 16 / 3]}
    assert mixed["groups"]["visual"]["cost"] == pytest.approx(4 + 4 * 5 / 21)
    assert (
        f"mixed precision by range of the timestep ({method}): visual losses 1, 9, 1 alone at w4a8, the worst "
        in (recipe.sites["00"].reason or "")
    )
    # One call less, and the range of three calls no longer fits.
    less = names(vq.allocate(table, RECIPE, budget=4 + 4 * 4 / 21, method=method))
    assert less == {"00": ["w4a8", "w8a8", "w4a8"], "01": ["w4a8", "w8a8", "w4a8"], "02": []}
    whole = vq.allocate(table, RECIPE, budget=8.0, method=method)
    assert (whole.range_edges, whole.timestep) == ((), None)
    assert {str(plan.scheme) for plan in whole.sites.values()} == {"w8a8"}


ROWS = st.tuples(*[st.tuples(st.floats(0, 1, width=16), st.floats(0, 1, width=16))] * 2)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(ROWS, st.integers(1, 9)), min_size=1, max_size=4), st.floats(4, 8))
def test_milp_is_the_optimum_over_units_and_ranges(rows, bits):
    pytest.importorskip("scipy")
    calls = (1, 3)
    table = made([row for row, _ in rows], [n for _, n in rows], (5.0,), calls)
    costs = [(row[part], n * calls[part]) for row, n in rows for part in range(2)]
    total = sum(n for _, n in costs)
    best = min(
        sum(loss[high] for (loss, _), high in zip(costs, pick, strict=True))
        for pick in itertools.product((0, 1), repeat=len(costs))
        if sum(n * (4 + 4 * high) for (_, n), high in zip(costs, pick, strict=True)) <= bits * total
    )
    for method in ("greedy", "milp"):
        recipe = vq.allocate(table, RECIPE, budget=bits, method=method)
        group = recipe.provenance["mixed"]["groups"]["visual"]
        spent = sum(
            recipe.at_range(part).sites[unit.name].scheme.weight_bits * unit.weights * calls[part]
            for unit in table.units
            for part in range(recipe.ranges)
        )
        if recipe.ranges == 2:
            assert spent <= bits * total * 128 + 1e-6
            assert group["cost"] == pytest.approx(spent / (total * 128))
        assert group["cost"] <= bits + 1e-9
        if method == "milp":
            assert group["loss"] == pytest.approx(best, abs=1e-7)


def test_latency_is_of_a_call_and_bytes_are_of_all_ranges():
    table = made([[(1.0, 0.0), (9.0, 0.0), (1.0, 0.0)], [(3.0, 0.0), (3.0, 0.0), (3.0, 0.0)]], [128, 128])
    costs = {unit.name: {"w4a8": 1.0, "w8a8": 2.0} for unit in table.units}
    recipe = vq.allocate(table, RECIPE, budget={"latency": 2 + 2 / 7}, costs=costs)
    assert names(recipe) == {"00": ["w4a8", "w8a8", "w4a8"], "01": []}
    packed = {s: vq.QuantScheme.parse(s).weight_form.nbytes(128, 128) for s in table.schemes}
    # Two forms of a weight take more than the larger: a range saves no memory, so units are promoted whole.
    recipe = vq.allocate(table, RECIPE, budget={"bytes": sum(packed.values())})
    assert (names(recipe), recipe.range_edges) == ({"00": [], "01": []}, ())
    assert {path: str(plan.scheme) for path, plan in recipe.sites.items()} == {"00": "w8a8", "01": "w4a8"}


def test_balance_and_rotation_are_those_of_the_site_in_every_range():
    table = made([[(1.0, 0.0), (9.0, 0.0), (1.0, 0.0)], [(0.1, 0.0)] * 3], [64, 64])
    signs = torch.ones(64)
    plan = vq.SitePlan(
        scheme=vq.QuantScheme.parse("w4a8-rot"), multiplier=signs, rotation=16, reason="rotated"
    )
    recipe = vq.allocate(table, replace(RECIPE, sites={"00": plan, "other": plan}), budget=5.0)
    mixed = recipe.sites["00"]
    assert (mixed.rotation, mixed.multiplier, recipe.sites["other"]) == (16, signs, plan)
    assert [str(scheme) for scheme in mixed.by_range] == ["w4a8-rot", "w8a8-rot", "w4a8-rot"]
    assert mixed.reason.endswith("; rotated")
    middle = recipe.at_range(1).sites["00"]
    assert (str(middle.scheme), middle.by_range, middle.rotation) == ("w8a8-rot", (), 16)
    # A site that the recipe does not name is rotated where its scheme says so.
    table = made([[(1.0, 0.0), (9.0, 0.0), (1.0, 0.0)]], [64], schemes=("w4a8-rot", "w8a8"))
    recipe = vq.allocate(table, RECIPE, budget=5.5)
    assert [recipe.at_range(i).sites["00"].rotation for i in range(3)] == [64, 1, 64]


def test_recipes_that_do_not_fit_a_table_in_ranges_are_refused():
    table = made([[(1.0, 0.0), (9.0, 0.0), (1.0, 0.0)]], [64])
    with pytest.raises(vq.RecipeError, match="the argument 'when', and the table's ranges are of 'timestep'"):
        vq.allocate(table, replace(RECIPE, timestep="when"), budget=5)
    ranged = vq.allocate(table, RECIPE, budget=5.5)
    other = replace(ranged, sites={"left": ranged.sites["00"]})
    assert vq.allocate(table, other, budget=5.5).sites["left"] is other.sites["left"]
    with pytest.raises(vq.RecipeError, match=r"for 'left', which is in no unit, and the table parts"):
        vq.allocate(replace(table, edges=(1.0, 2.0)), other, budget=5.5)
    broken = replace(table, in_ranges=(*table.in_ranges[:2], {}))
    with pytest.raises(vq.RecipeError, match="unit '00' at 'w4a8' in range 2 of the timestep"):
        vq.allocate(broken, RECIPE, budget=5)
    with pytest.raises(vq.RecipeError, match="loss of nan at w4a8 in range 0"):
        vq.allocate(made([[(torch.nan, 0.0)] * 3], [64]), RECIPE, budget=5)


def test_what_was_allocated_is_what_the_steps_run_at(table, monkeypatch, tmp_path):
    torch._dynamo.reset()
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
    vq.allocate(table, RECIPE, budget=5.0).save(tmp_path / "recipe")
    recipe = vq.Recipe.load(tmp_path / "recipe")
    run = torch.compile(
        tiny_dit(1), backend="viditq", options={"recipe": tmp_path / "recipe"}, fullgraph=True
    )
    with executions() as ran, torch.no_grad():
        draw(run)
    assert len(ran) == len(STEPS)
    for step, one in zip(STEPS, ran, strict=True):
        plans = recipe.at_range(sum(edge <= step for edge in EDGES)).sites
        done = {site.fqn: site.done for site in one.report.sites if site.outcome == "quantized"}
        assert done == {path: str(plan.scheme) for path, plan in plans.items()}
    bits = [one.report.average_weight_bits() for one in ran]
    assert len(set(bits)) > 1
    cost = recipe.provenance["mixed"]["groups"]["visual"]["cost"]
    assert sum(bits) / len(bits) == pytest.approx(cost)
    assert 4.0 < cost <= 5.0
