"""Mixed precision by range of the timestep: each unit is measured in the steps of one range, and the table says so."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import viditq_fx as vq
from tests.small_models import tiny_dit, tiny_inputs
from viditq_fx.calibration.sensitivity import relative_square
from viditq_fx.calibration.swap import StepRanges
from viditq_fx.quant_linear import QuantLinear

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
