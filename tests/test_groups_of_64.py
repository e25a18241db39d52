"""Weight groups of 64 channels end to end: compiled and as layers, saved and loaded, in a recipe, told from 128."""

import pytest
import torch
from torch import nn

import viditq_fx as vq
from tests.small_models import capture, context, relative_error
from viditq_fx import ops
from viditq_fx.errors import VerifyError
from viditq_fx.passes.annotate_sites import scheme_of_linear
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.passes.verify import verify
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.runtime import executions
from viditq_fx.scheme import QuantScheme

ERROR = 0.11
LINEARS = ops.LINEAR_W4A8.overload, ops.LINEAR_W4A4.overload


def model():
    """No attention, so both linears are planned: K of 333 ends in a short group, K of 40 is less than one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(333, 40), nn.GELU(), nn.Linear(40, 200)).requires_grad_(False)


def inputs():
    return torch.randn(2, 20, 333, generator=torch.Generator().manual_seed(1))


def compiled(module, **options):
    torch._dynamo.reset()
    return torch.compile(module, backend="viditq", options=options, fullgraph=True)


@pytest.fixture
def uncompiled(monkeypatch):
    """Passes, kernels and reports as they are; the graph that they leave runs as it stands."""
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4a8-g64", "w4a8-g64-asym", "w4a4-g64-bgr-block"])
def test_compiled_is_what_layers_compute(scheme):
    module, x = model(), inputs()
    with torch.no_grad(), executions() as ran:
        want, got = module(x), compiled(module, scheme=scheme)(x)
        report = vq.quantize_(module, args=(x,), scheme=scheme)
        others = [module(x), *([compiled(module)(x)] if scheme == "w4a8-g64-asym" else [])]
    assert [site.done for site in ran[0].report.sites] == [scheme] * 2 == [s.done for s in report.sites]
    assert 0.005 < relative_error(got, want) < (2 * ERROR if "w4a4" in scheme else ERROR)
    for other in others:
        assert relative_error(other, got) < 1e-5
    assert module[0].weight_scale.shape == (6, 40)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [("w4a8-g64", "w4a8-g64"), ("w4a4-g64-bgr-block", "w4a4-g64-asym-block"), ("w4a8-g128", "w4a8-g128")],
)
def test_a_graph_without_marks_tells_groups_by_their_scales(scheme, name):
    gm, ctx = capture(model(), inputs()), context(scheme)
    PassPipeline(passes=default_passes()).run(gm, ctx)
    wide, narrow = (node for node in gm.graph.nodes if node.target in LINEARS)
    assert scheme_of_linear(wide) == name
    assert scheme_of_linear(narrow) == name.replace("g64", "g128"), "40 channels are one group either way"


def test_scales_of_no_group_are_no_linear_of_ours():
    gm, ctx = capture(model(), inputs()), context("w4a8-g64")
    PassPipeline(passes=default_passes()).run(gm, ctx)
    node = next(node for node in gm.graph.nodes if node.target in LINEARS)
    node.args[3].meta["example_value"] = torch.empty(5, 40)
    with pytest.raises(VerifyError, match=r"\(5, 40\) match neither token nor channel"):
        verify(gm, ctx, after="test")
    q, x = torch.zeros(40, 192, dtype=torch.uint8), torch.zeros(3, 333, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"or \(3, 40\) or \(6, 40\); got .*\(5, 40\)"):
        ops.LINEAR_W4A8.reference(x, torch.ones(3, 1), q, torch.ones(5, 40), None, torch.float32)
    with pytest.raises(ValueError, match=r"groups of w; got .*zero points \(5, 40\)"):
        ops.ADD_ZERO_POINT.reference(
            torch.ones(3, 40), x, torch.ones(3, 1), torch.ones(5, 40), torch.ones(5, 40), torch.float32
        )


def layer(name, seed=0, depth=333):
    torch.manual_seed(seed)
    return QuantLinear.from_linear(nn.Linear(depth, 40).requires_grad_(False), QuantScheme.parse(name))


def test_a_saved_state_is_loaded_by_groups_of_its_size_alone():
    saved, other, x = layer("w4a8-g64-asym"), layer("w4a8-g64-asym", seed=1), inputs()
    assert not torch.equal(saved(x), other(x))
    other.load_state_dict(saved.state_dict())
    assert torch.equal(saved(x), other(x))
    with pytest.raises(RuntimeError, match=r"weight_scale: torch.float32 of shape \(3, 40\) expected"):
        layer("w4a8-g128-asym").load_state_dict(saved.state_dict())
    with pytest.raises(RuntimeError, match="saved weight is of w4a8-g64-asym, this layer of w4a8-g128-asym"):
        layer("w4a8-g128-asym", depth=64).load_state_dict(layer("w4a8-g64-asym", depth=64).state_dict())


def test_calibration_plans_them_and_a_recipe_mixes_them(uncompiled, tmp_path):
    module, x = model(), inputs()
    recipe = vq.calibrate(module, [((x,), {})], scheme="w4a8-g64-asym")
    assert {str(plan.scheme) for plan in recipe.sites.values()} == {"w4a8-g64-asym"}
    recipe.sites["2"] = vq.SitePlan(scheme=QuantScheme.parse("w4a8-g128"))
    recipe.save(tmp_path / "mixed")
    with torch.no_grad(), executions() as ran:
        want, got = module(x), compiled(module, recipe=str(tmp_path / "mixed"))(x)
        vq.quantize_(module, args=(x,), recipe=recipe)
    assert [site.done for site in ran[0].report.sites] == ["w4a8-g64-asym", "w4a8-g128"]
    assert relative_error(got, want) < ERROR
    assert relative_error(module(x), got) < 1e-3
