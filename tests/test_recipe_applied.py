"""A recipe is applied to the model that it was made for, in both graphs of a switched pair, or it is told why not."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import viditq_fx as vq
from tests.small_models import QUANTIZED_PER_LAYER, relative_error, tiny_dit, tiny_inputs
from viditq_fx.errors import RecipeError, StrictError
from viditq_fx.runtime import executions

LAYERS = {"q": 64, "k": 64, "v": 64, "out": 64, "up": 64, "down": 256}


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="viditq", options=options, fullgraph=True)


def recipe(scheme="w4a8-asym", blocks=1):
    parsed = vq.QuantScheme.parse(scheme)
    sites = {
        f"blocks.{i}.{name}": vq.SitePlan(scheme=parsed, multiplier=torch.linspace(0.5, 1.5, depth))
        for i in range(blocks)
        for name, depth in LAYERS.items()
    }
    linears = [(path, m) for path, m in tiny_dit(blocks).named_modules() if isinstance(m, nn.Linear)]
    shapes = {path: tuple(m.weight.shape) for path, m in linears}
    return vq.Recipe(scheme=parsed, sites=sites, shapes=shapes)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, timestep):
        return self.inner(x, timestep)


@pytest.mark.slow
def test_low_steps_of_a_pair_run_the_recipe_at_low_bits():
    model, inputs = tiny_dit(1), tiny_inputs()
    high = recipe("w4a8-asym")
    low = high.with_inputs_of(vq.QuantScheme.parse("w4a4-asym"))
    assert {str(plan.scheme) for plan in low.sites.values()} == {"w4a4-asym"}
    with torch.no_grad(), executions() as ran:
        want = compiled(model, recipe=low)(*inputs)
        run = compiled(model, recipe=high, low_scheme="w4a4-asym", bits_schedule=["low", "high"])
        got, after = run(*inputs), run(inputs[0], inputs[1] - 1)
        records = vq.step_records(run)
        full = compiled(model, recipe=high)(inputs[0], inputs[1] - 1)
    assert [record.bits for record in records] == ["low", "high"]
    assert torch.equal(got, want)
    assert torch.equal(after, full)
    done = [{site.done for site in call.report.sites if site.done} for call in ran]
    assert done[:3] == [{"w4a4-asym"}, {"w4a4-asym"}, {"w4a8-asym"}]
    assert relative_error(want, full) > 0.01


def test_calibrated_scales_cannot_switch_and_a_pair_cannot_be_calibrated():
    plan = vq.SitePlan(scheme=vq.QuantScheme.parse("w4a8-asym-static"), input_scale=torch.tensor(0.1))
    static = replace(recipe(), sites={"blocks.0.up": plan})
    with pytest.raises(RecipeError, match=r"blocks\.0\.up: its input scale comes from calibration"):
        static.with_inputs_of(vq.QuantScheme.parse("w4a4-asym"))
    with pytest.raises(RecipeError, match=r"scheme='dvd-w4a8'\), then compile with options="):
        vq.calibrate(tiny_dit(1), [(tiny_inputs(), {})], scheme="dvd-w4a6")


@pytest.mark.parametrize("strict", [False, True])
def test_a_recipe_of_a_part_or_of_a_wrapper_is_refused(strict):
    model, inputs = tiny_dit(1), tiny_inputs()
    with torch.no_grad():
        with pytest.raises(
            BackendCompilerFailed, match=r"RecipeError.* called 'inner\.blocks\.0.*recipe's 'blocks\.0"
        ):
            compiled(Wrapper(model), recipe=recipe(), strict=strict)(*inputs)
        with pytest.raises(RecipeError, match="names none of the linears"):
            vq.quantize_(Wrapper(model), args=inputs, recipe=recipe(), strict=strict)
        block, x = copy.deepcopy(model.blocks[0]), torch.randn(2, 40, 64)
        with pytest.raises(BackendCompilerFailed, match=r"RecipeError.*no block of it"):
            compiled(block, recipe=recipe(), strict=strict)(x, torch.randn(2, 64))
    assert all(type(m) is not vq.QuantLinear for m in model.modules())


def test_linears_that_calibration_never_saw_are_told_and_an_error_under_strict():
    deeper, inputs = tiny_dit(2), tiny_inputs()
    with torch.no_grad(), executions() as ran:
        compiled(deeper, recipe=recipe())(*inputs)
        with pytest.raises(
            BackendCompilerFailed, match=r"6 linears are not in the recipe(.|\n)*blocks\.1\.q"
        ):
            compiled(deeper, recipe=recipe(), strict=True)(*inputs)
        with pytest.raises(StrictError, match=r"blocks\.1\.q: the recipe does not know this linear"):
            vq.quantize_(deeper, args=inputs, recipe=recipe(), strict=True)
        told = vq.quantize_(deeper, args=inputs, recipe=recipe()).rejects
        assert compiled(deeper)(*inputs).isfinite().all(), "and what is quantized already needs no recipe"
    lines = [line for line in ran[0].report.rejects if "does not know" in line]
    assert len(lines) == QUANTIZED_PER_LAYER
    assert {line for line in told if "does not know" in line} == set(lines)
    assert "blocks.1.up: the recipe does not know this linear: it runs in w4a8-asym" in " ".join(lines)
