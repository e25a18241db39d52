"""4-bit weights end to end: compiled and as modules, their memory, saving, loading, moving."""

import copy

import pytest
import torch
from torch import nn

import viditq_fx as vq
from tests.small_models import (
    GEMMS_PER_LAYER,
    QUANTIZED_PER_LAYER,
    capture,
    context,
    count,
    relative_error,
    tiny_dit,
    tiny_inputs,
)
from viditq_fx.errors import SchemeError
from viditq_fx.lowering import select_cpu
from viditq_fx.ops.int4 import int4_unavailable
from viditq_fx.ops.packed_weights import packed_bytes
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.runtime import executions
from viditq_fx.scheme import QuantScheme, available_schemes

SCHEMES = ("w4a8", "w4a8-g128")
ERROR = 0.05
needs_kernel = pytest.mark.skipif(int4_unavailable() is not None, reason=str(int4_unavailable()))


def compiled(model, scheme, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="viditq", options={"scheme": scheme, **options})


def test_names():
    assert set(SCHEMES) < set(available_schemes())
    for name in available_schemes():
        assert str(QuantScheme.parse(name)) == name
    for wrong in ("w4a8-g32", "w8a8-g128", "w8a8-g64", "w4a8-g64-g128", "w4a8-"):
        with pytest.raises(SchemeError, match="w4a8-g128"):
            QuantScheme.parse(wrong)


@pytest.mark.parametrize("scheme", [SCHEMES[0], pytest.param(SCHEMES[1], marks=pytest.mark.slow)])
def test_compiled_is_what_modules_compute(scheme):
    model, inputs = tiny_dit(1), tiny_inputs()
    with torch.no_grad():
        want = model(*inputs)
        with executions() as ran:
            got = compiled(model, scheme)(*inputs)
        report = vq.quantize_(model, args=inputs, scheme=scheme)
        eager, again = model(*inputs), compiled(model, scheme)(*inputs)
    sites = [site for site in ran[0].report.sites if site.done]
    assert {site.done for site in sites} == {scheme} == {s.done for s in report.sites if s.done}
    assert len(sites) == QUANTIZED_PER_LAYER
    assert 0.005 < relative_error(got, want) < ERROR
    for other in (eager, again):
        assert relative_error(other, got) < 1e-5


@needs_kernel
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_with_a_kernel_and_without_the_numbers_are_the_same(monkeypatch, scheme, dtype):
    from viditq_fx.ops import int4

    model, inputs = tiny_dit(1).to(dtype), tuple(t.to(dtype) for t in tiny_inputs())
    kernels = []
    with torch.no_grad():
        for missing in (None, "no compiler"):
            for module in (select_cpu, int4):
                monkeypatch.setattr(module, "int4_unavailable", lambda missing=missing: missing)
            with executions() as ran:
                kernels.append(compiled(model, scheme)(*inputs))
            (site, *_) = [s for s in ran[0].report.sites if s.done]
            assert (site.kernel == "fp32-exact-s8s4", site.reason) == (missing is not None, missing)
    assert relative_error(*kernels) < (1e-5 if dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_graph_has_packed_inputs_and_joined_projections(scheme):
    gm, ctx = capture(tiny_dit(1), *tiny_inputs()), context(scheme)
    PassPipeline(passes=default_passes()).run(gm, ctx)
    assert count(gm, "linear_w4a8") == GEMMS_PER_LAYER
    for gone in ("pack_int4", "quantize_per_channel", "quantize_per_group", "dequantize_per_group"):
        assert count(gm, gone) == 0
    assert len(ctx.weight_slots) == GEMMS_PER_LAYER
    assert {slot.form for slot in ctx.weight_slots} == {QuantScheme.parse(scheme).weight_form}


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "share"), [("w4a8", 0.27), ("w4a8-g128", 0.28), ("w4a8-g64", 0.29)])
def test_bytes_against_bf16(scheme, share):
    linear = nn.Linear(1152, 1024, bias=False).requires_grad_(False).bfloat16()
    x, full = torch.randn(40, 1152).bfloat16(), 2 * 1152 * 1024
    layer = QuantLinear.from_linear(linear, QuantScheme.parse(scheme))
    torch.compile(layer, backend="viditq")(x)
    assert layer.resident_bytes() <= share * full, "and no int8 copy for the CPU's kernel"
    with torch.no_grad():
        compiled(nn.Sequential(linear), scheme)(x)
    assert 0 < packed_bytes(linear.weight) <= share * full


@pytest.mark.slow
def test_weights_are_given_back():
    model, inputs = tiny_dit(1), tiny_inputs()
    with torch.no_grad():
        want = model(*inputs)
        fast = compiled(model, "w4a8-g128", weights="release")
        fast(*inputs)
        report = vq.explain(fast, *inputs)
        assert relative_error(fast(*inputs), want) < ERROR
    totals = report.totals()
    assert totals["quantized_weight_bytes_full_resident"] == 0
    assert totals["quantized_weight_bytes_packed"] == sum(s.bytes_packed for s in report.sites)
    assert "4-bit weights with a scale for each 128 input channels" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_goes_round(scheme, tmp_path):
    model, other, inputs = tiny_dit(1), tiny_dit(1), tiny_inputs()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        for each in (model, other):
            vq.quantize_(each, args=inputs, scheme=scheme)
        torch.save(model.state_dict(), tmp_path / "w4.pt")
        assert relative_error(other(*inputs), model(*inputs)) > 0.01
        other.load_state_dict(torch.load(tmp_path / "w4.pt"))
        assert torch.equal(other(*inputs), model(*inputs))
        assert torch.equal(copy.deepcopy(model)(*inputs), model(*inputs))
        fresh = tiny_dit(1).state_dict()
        other.load_state_dict(fresh)  # full precision is quantized on the way in
    assert other.blocks[0].up.weight_q.dtype == torch.uint8
    assert relative_error(other(*inputs), model(*inputs)) < 1e-6


def test_a_state_dict_of_another_scheme_is_refused():
    w8, w4 = (
        QuantLinear.from_linear(nn.Linear(64, 64).requires_grad_(False), QuantScheme.parse(name))
        for name in ("w8a8", "w4a8")
    )
    with pytest.raises(
        RuntimeError, match=r"torch.uint8 of shape \(64, 64\) expected, got torch.int8 \(64, 64\)"
    ):
        w4.load_state_dict(w8.state_dict())
    grouped = QuantLinear.from_linear(nn.Linear(64, 64).requires_grad_(False), QuantScheme.parse("w4a8-g128"))
    with pytest.raises(RuntimeError, match=r"of shape \(1, 64\) expected"):
        grouped.load_state_dict(w4.state_dict())


def test_a_written_weight_is_packed_again():
    linear = nn.Linear(64, 64, bias=False).requires_grad_(False)
    x = torch.randn(40, 64)
    with torch.no_grad():
        fast = compiled(nn.Sequential(linear), "w4a8")
        before = fast(x)
        linear.weight.mul_(2)
        assert relative_error(fast(x), 2 * before) < 1e-6


@pytest.mark.slow
def test_plain_inductor_and_dequantized_weight():
    linear = nn.Linear(300, 64).requires_grad_(False)
    layer = QuantLinear.from_linear(linear, QuantScheme.parse("w4a8-g128"))
    x = torch.randn(40, 300)
    assert relative_error(torch.compile(layer)(x), layer(x)) < 2e-3
    assert relative_error(layer.weight, linear.weight) < 0.12
    assert torch.equal(torch.compile(lambda: layer.weight)(), layer.weight)
