"""Balance and rotation: the formula, and that the search takes what lowers the error."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import viditq_fx as vq
from tests.calibration.test_calibrate import calls
from tests.small_models import tiny_dit
from viditq_fx.calibration import trial as trial_module
from viditq_fx.calibration.balance import channel_scale, random_signs
from viditq_fx.calibration.options import read_options
from viditq_fx.calibration.run import collect
from viditq_fx.calibration.trial import TRIED_CHANNELS, Trial, spread_rows
from viditq_fx.ops.rotate import rotate, transform_weight
from viditq_fx.ops.weight_forms import Multiplier, linear_in_scheme, quantize_input, quantize_weight
from viditq_fx.scheme import QuantScheme


def test_scale_is_smoothquants():
    x, w = torch.tensor([8.0, 1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 4.0, 0.5])
    s = x.double() ** 0.3 / w.double() ** 0.7
    torch.testing.assert_close(channel_scale(x, w, 0.3), s / s.log().mean().exp())
    even = x / channel_scale(x, w, 1.0)
    torch.testing.assert_close(even, even[:1].expand(4))  # alpha 1 makes the input even, 0 the weight
    even = w * channel_scale(x, w, 0.0)
    torch.testing.assert_close(even, even[:1].expand(4))


def test_dead_channels_have_finite_scales():
    for x in (torch.tensor([0.0, 1.0, 1e30, 1e-30]), torch.zeros(4)):
        for w in (torch.tensor([1.0, 0.0, 1e-30, 1.0]), torch.zeros(4)):
            scale = channel_scale(x, w, 0.5)
            assert bool(torch.isfinite(1 / scale).all())
            assert bool((scale > 0).all())


def test_both_names_of_alpha_say_the_same():
    ours, theirs = (read_options("w4a8", (), None, None, *given) for given in ((0.4, None), (None, 0.6)))
    assert ours.balance == pytest.approx(theirs.balance)
    assert read_options("w4a8", (), 0.4, None, None, None) == ours
    assert read_options("w4a8-rot", (), None, None, None, None).rotation == "on"


class OneLinear(nn.Module):
    """Content, then one linear that is quantized; `spread` scales the input's channels."""

    def __init__(self, spread):
        super().__init__()
        self.register_buffer("spread", spread)
        self.stem, self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 8)

    def forward(self, x, timestep=None):
        h = self.stem(F.scaled_dot_product_attention(x, x, x))
        return self.head(F.gelu(self.body(F.layer_norm(h, (64,)) * self.spread)))


def body_of(spread, **options):
    torch.manual_seed(0)
    model = OneLinear(spread).eval()
    with torch.no_grad():
        model.body.weight /= spread  # the model computes what it did, with outliers in the input
    x = torch.randn(2, 64, 64)
    return vq.calibrate(model, lambda: model(x), scheme=options.pop("scheme", "w8a8"), **options).sites[
        "body"
    ]


def one_outlier():
    spread = torch.ones(64)
    spread[7] = 300.0
    return spread


def test_a_channel_that_dominates_is_balanced_and_the_reason_says_so():
    plan = body_of(one_outlier())
    assert plan.multiplier is not None
    assert float(plan.multiplier[7]) < 0.05 * float(plan.multiplier.abs().median())
    assert plan.reason.startswith("balance at alpha")
    assert "(neither " in plan.reason
    chosen, neither = (
        float(text.split("%")[0].split()[-1]) for text in plan.reason.split("error ")[1].split(" (", 1)
    )
    assert chosen < 0.2 * neither


def test_options_force_either():
    plain = body_of(one_outlier(), balance="off", rotation="off", rows=0)
    assert (plain.multiplier, plain.rotation, plain.reason) == (
        None,
        1,
        "neither balance nor rotation, as asked for",
    )
    turned = body_of(one_outlier(), balance="off", rotation="on", rows=0)
    assert (turned.multiplier, turned.rotation) == (None, 64)
    assert turned.scheme.rotate
    scaled = body_of(one_outlier(), alpha_repo=0.5, rotation="off", rows=0)
    assert scaled.multiplier is not None
    assert scaled.reason == "balance at alpha 0.5, as asked for"
    signed = body_of(one_outlier(), balance="off", rotation="on", random_signs=True, seed=9, rows=0)
    assert torch.equal(signed.multiplier, random_signs(64, 9))
    assert {-1.0, 1.0} == set(signed.multiplier.tolist())


def test_fp8_has_sites_and_no_transform():
    plan = body_of(one_outlier(), scheme="fp8")
    assert (plan.multiplier, plan.rotation) == (None, 1)
    with pytest.raises(vq.RecipeError, match="fp8 is neither balanced nor rotated"):
        body_of(one_outlier(), scheme="fp8", rotation="on")


@pytest.mark.parametrize("rotation", ["off", "on"])
def test_static_scales_are_the_ranges_of_what_is_quantized(rotation):
    model = tiny_dit(layers=1)
    asked = {"balance": 0.5, "rotation": rotation, "random_signs": rotation == "on"}
    recipe = vq.calibrate(model, calls(model, (900.0, 10.0)), scheme="w8a8-timestep", **asked)
    seen = {}
    model.blocks[0].down.register_forward_pre_hook(lambda m, args: seen.setdefault("x", []).append(args[0]))
    with torch.no_grad():
        calls(model, (10.0, 900.0))()
    plan = recipe.sites["blocks.0.down"]
    expected = torch.stack([rotate(x, plan.multiplier, plan.rotation).abs().amax() / 127 for x in seen["x"]])
    torch.testing.assert_close(plan.input_scale, expected, rtol=1e-5, atol=0)
    once = vq.calibrate(model, calls(model, (900.0, 10.0)), scheme="w8a8-static", **asked)
    torch.testing.assert_close(once.sites["blocks.0.down"].input_scale, expected.max(), rtol=1e-5, atol=0)


def test_linears_of_one_input_get_one_plan():
    model = tiny_dit(layers=1)
    recipe = vq.calibrate(model, calls(model), scheme="w8a8-static", balance=0.5, rotation="on")
    q, k, v = (recipe.sites[f"blocks.0.{name}"] for name in "qkv")
    assert q.multiplier is k.multiplier is v.multiplier
    assert q.input_scale is k.input_scale is v.input_scale
    assert q.rotation == k.rotation == v.rotation == 64
    model.float()
    found = collect(model, calls(model))
    group = found.group("blocks.0.q")
    weights = torch.cat([getattr(model.blocks[0], name).weight for name in "qkv"])
    assert torch.equal(group.weight_amax(), weights.abs().amax(0))


@pytest.mark.parametrize("width", [256, 257, 511, 512, 1023])
def test_the_tried_rows_reach_from_the_first_to_the_last(width):
    """Fused q, k and v lie one below the other: rows of one end would leave v out."""
    kept = spread_rows(torch.arange(width)[:, None], TRIED_CHANNELS).flatten()
    assert (len(kept), int(kept[0]), int(kept[-1])) == (TRIED_CHANNELS, 0, width - 1)
    steps = kept.diff()
    assert 1 <= steps.min() <= steps.max() <= steps.min() + 1


def test_the_error_of_a_trial_is_that_of_the_linear():
    model = tiny_dit(layers=1)
    group = collect(model, calls(model)).group("blocks.0.down")
    multiplier = torch.rand(256) + 0.5
    trial = Trial(group, QuantScheme.parse("w8a8"))
    (got,) = trial.errors([(multiplier, 64)])
    with torch.autocast("cpu", torch.bfloat16):  # around the whole calibration, as around sampling
        assert Trial(group, QuantScheme.parse("w8a8")).errors([(multiplier, 64)]) == [got]
    x, w = group.reservoir().rows_RK, model.blocks[0].down.weight
    xq, wq = rotate(x, multiplier, 64), transform_weight(w, multiplier, 64)
    xs, ws = (t.abs().amax(1, keepdim=True) / 127 for t in (xq, wq))
    y = ((xq / xs).round() * xs) @ ((wq / ws).round() * ws).t()
    truth = x @ w.t()
    assert got == pytest.approx(float((y - truth).norm() / truth.norm()), rel=1e-3)
    assert 0 < got < 0.03


@pytest.mark.parametrize("at_once", [1, 3 * 64 * 64 * 2, 1 << 19], ids=["one", "two", "all"])
@pytest.mark.parametrize(
    "name", ["w8a8", "w6a6", "w4a8-asym", "w4a8-g64-bgr", "w4a8-svd16", "w4a8-block-asym", "w4a4-block"]
)
def test_candidates_tried_together_lose_what_each_loses_alone(name, at_once, monkeypatch):
    model, scheme = tiny_dit(layers=1), QuantScheme.parse(name)
    group = collect(model, calls(model)).group("blocks.0.q")
    gen = torch.Generator().manual_seed(0)
    multipliers = [None, *(torch.rand(64, generator=gen) * 3 + 0.1 for _ in range(4))]
    candidates = [(multiplier, rotation) for rotation in (1, 64) for multiplier in multipliers]
    monkeypatch.setattr(trial_module, "TRIED_AT_ONCE", at_once)
    got = Trial(group, scheme).errors(candidates)
    rows, weights = group.reservoir().rows_RK.float(), [linear.matrix for linear in group.linears]
    assert len(weights) == 3
    for (multiplier, rotation), error in zip(candidates, got, strict=True):
        key = None if multiplier is None else Multiplier.of(multiplier)
        form = replace(scheme.weight_form, rotation=rotation, multiplier=key)
        q, scale = quantize_input(rows, scheme, multiplier, rotation)
        total = 0.0
        for w in weights:
            y = linear_in_scheme(scheme, rows, q, scale, quantize_weight(w, form), None, torch.float32)
            total += float((y - rows @ w.t()).square().sum() / (rows @ w.t()).square().sum())
        assert error == pytest.approx((total / 3) ** 0.5, rel=1e-4)
