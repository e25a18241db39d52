"""quantize_: int8 modules that run eagerly and compiled, move, copy, save and load."""

import copy
import gc
import io
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import viditq_fx as vq
from tests.small_models import (
    KEPT_OUTSIDE_LAYERS,
    QUANTIZED_PER_LAYER,
    relative_error,
    tiny_dit,
    tiny_inputs,
)
from viditq_fx.errors import OptionError, SchemeError, StrictError, ViditqError, WeightError
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.recipe import Recipe, SitePlan
from viditq_fx.scheme import QuantScheme

ERROR = 0.02
W8A8 = QuantScheme.parse("w8a8")


def quantized(layers=1, **options):
    model, inputs = tiny_dit(layers), tiny_inputs()
    want = model(*inputs)
    report = vq.quantize_(model, inputs, **options)
    return model, inputs, want, report


def int8_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


@pytest.mark.parametrize("layers", [1, 2])
def test_replaces_what_the_policy_quantizes(layers):
    model, inputs, want, report = quantized(layers)
    assert len(int8_layers(model)) == layers * QUANTIZED_PER_LAYER
    assert len(report.sites) == layers * (QUANTIZED_PER_LAYER + 1) + KEPT_OUTSIDE_LAYERS
    assert {s.fqn for s in report.sites if s.done} == set(int8_layers(model))
    assert relative_error(model(*inputs), want) < ERROR


@pytest.mark.slow
def test_eager_and_compiled_agree():
    model, inputs, _want, _ = quantized()
    with torch.no_grad():
        eager = model(*inputs)
        compiled = torch.compile(model, backend="viditq", fullgraph=True)(*inputs)
        after = model(*inputs)
    assert relative_error(compiled, eager) < 2e-3  # the same integers; fp32 sums in another order
    assert torch.equal(eager, after), "oneDNN's layout of the weights holds the same integers"


def test_plain_inductor_runs_it_too():
    layer = QuantLinear.from_linear(nn.Linear(64, 64).requires_grad_(False), W8A8)
    x = torch.randn(40, 64)
    assert relative_error(torch.compile(layer)(x), layer(x)) < 2e-3


@pytest.mark.slow
def test_full_precision_memory_is_gone():
    model, inputs, _, _ = quantized()
    with torch.no_grad():
        report = vq.explain(torch.compile(model, backend="viditq"), *inputs)
    totals = report.totals()
    assert totals["quantized_weight_bytes_full_resident"] == 0
    packed, before = totals["quantized_weight_bytes_packed"], totals["quantized_weight_bytes_before"]
    assert packed <= 1.1 * before / 4, (
        "integers, scales, and oneDNN's sums of each channel: much at 64 channels"
    )
    assert report.model_bytes < report.model_bytes_before


def test_bytes_against_bf16():
    layer = QuantLinear.from_linear(nn.Linear(1024, 1024).requires_grad_(False).bfloat16(), W8A8)
    assert layer.resident_bytes() <= 0.51 * 2 * 1024 * 1024
    torch.compile(layer, backend="viditq")(torch.randn(40, 1024).bfloat16())
    assert layer.resident_bytes() <= 0.51 * 2 * 1024 * 1024, "also in oneDNN's layout"


def test_keep_scheme_and_strict():
    model, _, _, report = quantized(keep="blocks.*.down", scheme="w8a7")
    assert "blocks.0.down" not in int8_layers(model)
    assert {str(m.scheme) for m in model.modules() if isinstance(m, QuantLinear)} == {"w8a7"}
    assert "kept by pattern" in (report.site("blocks.0.down").reason or "")


@pytest.mark.parametrize(
    ("kwargs", "kind"),
    [
        ({"scheme": "w1a1"}, SchemeError),
        ({"keep": 5}, OptionError),
        ({"args": ()}, ViditqError),
        ({"args": torch.ones(2, 3)}, ViditqError),
        ({"kwargs": (1,)}, ViditqError),
    ],
)
def test_wrong_arguments_change_nothing(kwargs, kind):
    model = tiny_dit(1)
    with pytest.raises(kind):
        vq.quantize_(model, **{"args": tiny_inputs(), **kwargs})
    assert not int8_layers(model)


def test_the_report_prints_as_one_line_a_site():
    report = quantized(keep="blocks.0.down")[3]
    report.rejects.append("lost: no graph showed it")
    first, *lines, last = str(report).splitlines()
    assert (
        first
        == f"{sum(s.done == 'w8a8' for s in report.sites)} of {len(report.sites)} linears in w8a8 on cpu"
    )
    assert len(lines) == len(report.sites)
    assert "blocks.0.down (ffn.down): kept by pattern 'blocks.0.down'" in lines
    assert "blocks.0.up (ffn.up): w8a8" in lines
    assert last == "refused: lost: no graph showed it"


def test_not_a_module():
    with pytest.raises(ViditqError, match=r"expected a torch\.nn\.Module"):
        vq.quantize_("model", tiny_inputs())


def test_nan_in_the_last_weight_leaves_the_model_as_it_was():
    model = tiny_dit(1)
    model.blocks[0].down.weight[0, 0] = float("nan")
    with pytest.raises(WeightError, match=r"blocks\.0\.down"):
        vq.quantize_(model, tiny_inputs())
    assert not int8_layers(model)


def test_a_subclass_with_its_own_forward_is_refused_and_strict_raises():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(Scaled(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    x = torch.randn(40, 64)
    with pytest.raises(StrictError, match="forward of its own"):
        vq.quantize_(model, (x,), strict=True)
    report = vq.quantize_(model, (x,))
    assert int8_layers(model) == ["1"]
    assert "forward of its own" in (report.site("0").reason or "")


def test_tied_weights_share_one_pair():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).requires_grad_(False)
    model[2].weight = model[0].weight
    vq.quantize_(model, (torch.randn(40, 64),))
    assert model[0]._weight_q is model[2]._weight_q


def test_tied_weights_with_plans_of_their_own_are_packed_for_each():
    """Calibration balances each layer by its own input: a weight that was divided for another is a wrong one."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    model.requires_grad_(False)[2].weight = model[4].weight = model[0].weight
    gen = torch.Generator().manual_seed(0)
    multipliers = [torch.rand(64, generator=gen) + 0.5 for _ in range(2)]
    sites = {
        "0": SitePlan(scheme=W8A8, multiplier=multipliers[0]),
        "2": SitePlan(scheme=W8A8, multiplier=multipliers[1], rotation=16),
        "4": SitePlan(scheme=W8A8, multiplier=multipliers[0].clone()),
    }
    x = torch.randn(40, 64, generator=gen)
    want = model(x)
    vq.quantize_(model, (x,), recipe=Recipe(scheme=W8A8, sites=sites))
    assert relative_error(model(x), want) < 0.04
    assert model[0]._weight_q is model[4]._weight_q


def test_copy_pickle_and_move():
    model, inputs, _, _ = quantized()
    with torch.no_grad():
        want = model(*inputs)
        torch.compile(model, backend="viditq")(*inputs)  # the weights now sit in oneDNN's layout
        assert torch.equal(copy.deepcopy(model)(*inputs), want)
        assert torch.equal(model(*inputs), want)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(*inputs), want)
        model.half()
        assert model.blocks[0].q.weight_scale.dtype == torch.float32
        assert model.blocks[0].q.bias.dtype == torch.float16
        model.float()
        assert relative_error(model(*inputs), want) < 5e-3  # all but the integers went through fp16


def test_state_dict_round_trip_is_bit_exact(tmp_path):
    from safetensors.torch import load_file, save_file

    model, inputs, _, _ = quantized()
    with torch.no_grad():
        want = model(*inputs)
        torch.compile(model, backend="viditq")(*inputs)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = tiny_dit(1, seed=9)
    vq.quantize_(other, inputs)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(other(*inputs), want)
        assert relative_error(torch.compile(other, backend="viditq")(*inputs), want) < 2e-3


def test_full_precision_checkpoint_is_quantized_on_the_way_in():
    model, inputs, _want, _ = quantized()
    other = tiny_dit(1, seed=9)
    vq.quantize_(other, inputs)
    other.load_state_dict(tiny_dit(1).state_dict())
    with torch.no_grad():
        assert torch.equal(other(*inputs), model(*inputs))


def test_wrong_checkpoint_is_an_error():
    layer = QuantLinear.from_linear(nn.Linear(8, 8), W8A8)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="weight_q"):
        layer.load_state_dict({**state, "weight_q": state["weight_q"][:4]})
    with pytest.raises(RuntimeError, match="Missing"):
        layer.load_state_dict({})


def test_gradients_are_refused_clearly():
    model, inputs, _, _ = quantized()
    x = inputs[0].clone().requires_grad_(True)
    with pytest.raises(RuntimeError, match="is for inference and has no derivative"):
        model(x, inputs[1]).sum().backward()


def test_weight_reads_and_does_not_write():
    linear = nn.Linear(40, 24).requires_grad_(False).bfloat16()
    layer = QuantLinear.from_linear(linear, W8A8)
    assert layer.weight.dtype == torch.bfloat16
    assert relative_error(layer.weight, linear.weight) < 0.01
    with pytest.raises(ViditqError, match="read-only"):
        layer.weight = linear.weight


def test_hooks_are_kept():
    linear, seen = nn.Linear(64, 64).requires_grad_(False), []
    linear.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    QuantLinear.from_linear(linear, W8A8)(torch.randn(3, 64))
    assert seen == [(3, 64)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 17), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.integers(0, 2**31))
def test_any_shape(rows, depth, width, bias, seed):
    torch.manual_seed(seed)
    linear, x = nn.Linear(depth, width, bias=bias).requires_grad_(False), torch.randn(rows, depth)
    got = QuantLinear.from_linear(linear, W8A8)(x)
    bound = x.abs().amax(1, keepdim=True) * linear.weight.abs().amax(1) * depth / 100
    assert ((got - linear(x)).abs() <= bound + 1e-5).all()


def test_many_models_of_one_class():
    """More than Dynamo's recompile limit of eight: each is traced and quantized."""
    for seed in range(10):
        model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).requires_grad_(False)
        vq.quantize_(model, (torch.randn(40, 64),))
        assert int8_layers(model) == ["0", "2"], seed


def test_nothing_traced_is_an_error():
    model = tiny_dit(1)
    with torch._dynamo.config.patch(disable=True), pytest.raises(ViditqError, match="captured no graph"):
        vq.quantize_(model, tiny_inputs())


def test_unseen_linears_are_named_and_strict_raises():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.unused, self.hidden = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

        @torch.compiler.disable
        def outside(self, x):
            return self.hidden(x)

        def forward(self, x):
            return self.outside(self.seen(x))

    model, x = Partly().requires_grad_(False), torch.randn(40, 64)
    with pytest.raises(
        StrictError, match=r"2 sites were refused:\n  unused: no graph .*\n  hidden: no graph"
    ):
        vq.quantize_(model, (x,), strict=True)
    assert not int8_layers(model)
    report = vq.quantize_(model, (x,), strict=True, keep=["unused", "hid*"])
    assert not report.rejects
    model = Partly().requires_grad_(False)
    report = vq.quantize_(model, (x,))
    assert [line.partition(":")[0] for line in report.rejects] == ["unused", "hidden"]
    assert int8_layers(model) == ["seen"]


@pytest.mark.parametrize("breaks", [False, True])
def test_full_precision_weights_are_not_kept_alive(breaks):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            x = self.a(x)
            if breaks:
                torch._dynamo.graph_break()
            return self.b(x)

    model = Two().requires_grad_(False)
    weights = [weakref.ref(model.a.weight), weakref.ref(model.b.weight)]
    vq.quantize_(model, (torch.randn(40, 64),))
    gc.collect()
    assert int8_layers(model) == ["a", "b"]
    assert [weight() for weight in weights] == [None, None]
