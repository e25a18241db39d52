"""Scales by position ("per-token static"): what calibration finds, and that it refuses sequences of several lengths."""

import dataclasses

import pytest
import torch
from torch import nn

import viditq_fx as vq
from tests.calibration.test_calibrate import calls, hooked
from tests.small_models import relative_error, tiny_dit, tiny_inputs
from viditq_fx.calibration.ledger import InputKey
from viditq_fx.calibration.ranks import largest_of_ranks
from viditq_fx.calibration.run import collect
from viditq_fx.calibration.timesteps import range_of
from viditq_fx.calibration.trial import Trial
from viditq_fx.ops.rotate import rotate
from viditq_fx.ops.weight_forms import quantize_input
from viditq_fx.recipe import Recipe
from viditq_fx.scheme import QuantScheme, largest_int

STEPS = (900.0, 10.0)
TOKENS = 24
OFF = {"balance": "off", "rotation": "off"}


@pytest.mark.parametrize("rotation", ["off", "on"])
def test_scales_are_the_largest_of_each_position(rotation):
    model, asked = tiny_dit(layers=1), {"balance": 0.5, "rotation": rotation, "max_buckets": 1}
    recipe = vq.calibrate(model, calls(model, STEPS, TOKENS), scheme="w4a6-asym-position", **asked)
    assert recipe.edges == ()
    assert recipe.timestep is None
    assert len(recipe.sites) == 6
    read = hooked(model, calls(model, STEPS, TOKENS))
    for path, plan in recipe.sites.items():
        x = rotate(torch.cat(read[path]), plan.multiplier, plan.rotation)
        assert plan.rotation == {"off": 1, "on": x.shape[-1]}[rotation]
        want = x.abs().amax((0, 2)) / largest_int(6)
        torch.testing.assert_close(plan.input_scale, want, rtol=1e-5, atol=0)
        assert len(set(plan.input_scale.tolist())) == TOKENS


def test_a_position_of_zeros_alone_has_the_largest_scale():
    model = tiny_dit(layers=1)
    model.blocks[0].norm.forward = lambda x: x * (torch.arange(TOKENS) != 3)[:, None]
    model.blocks[0].modulation.weight.zero_()
    model.blocks[0].modulation.bias.zero_()
    recipe = vq.calibrate(model, calls(model, STEPS, TOKENS), scheme="w8a8-position", **OFF)
    scale_S = recipe.sites["blocks.0.up"].input_scale
    assert scale_S[3] == scale_S.max() > scale_S.min()


class Several(nn.Module):
    """Reads sequences of the lengths of its calls, by two linears that share a weight."""

    def __init__(self, other=None):
        super().__init__()
        self.dit, self.other = tiny_dit(layers=1), other

    def forward(self, x, timestep):
        y = self.dit(x, timestep)
        return y if self.other is None else y + self.dit(x[:, : self.other], timestep).sum()


@pytest.mark.parametrize("other", [None, 20])
def test_several_lengths_are_refused_before_the_second_run(other):
    model, ran = Several(other), []

    def run():
        ran.append(None)
        for tokens in (TOKENS, TOKENS if other else 32):
            x, t = tiny_inputs(tokens=tokens)
            model(x, t)

    message = rf"'dit\.blocks\.0\.\w+'.* reads sequences of {'20 and 24' if other else '24 and 32'} tokens.*'-static'"
    with pytest.raises(vq.RecipeError, match=message):
        vq.calibrate(model, run, scheme="w8a8-position")
    assert len(ran) == 1
    assert vq.calibrate(model, run, scheme="w8a8-static", **OFF).sites


def test_ranks_and_joined_inputs_of_other_lengths_are_refused(monkeypatch):
    key = InputKey(("a", "b"), 4)
    parts = [{key: torch.ones(3)}, {key: torch.ones(5)}]
    monkeypatch.setattr("viditq_fx.calibration.ranks.from_every_rank", lambda mine: parts)
    with pytest.raises(vq.RecipeError, match=r"'a' \(planned with b\) reads sequences of 3 and 5 tokens"):
        largest_of_ranks(parts[0])
    monkeypatch.setattr("viditq_fx.calibration.ranks.from_every_rank", lambda mine: [mine, mine])
    assert torch.equal(largest_of_ranks(parts[0])[key], torch.ones(3))


class Joined(nn.Module):
    """Two linears read one input, and one of them a part of it too: they get one plan."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.a(x) + self.b(x) + self.a(x[:, :8]).mean()


def test_linears_of_one_plan_that_read_other_lengths_are_refused():
    model, x = Joined(), torch.randn(4, TOKENS, 64)
    assert len(vq.calibrate(model, [[x]], scheme="w8a8-static", **OFF).sites) == 2
    with pytest.raises(vq.RecipeError, match=r"'a' \(planned with b\) reads sequences of 8 and 24 tokens"):
        vq.calibrate(model, [[x]], scheme="w8a8-position", **OFF)


def test_samples_that_come_once_are_refused_whatever_is_rotated():
    model = tiny_dit(layers=1)
    with pytest.raises(vq.RecipeError, match="a second time, to see each position"):
        vq.calibrate(model, (sample for sample in ()), scheme="w8a8-position", **OFF)


@pytest.mark.parametrize(("multiplied", "rotation"), [(False, 1), (True, 1), (True, 64)])
@pytest.mark.parametrize("kind", ["static", "timestep", "position"])
def test_a_trial_quantizes_all_ranges_at_once_as_each_apart(kind, multiplied, rotation):
    model = tiny_dit(layers=1)
    found = collect(model, calls(model, (900.0, 600.0, 300.0, 10.0)), rows=40)
    edges = found.buckets.edges() if kind == "timestep" else ()
    group, scheme = found.group("blocks.0.down"), QuantScheme.parse(f"w8a6-{kind}")
    multiplier = torch.rand(256, generator=torch.Generator().manual_seed(0)) + 0.5 if multiplied else None
    used = torch.ones(256) if multiplier is None else multiplier
    q, scale = (
        of[1] for of in Trial(group, scheme, edges)._quantized(torch.stack([used * 3, used]), rotation)
    )
    kept = group.reservoir()
    ranges = torch.tensor([range_of(edges, t) for t in kept.timesteps])
    assert len(ranges.unique()) == (4 if edges else 1)
    for index in ranges.unique():
        rows = kept.rows_RK[ranges == index]
        largest = rotate(rows, multiplier, rotation).abs().amax()
        want = quantize_input(rows, scheme, multiplier, rotation, largest.clamp(min=1e-12) / 31)
        assert torch.equal(q[ranges == index], want[0])
        assert torch.equal(scale[ranges == index], want[1])


@pytest.mark.slow
@torch.no_grad()
def test_saved_loaded_and_applied_compiled_and_as_layers(tmp_path):
    model, inputs = tiny_dit(layers=1), tiny_inputs(tokens=TOKENS)
    scheme = "w4a8-asym-position"
    made = vq.calibrate(model, lambda: model(*inputs), scheme=scheme, balance=0.5, rotation="on")
    made.save(tmp_path)
    recipe = Recipe.load(tmp_path)
    assert {str(plan.scheme) for plan in recipe.sites.values()} == {"w4a8-asym-rot-position"}
    for path, plan in made.sites.items():
        assert torch.equal(recipe.sites[path].input_scale, plan.input_scale)
    torch._dynamo.reset()
    want = model(*inputs)
    run = torch.compile(model, backend="viditq", options={"recipe": recipe, "strict": True}, fullgraph=True)
    got = run(*inputs)
    vq.quantize_(model, inputs, recipe=recipe)
    assert relative_error(got, want) < 0.1
    assert relative_error(model(*inputs), got) < 1e-3
    assert dataclasses.asdict(recipe.check(tiny_dit(layers=1))) == {
        "missing": (),
        "extra": (),
        "reshaped": {},
    }
