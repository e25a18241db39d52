"""Mixed precision: units, groups and losses are what they should be, and budgets are spent on what needs them."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import viditq_fx as vq
from tests.models.tiny_dits import TINY_DITS
from viditq_fx.calibration import allocate as allocation
from viditq_fx.calibration import sensitivity, units
from viditq_fx.calibration.sensitivity import relative_square
from viditq_fx.calibration.units import Unit, survey
from viditq_fx.quality import Judge
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.runtime import executions

WIDTH = 32
RECIPE = vq.Recipe(scheme=vq.QuantScheme.parse("w8a8"))


class Attention(nn.Module):
    """Multi-head attention of x [B, S, C] to y [B, L, C]."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, y):
        q, k, v = (f(t)[:, None] for f, t in ((self.q, x), (self.k, y), (self.v, y)))
        return self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])


class Film(nn.Module):
    """x [B, F, S, 8], text [B, L, C]: attention over places, to text and over frames, then a feed-forward."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(8, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8)
        self.a, self.b, self.c = (Attention() for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, text):
        x, frames = self.stem(x).flatten(0, 1), x.shape[1]
        h = self.norm(x)
        x = x + self.a(h, h)
        x = x + self.b(self.norm(x), text.repeat_interleave(frames, 0))
        x = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)
        h = self.norm(x)
        x = x + self.c(h, h)
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


SENSITIVE = "a.out"
FRAMES = {"temporal": "c.*"}


def film():
    torch.manual_seed(0)
    model = Film().eval().requires_grad_(False)
    with torch.no_grad():  # one channel so large that 4 bits leave nothing of the others
        model.a.out.weight[:, 0] *= 30.0
    return model


def run(model):
    return model(torch.randn(1, 4, 20, 8), torch.randn(1, 18, WIDTH))


def largest(reference, test):
    return float((reference - test).abs().max())


JUDGE = Judge(
    visual=relative_square, alignment=largest, temporal=lambda r, t: float((r - t).diff(dim=1).abs().mean())
)


def measured(model=None, draw=run, recipe=RECIPE, **asked):
    asked = {"metrics": JUDGE, "groups": FRAMES} | asked
    return vq.measure_sensitivity(film() if model is None else model, draw, recipe, **asked)


@pytest.fixture(scope="module")
def table():
    return measured()


@pytest.fixture
def traced_once(monkeypatch):
    """Trace the model once for all measurements of a test: for those that fail afterwards."""
    known = []

    def again(model, draw, recipe, groups):
        known[:] = known or [survey(model, draw, recipe, {})[0]]
        return replace(known[0], units=units.in_groups(known[0].units, groups)), draw(model)

    monkeypatch.setattr(sensitivity, "survey", again)


def plain(table):
    """All of a table that can be compared."""
    return table.units, dict(table.losses), dict(table.errors), table.schemes, table.metrics


def test_linears_that_share_an_input_are_one_unit_and_roles_choose_the_group(table):
    assert [(unit.sites, unit.group) for unit in table.units] == [
        (("a.k", "a.q", "a.v"), "visual"),
        (("a.out",), "visual"),
        (("b.k", "b.v"), "alignment"),
        (("b.out",), "alignment"),
        (("b.q",), "alignment"),
        (("c.k", "c.q", "c.v"), "temporal"),
        (("c.out",), "temporal"),
        (("down",), "visual"),
        (("up",), "visual"),
    ]
    assert table.units[-2].shapes == ((WIDTH, 2 * WIDTH),)


@pytest.mark.parametrize("name", ["pixart_sigma", "sana"])
def test_cross_attention_is_found_in_real_models_by_structure(name):
    dit = TINY_DITS[name]
    model, inputs = dit.build(layers=1), dit.make_inputs(size=0, batch=1)
    found, _ = survey(model, lambda m: dit.run(m, inputs), RECIPE, {})
    crossing = {site for unit in found.units if unit.group == "alignment" for site in unit.sites}
    assert crossing == {f"transformer_blocks.0.attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")}


class Pooled(Film):
    """Keys are the same stream, fewer: self-attention, though they come from another input."""

    def forward(self, x, text):
        x = self.norm(self.stem(x).flatten(0, 1))
        pooled = self.norm(F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2))
        return self.head(x + self.a(x, pooled) + self.b(2 * x, text.repeat_interleave(len(x), 0)))


def test_keys_of_the_same_stream_are_no_cross_attention():
    torch.manual_seed(0)
    found, _ = survey(Pooled().eval().requires_grad_(False), run, RECIPE, {})
    groups = {site: unit.group for unit in found.units for site in unit.sites}
    assert {site: group for site, group in groups.items() if site[0] in "ab"} == {
        f"{module}.{part}": group
        for module, group in (("a", "visual"), ("b", "alignment"))
        for part in ("q", "k", "v", "out")
    }


def test_losses_are_those_of_the_layers_swapped_by_hand(table):
    model = film()
    torch.manual_seed(0)
    x, text = torch.randn(1, 4, 20, 8), torch.randn(1, 18, WIDTH)
    reference = model(x, text)
    model.b.k, model.b.v = (
        QuantLinear.from_linear(m, vq.QuantScheme.parse("w4a8")) for m in (model.b.k, model.b.v)
    )
    found = table.losses["b.k"]["w4a8"]
    assert found["alignment"] == pytest.approx(largest(reference, model(x, text)), rel=1e-5)
    assert found["visual"] == pytest.approx(relative_square(reference, model(x, text)), rel=1e-4)
    assert all(table.loss(unit, "w8a8") < table.loss(unit, "w4a8") for unit in table.units)
    assert set(table.errors) == {"visual", "alignment", "temporal"}


def test_the_model_comes_back_also_after_an_error():
    model, calls = film(), []
    before = dict(model.named_modules())

    def draw(given):
        calls.append(sum(isinstance(m, QuantLinear) for m in given.modules()))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return run(given)

    with pytest.raises(KeyboardInterrupt):
        measured(model, draw)
    assert calls == [0, 0, 4, 4, 6, 3]  # full precision twice, three groups, the first unit
    assert dict(model.named_modules()) == before


def test_a_compiled_model_is_measured_eagerly(table):
    model = film()
    wrapped = torch.compile(model, backend="eager")
    found = measured(wrapped, between=())
    assert found.units == table.units
    assert found.loss(found.units[1], "w4a8") == pytest.approx(table.loss(table.units[1], "w4a8"), rel=1e-4)


def test_interrupted_and_resumed_is_uninterrupted(table, tmp_path):
    file, runs = tmp_path / "new" / "table.json", []

    def interrupted(model):
        runs.append(0)
        if len(runs) == 10:
            raise KeyboardInterrupt
        return run(model)

    with pytest.raises(KeyboardInterrupt):
        measured(draw=interrupted, resume=file)
    assert len(json.loads(file.read_text())["units"]) == 9
    runs += [0] * 100
    resumed = measured(draw=interrupted, resume=file)
    assert len(runs) == 10 + 100 + 2 + 2 * (9 - 2)  # two units were done
    assert plain(resumed) == plain(table) == plain(vq.SensitivityTable.load(file))


def test_the_file_of_another_measurement_is_refused(table, tmp_path, traced_once):
    file = table.save(tmp_path / "table.json")
    with pytest.raises(vq.RecipeError, match=r"was begun with seed 0, now 1"):
        measured(resume=file, seed=1)
    with pytest.raises(vq.RecipeError, match="was begun with samples"):
        measured(draw=lambda model: 2 * run(model), resume=file)
    with pytest.raises(vq.RecipeError, match="was begun with units others"):
        measured(resume=file, groups={"visual": "c.*"})


def test_damaged_tables_are_refused(table, tmp_path):
    file = table.save(tmp_path / "table.json")
    text = file.read_text()
    for old, new in (
        ('"version": 1', '"version": 2'),
        ('"sites"', '"site"'),
        ('"group": "visual"', '"group": 3'),
        ("{", "["),
        (text[-200:], ""),
        ('"visual": ', '"visual": NaN, "_": '),
        ('"b.out"', '"b.q"'),
    ):
        assert old in text
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(vq.RecipeError, match=r"table\.json"):
            vq.SensitivityTable.load(file)
    with pytest.raises(vq.RecipeError, match="cannot be read"):
        vq.SensitivityTable.load(tmp_path)


def test_the_heat_map_is_a_png(table, tmp_path):
    pytest.importorskip("matplotlib")
    assert table.plot(tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert table.plot(tmp_path / "b.png", "w8a8").read_bytes() != (tmp_path / "a.png").read_bytes()
    with pytest.raises(vq.RecipeError, match="'w6a6' was not measured"):
        table.plot(tmp_path / "c.png", "w6a6")


@pytest.mark.parametrize("method", ["greedy", "milp"])
def test_what_was_made_sensitive_is_promoted_first_and_runs_on_integers(table, method, monkeypatch):
    if method == "milp":
        pytest.importorskip("scipy")
    (unit,) = (unit for unit in table.units if unit.name == SENSITIVE)
    visual = replace(table, units=tuple(replace(u, group="visual") for u in table.units))
    weights = sum(u.weights for u in visual.units)
    recipe = vq.allocate(visual, RECIPE, budget=4 + 4 * unit.weights / weights, method=method)
    assert {site for site, plan in recipe.sites.items() if str(plan.scheme) == "w8a8"} == {SENSITIVE}
    assert f"mixed precision ({method}): visual loss" in recipe.sites[SENSITIVE].reason
    assert "the 1. largest of 9" in recipe.sites[SENSITIVE].reason
    assert recipe.provenance["mixed"]["groups"]["visual"]["cost"] == pytest.approx(
        4 + 4 * unit.weights / weights
    )
    model = film()
    # Inductor's code is tested elsewhere; passes, kernels and reports are the real ones.
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
    with executions() as ran, torch.no_grad():
        run(torch.compile(model, backend="viditq", options={"recipe": recipe}))
    done = {site.fqn: site for one in ran for site in one.report.sites if site.planned}
    assert {path: site.outcome for path, site in done.items()} == dict.fromkeys(recipe.sites, "quantized")
    assert {path: site.done for path, site in done.items()} == {
        p: str(v.scheme) for p, v in recipe.sites.items()
    }
    report = vq.quantize_(model, (torch.randn(1, 4, 20, 8), torch.randn(1, 18, WIDTH)), recipe=recipe)
    assert {s.fqn: s.done for s in report.sites if s.done} == {
        p: str(v.scheme) for p, v in recipe.sites.items()
    }


def test_groups_have_budgets_of_their_own(table):
    worse = replace(table, errors=dict(table.errors) | {"alignment": 1e9 * table.errors["alignment"]})
    mixed = vq.allocate(worse, RECIPE, budget=5).provenance["mixed"]
    groups = mixed["groups"]
    assert mixed["budget"] == {"bits": 5.0}
    assert groups["alignment"]["share"] == groups["alignment"]["cost"] == 8.0
    assert groups["temporal"]["share"] < 8.0
    total = sum(g["share"] * g["weights"] for g in groups.values()) / sum(
        g["weights"] for g in groups.values()
    )
    assert total == pytest.approx(5.0, abs=1e-4)
    total = sum(g["cost"] * g["weights"] for g in groups.values()) / sum(
        g["weights"] for g in groups.values()
    )
    assert total <= 5.0


def test_what_a_group_cannot_spend_goes_to_the_neediest():
    table = made([(5.0, 0.0), (4.0, 0.0), (3.0, 0.0)], [100, 100, 100], groups=["a", "b", "b"])
    table = replace(table, errors={"a": 0.5, "b": 1.01})
    groups = vq.allocate(table, RECIPE, budget=4 + 4 / 3).provenance["mixed"]["groups"]
    assert groups["a"]["cost"] == 4.0 < groups["a"]["share"]
    assert groups["b"]["share"] < groups["b"]["cost"] == 6.0


def test_transforms_and_plans_of_what_was_not_measured_stay(table):
    signs = torch.ones(WIDTH)
    plan = vq.SitePlan(
        scheme=vq.QuantScheme.parse("w8a8-rot"), multiplier=signs, rotation=16, reason="rotated"
    )
    recipe = replace(RECIPE, sites={"a.out": plan, "other": plan})
    mixed = vq.allocate(table, recipe, budget=4)
    assert mixed.sites["other"] is plan
    assert (mixed.sites["a.out"].rotation, mixed.sites["a.out"].multiplier) == (16, signs)
    assert str(mixed.sites["a.out"].scheme) == "w4a8-rot"
    assert mixed.sites["a.out"].reason.endswith("; rotated")


def made(losses, weights, schemes=("w4a8", "w8a8"), groups=None):
    """A table of units with these losses [unit][scheme] and numbers of weights."""
    groups = groups or ["visual"] * len(losses)
    units = tuple(
        Unit(sites=(f"{i:02}",), shapes=((n, 1),), group=g)
        for i, (n, g) in enumerate(zip(weights, groups, strict=True))
    )
    return vq.SensitivityTable(
        schemes=schemes,
        metrics=("visual",),
        units=units,
        losses={
            unit.name: {s: {unit.group: loss} for s, loss in zip(schemes, row, strict=True)}
            for unit, row in zip(units, losses, strict=True)
        },
        errors=dict.fromkeys(groups, 0.5),
    )


def loss_of(recipe):
    return sum(group["loss"] for group in recipe.provenance["mixed"]["groups"].values())


def cost_of(recipe, table):
    return sum(recipe.sites[u.name].scheme.weight_bits * u.weights for u in table.units)


SCHEMES = ("w4a8", "w6a6", "w8a8")
ROWS = st.tuples(*[st.floats(0, 1, width=16)] * 3)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(ROWS, st.integers(1, 40)), min_size=1, max_size=6), st.floats(4, 8))
def test_milp_is_the_optimum_and_never_worse_than_greedy(rows, bits):
    pytest.importorskip("scipy")
    table = made([row for row, _ in rows], [n for _, n in rows], SCHEMES)
    limit = math.floor(bits * sum(n for _, n in rows) + 1e-6)
    widths = (4, 6, 8)
    best = min(
        sum(row[i] for (row, _), i in zip(rows, pick, strict=True))
        for pick in itertools.product(range(3), repeat=len(rows))
        if sum(n * widths[i] for (_, n), i in zip(rows, pick, strict=True)) <= limit
    )
    by_greedy, by_milp = (vq.allocate(table, RECIPE, budget=bits, method=m) for m in ("greedy", "milp"))
    assert loss_of(by_milp) == pytest.approx(best, abs=1e-7)
    assert loss_of(by_milp) <= loss_of(by_greedy) + 1e-7
    assert max(cost_of(by_greedy, table), cost_of(by_milp, table)) <= limit


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(ROWS, st.integers(1, 10**6), st.sampled_from("abc")), min_size=1, max_size=12),
    st.floats(4, 8),
)
def test_shares_and_costs_are_within_the_budget(rows, bits):
    table = made(*zip(*[(row, n) for row, n, _ in rows], strict=True), SCHEMES, [group for *_, group in rows])
    recipe = vq.allocate(table, RECIPE, budget=bits)
    groups = recipe.provenance["mixed"]["groups"].values()
    limit = math.floor(bits * sum(n for _, n, _ in rows) + 1e-6)
    assert round(sum(g["share"] * g["weights"] for g in groups)) <= limit
    assert cost_of(recipe, table) <= limit


def test_bytes_and_latency_are_budgets_too():
    table = made([(5.0, 0.0), (3.0, 0.0), (4.0, 0.0)], [64, 64, 64])
    table = replace(table, units=tuple(replace(u, shapes=((64, 128),)) for u in table.units))
    packed = {s: vq.QuantScheme.parse(s).weight_form.nbytes(64, 128) for s in table.schemes}
    recipe = vq.allocate(table, RECIPE, budget={"bytes": 2 * packed["w4a8"] + packed["w8a8"]})
    assert [str(plan.scheme) for plan in recipe.sites.values()] == ["w8a8", "w4a8", "w4a8"]
    # Four bits are slower here: only what is fast is cheap.
    costs = {unit.name: {"w4a8": 2.0, "w8a8": 1.0} for unit in table.units}
    recipe = vq.allocate(table, RECIPE, budget={"latency": 3.0}, costs=costs)
    assert {str(plan.scheme) for plan in recipe.sites.values()} == {"w8a8"}
    recipe = vq.allocate(
        table, RECIPE, budget={"latency": 3.5}, costs=lambda site, scheme: 1.0 + 0.5 * (scheme == "w8a8")
    )
    assert [str(plan.scheme) for plan in recipe.sites.values()] == ["w8a8", "w4a8", "w4a8"]


def test_mistakes_of_a_budget_are_told():
    table = made([(5.0, 0.0), (3.0, 0.0)], [64, 64])
    for asked, message in [
        ({"budget": 3.9}, r"3.898 bits a weight cannot be met: the cheapest candidates take 4 bits a weight"),
        ({"budget": 0}, "average bits of a weight"),
        ({"budget": math.nan}, "average bits of a weight"),
        ({"budget": {"bits": 5, "bytes": 3}}, "average bits of a weight"),
        ({"budget": {"watts": 5}}, "average bits of a weight"),
        ({"budget": {"latency": 5}}, "needs costs="),
        ({"budget": 5, "costs": {}}, "no other budget reads them"),
        ({"budget": {"latency": 5}, "costs": {"00": {"w4a8": 1}}}, "site '00' at 'w8a8' takes None"),
        ({"budget": 5, "method": "ilp"}, "'greedy', 'milp'"),
    ]:
        with pytest.raises(vq.RecipeError, match=message):
            vq.allocate(table, RECIPE, **asked)
    with pytest.raises(vq.RecipeError, match="loss of nan at w4a8"):
        vq.allocate(made([(math.nan, 0.0)], [64]), RECIPE, budget=5)
    with pytest.raises(vq.RecipeError, match="has no 'visual' loss of unit '00' at 'w4a8'"):
        vq.allocate(replace(table, losses={}), RECIPE, budget=5)
    with pytest.raises(vq.RecipeError, match=r"has no site '00' of \[N, K\] = \[64, 1\]"):
        vq.allocate(table, replace(RECIPE, shapes={"00": (32, 1)}), budget=5)
    with pytest.raises(vq.RecipeError, match="keeps '00' in full precision"):
        vq.allocate(table, replace(RECIPE, sites={"00": vq.SitePlan(scheme=None)}), budget=5)


def test_without_scipy_the_way_out_is_told(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(allocation, "import_module", absent)
    with pytest.raises(ImportError, match=r"viditq_fx\[mixed\], or use method='greedy'"):
        vq.allocate(made([(5.0, 0.0), (3.0, 0.0)], [64, 64]), RECIPE, budget=6, method="milp")


def test_mistakes_of_a_measurement_are_told(traced_once):
    model, noise = film(), torch.Generator().manual_seed(0)
    for asked, message in [
        ({"draw": 5}, "a function"),
        ({"draw": lambda m: [run(m)]}, "returns one tensor of real numbers, not list"),
        ({"draw": lambda m: run(m) * torch.nan}, "what run draws in full precision is nan"),
        (
            {"draw": lambda m: m(torch.randn(1, 4, 20, 8, generator=noise), torch.randn(1, 18, WIDTH))},
            "drew different samples",
        ),
        ({"metrics": {}}, "group 'alignment' has no metric"),
        ({"metrics": 3}, "metrics=3"),
        ({"metrics": JUDGE.__dict__ | {"visual": 3}}, r"metrics \['visual'\]"),
        (
            {"metrics": JUDGE.__dict__ | {"visual": lambda r, t: math.nan}},
            "metric 'visual' of unit 'a.k' at w4a8 is nan",
        ),
        ({"groups": {"temporal": "d.*"}}, "'d.*' names none of the 9 units"),
        ({"groups": {"temporal": "c.q", "visual": "c.k"}}, "'c.k' is named by 'temporal' and by 'visual'"),
        ({"low": "w8a8"}, "each can be given once"),
        ({"low": "w8a8", "high": "w4a8"}, "from few bits to many"),
    ]:
        with pytest.raises(vq.RecipeError, match=message):
            measured(model, **asked)
    for scheme in ("fp8", "w8a8-static"):
        with pytest.raises(vq.SchemeError, match="cannot be searched"):
            measured(model, high=scheme)


def test_what_the_recipe_keeps_is_no_unit():
    recipe = replace(RECIPE, sites={"a.q": vq.SitePlan(scheme=None)}, keep=("c.*",))
    found, _ = survey(film(), run, recipe, {})
    assert [unit.name for unit in found.units] == ["a.out", "b.k", "b.out", "b.q", "down", "up"]
    assert set(found.left) == {"a.k", "a.q", "a.v"}
    with pytest.raises(vq.RecipeError, match="reached no linear of this Film that can be measured"):
        survey(film(), run, replace(RECIPE, keep=("*",)), {})
