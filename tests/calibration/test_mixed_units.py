"""Units, groups and losses are what they should be, and a model that was measured comes back."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import viditq_fx as vq
from tests.calibration.film import JUDGE, RECIPE, WIDTH, Film, film, largest, measured, run
from tests.models.tiny_dits import TINY_DITS
from viditq_fx.calibration.sensitivity import relative_square
from viditq_fx.calibration.units import survey
from viditq_fx.quant_linear import QuantLinear


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


def test_mistakes_of_a_measurement_are_told(traced_once):
    model, noise = film(), torch.Generator().manual_seed(0)
    for asked, message in [
        ({"draw": 5}, "a function"),
        ({"draw": lambda m: [run(m)]}, "returns one tensor of real numbers, not list"),
        ({"draw": lambda m: run(m) * torch.nan}, "what run draws in full precision is nan"),
        (
            {"draw": lambda m: m(torch.randn(1, 4, 20, 8, generator=noise), torch.randn(1, 18, WIDTH))},
            r"drew different samples.*numpy.random.*random.seed",
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
