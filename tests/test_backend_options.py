"""Options of backend="viditq", and what it cannot do: clear errors and reports, no surprises."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from tests.small_models import compiled, run_counting, tiny_dit, tiny_inputs
from viditq_fx.errors import OptionError, SchemeError, StrictError, WeightError
from viditq_fx.runtime import executions


def test_gradients_get_plain_inductor_and_a_reject():
    layer, x = nn.Linear(64, 64), torch.randn(40, 64)
    call = compiled(layer)
    with pytest.warns(UserWarning, match="wants gradients"), executions() as ran:
        y = call(x)
    assert "wants gradients" in ran[0].report.rejects[0]
    y.square().sum().backward()
    got = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(x).square().sum().backward()
    torch.testing.assert_close(got, layer.weight.grad)
    with torch.no_grad():
        assert run_counting(call, x)[1] == [1], "without gradients the same model is quantized"


def test_strict_refuses_gradients():
    with pytest.raises(BackendCompilerFailed, match="wants gradients") as caught:
        compiled(nn.Linear(64, 64), options={"strict": True})(torch.randn(40, 64))
    assert isinstance(caught.value.inner_exception, StrictError)


def test_strict_refuses_a_refusal_and_names_the_site():
    model = nn.ModuleDict({"conv": nn.Conv2d(64, 64, 1, stride=2)}).requires_grad_(False)
    with pytest.raises(BackendCompilerFailed, match="conv: pointwise convolution of stride") as caught:
        compiled(lambda x: model["conv"](x), options={"strict": True})(torch.randn(2, 64, 16, 16))
    assert isinstance(caught.value.inner_exception, StrictError)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"shceme": "w8a8"}, OptionError, "did you mean 'scheme'"),
        ({"scheme": "w3a3"}, SchemeError, "weights have .* bits"),
        ({"scheme": 8}, SchemeError, "a scheme is a name"),
        ({"max_autotune": "yes"}, OptionError, "should be bool"),
        ({"mode": "fastest"}, OptionError, "fastest"),
        ({"quantize_kernels": "fastest"}, OptionError, "auto.*inductor.*triton"),
    ],
)
def test_wrong_options_are_clear(options, kind, message):
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=message) as caught:
        compiled(nn.Linear(64, 64), options=options)(torch.randn(40, 64))
    assert isinstance(caught.value.inner_exception, kind)


def test_inductor_options_and_mode_reach_inductor():
    seen = {}

    def remember(graph):
        seen.update(
            fusion=torch._inductor.config.epilogue_fusion, autotune=torch._inductor.config.max_autotune
        )

    options = {
        "epilogue_fusion": False,
        "mode": "max-autotune-no-cudagraphs",
        "post_grad_custom_pre_pass": remember,
    }
    with torch.no_grad():
        compiled(nn.Linear(64, 64), options=options)(torch.randn(40, 64))
    assert seen == {"fusion": False, "autotune": True}


def test_a_global_pass_of_the_user_still_runs():
    seen = []
    with torch._inductor.config.patch(post_grad_custom_pre_pass=lambda graph: seen.append(len(graph.nodes))):
        with torch.no_grad():
            compiled(nn.Linear(64, 64))(torch.randn(40, 64))
    assert len(seen) == 1


def test_a_pattern_that_names_nothing_is_told():
    told = r"keep='blocks\.7\.\*' names none of the \d+ linears.*roles here are .*attn\.out"
    with torch.no_grad(), pytest.warns(UserWarning, match=told):
        compiled(tiny_dit(1), options={"keep": ["blocks.7.*", "blocks.0.q"]})(*tiny_inputs())


@pytest.mark.slow
def test_patterns_reach_into_a_block_compiled_alone():
    model, inputs = tiny_dit(1), tiny_inputs()
    model.blocks[0].compile(backend="viditq", options={"keep": ["*.q", "ffn.*"]})
    with torch.no_grad(), executions() as ran:
        model(*inputs)
    kept = {site.fqn for site in ran[0].report.sites if "kept by pattern" in (site.reason or "")}
    assert kept == {"q", "up", "down"}


def test_meta_weight_is_refused_not_crashed():
    model = nn.Linear(64, 64, device="meta").requires_grad_(False)
    x, call = torch.randn(40, 64), compiled(model)
    with torch.no_grad(), pytest.raises(Exception) as plain:  # noqa: PT011 - torch's own refusal, whatever it is
        torch.compile(model, backend="inductor")(x)
    with torch.no_grad(), pytest.raises(type(plain.value), match="meta"):
        call(x)


def test_weight_with_nan_is_a_clear_error():
    layer = nn.Linear(64, 64).requires_grad_(False)
    layer.weight[3, 4] = float("nan")
    with pytest.raises(WeightError, match="weight: the weight holds NaN"):
        compiled(layer)(torch.randn(40, 64))


@pytest.mark.slow
def test_linears_that_run_eagerly_are_listed():
    import viditq_fx as vq

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.forward = torch.compiler.disable(self.b.forward)

        def forward(self, x):
            return self.b(self.a(x))

    report = vq.explain(compiled(Half().requires_grad_(False)), torch.randn(40, 64))
    assert [site.fqn for site in report.sites] == ["a"]
    assert report.unseen == ["b"]
    assert "1 linears are in no compiled graph" in str(report)
    with pytest.raises(OptionError, match="did you mean 'scheme'"):
        vq.explain(Half(), torch.randn(40, 64), options={"shceme": "w8a8"})
