"""The stress rewrite: the same function in full precision, and activations that per-token int8 suffers from."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import LatteTransformer3DModel
from torch import nn

import viditq_fx as vq
from benchmarks.stress import StressConfig, stress_
from viditq_fx.demo.model import load_digits_dit
from viditq_fx.demo.video import initial_video_noise, load_video_dit
from viditq_fx.quality import sqnr_db
from viditq_fx.testing import relative_error


def digits_case():
    noise = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    return load_digits_dit(), noise, {"class_labels": torch.tensor([3, 7, 10])}


def video_case():
    model = load_video_dit()
    captions = model.captions(torch.tensor([3, 7, 10]))
    return model.transformer, initial_video_noise(3, seed=0), {"encoder_hidden_states": captions}


def run(model, noise, condition, timestep):
    with torch.no_grad():
        return model(noise, timestep=torch.full((len(noise),), timestep), **condition).sample


def inputs_of(model, name, call):
    """Return what one linear reads in a call: [rows, channels]."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    call(model)
    hook.remove()
    return seen[0].flatten(0, -2)


@pytest.fixture(scope="module", params=[digits_case, video_case], ids=["digits", "video"])
def case(request):
    """The trained model, the same stressed, their inputs, and the factors."""
    model, noise, condition = request.param()
    stressed = copy.deepcopy(model)
    return model, stressed, stress_(stressed), noise, condition


@pytest.mark.parametrize("timestep", [40.0, 500.0, 960.0])
def test_the_function_stays(case, timestep):
    model, stressed, _, noise, condition = case
    want, got = run(model, noise, condition, timestep), run(stressed, noise, condition, timestep)
    assert relative_error(got, want) < 1e-4
    assert not torch.equal(got, want)


@pytest.mark.parametrize("linear", ["attn1.to_q", "attn1.to_v", "ff.net.0.proj", "attn1.to_out.0"])
def test_a_few_channels_tower_over_the_others(case, linear):
    model, stressed, _, noise, condition = case
    name = f"transformer_blocks.1.{linear}"

    def tower(m):
        largest_K = inputs_of(m, name, lambda m: run(m, noise, condition, 500.0)).abs().amax(dim=0)
        return (largest_K.max() / largest_K.median()).item()

    assert tower(stressed) > 10.0
    assert tower(stressed) > 2.0 * tower(model)


def test_the_range_changes_over_the_timesteps(case):
    _, stressed, factors, noise, condition = case
    # The path of the factors is the block's own in adaLN-zero, and one for all blocks in adaLN-single.
    c_K = next(c for path, c in factors.items() if path.endswith("ff"))
    outliers = c_K.topk(StressConfig.outliers).indices
    name = "transformer_blocks.0.ff.net.0.proj"
    ranges = [
        inputs_of(stressed, name, lambda m, t=t: run(m, noise, condition, t))[:, outliers].abs().amax(dim=0)
        for t in (20.0, 350.0, 650.0, 980.0)
    ]
    changes = torch.stack(ranges).amax(dim=0) / torch.stack(ranges).amin(dim=0)
    assert changes.max() > 1.5


@pytest.mark.slow
def test_int8_suffers(case):
    model, stressed, _, noise, condition = case
    want = run(model, noise, condition, 300.0)
    error = {}
    for name, each in (("plain", model), ("stressed", stressed)):
        each = copy.deepcopy(each)
        kwargs = {"timestep": torch.full((3,), 300.0), **condition}
        vq.quantize_(each, args=(noise,), kwargs=kwargs)
        error[name] = sqnr_db(want, run(each, noise, condition, 300.0))
    assert error["plain"] > 35.0
    assert error["stressed"] < error["plain"] - 10.0


def test_nothing_is_asked_for_and_little_changes():
    model = load_digits_dit()
    before = model.transformer_blocks[0].attn1.to_q.weight.clone()
    factors = stress_(model, StressConfig(outliers=0, spread=0.0, offset=0.0, residual_offset=0.0))
    assert all(torch.equal(c, torch.ones_like(c)) for c in factors.values())
    torch.testing.assert_close(model.transformer_blocks[0].attn1.to_q.weight, before)


def test_the_seed_decides():
    first, second, third = ({**stress_(load_digits_dit(), StressConfig(seed=s))} for s in (1, 1, 2))
    assert all(torch.equal(first[path], second[path]) for path in first)
    assert not any(torch.equal(first[path], third[path]) for path in first)


def test_what_it_does_not_know_is_refused():
    with pytest.raises(ValueError, match="DiTTransformer2DModel"):
        stress_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="float32"):
        stress_(load_digits_dit(torch.bfloat16))
    with pytest.raises(ValueError, match="smallest"):
        StressConfig(smallest=5.0, largest=2.0)
    config = dict(load_video_dit().transformer.config) | {"attention_bias": False, "num_layers": 1}
    with pytest.raises(ValueError, match="attention_bias=True"):
        stress_(LatteTransformer3DModel(**{k: v for k, v in config.items() if not k.startswith("_")}))
