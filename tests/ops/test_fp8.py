"""Quantization and linear in e4m3 against fp64 arithmetic, and where it is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.small_models import capture, context, targets, tiny_dit, tiny_inputs
from viditq_fx.errors import StrictError
from viditq_fx.ops.fp8 import (
    E4M3,
    LARGEST,
    LINEAR_W8A8_FP8,
    linear_w8a8_fp8,
    quantize_fp8_per_channel,
    quantize_fp8_per_token,
    why_no_fp8,
)
from viditq_fx.ops.weight_forms import dequantize_weight, quantize_weight
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.scheme import QuantScheme

FP8 = QuantScheme.parse("fp8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.floats(-20, 20), st.integers(0, 2**31))
def test_rounds_by_a_sixteenth_at_most(rows, depth, exponent, seed):
    """Three bits of mantissa: half a step is 2^-4 of the value, and below 2^-6 of the scale half of 2^-9."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, depth, generator=gen) * 2.0**exponent
    q, scale = quantize_fp8_per_token(x)
    assert (q.dtype, scale.shape) == (E4M3, (rows, 1))
    assert q.float().abs().max() <= LARGEST
    error = (q.double() * scale.double() - x.double()).abs()
    assert (error <= 1.001 * torch.maximum(x.double().abs() / 16, scale.double() * 2.0**-10)).all()


def test_a_channel_is_a_row():
    w = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    (q, scale), (q_rows, scale_rows) = quantize_fp8_per_channel(w), quantize_fp8_per_token(w)
    assert torch.equal(q.float(), q_rows.float())
    assert torch.equal(scale, scale_rows.squeeze(-1))
    stored, scales = quantize_weight(w, FP8.weight_form)
    assert stored.numel() + 4 * scales.numel() == FP8.weight_form.nbytes(7, 33)
    assert (
        (dequantize_weight((stored, scales), 33, FP8.weight_form, torch.float32) - w).abs()
        < w.abs().max() / 16
    ).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 17),
    st.integers(1, 40),
    st.sampled_from([1, 8, 17, 100, 1152]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_linear_holds_to_fp64(rows, width, depth, dtype, with_bias, seed):
    gen = torch.Generator().manual_seed(seed)
    x_q, x_scale = quantize_fp8_per_token(torch.randn(rows, depth, generator=gen))
    w_q, w_scale = quantize_fp8_per_channel(torch.randn(width, depth, generator=gen))
    bias = torch.randn(width, generator=gen).to(dtype) if with_bias else torch.zeros(width, dtype=dtype)
    x_f64, w_f64 = x_q.double() * x_scale.double(), w_q.double() * w_scale.double()[:, None]
    want, size = x_f64 @ w_f64.t() + bias.double(), x_f64.abs() @ w_f64.abs().t() + bias.double().abs()
    got = linear_w8a8_fp8(x_q, x_scale, w_q, w_scale, bias, dtype)
    tolerance = LINEAR_W8A8_FP8.tolerances[dtype]
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= tolerance.atol + tolerance.rtol * size).all()


def test_sqnr_on_gaussian_data():
    gen = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 1152, generator=gen), torch.randn(256, 1152, generator=gen)
    got = linear_w8a8_fp8(*quantize_fp8_per_token(x), *quantize_fp8_per_channel(w), None, torch.float32)
    want = F.linear(x.double(), w.double())
    assert 10 * torch.log10(want.square().sum() / (want - got).square().sum()) >= 28


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_in_its_row(bad):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    x[2, 3] = bad
    w = quantize_fp8_per_channel(torch.randn(8, 16, generator=torch.Generator().manual_seed(1)))
    got = linear_w8a8_fp8(*quantize_fp8_per_token(x), *w, None, torch.float32)
    assert torch.isnan(got[2]).all()
    assert torch.isfinite(got[[0, 1, 3]]).all()


def test_zeros_give_the_bias():
    weights = quantize_fp8_per_channel(torch.ones(4, 16))
    got = linear_w8a8_fp8(*quantize_fp8_per_token(torch.zeros(2, 16)), *weights, torch.ones(4), torch.float32)
    assert torch.equal(got, torch.ones(2, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(0, a[0].float()), "operands must be"),
        (lambda a: a.__setitem__(2, a[2][:, :-1]), "share no K"),
        (lambda a: a.__setitem__(3, a[3][:-1]), "scales must be"),
        (lambda a: a.__setitem__(4, torch.zeros(3)), "bias must be"),
    ],
)
def test_operands_that_do_not_fit(change, message):
    weights = quantize_fp8_per_channel(torch.ones(4, 8))
    args = [*quantize_fp8_per_token(torch.ones(2, 8)), *weights, None, torch.float32]
    change(args)
    with pytest.raises(ValueError, match=message):
        linear_w8a8_fp8(*args)


def test_a_cpu_is_refused_with_the_reason():
    assert "capability 8.9 or later" in (why_no_fp8(torch.device("cpu")) or "")
    gm, ctx = capture(tiny_dit(1), *tiny_inputs()), context("fp8")
    PassPipeline(passes=default_passes()).run(gm, ctx)
    refused = [site for site in ctx.report.sites if site.planned == "fp8"]
    assert len(refused) == 6
    assert all(site.done is None and "this is cpu" in (site.reason or "") for site in refused)
    assert "linear_w8a8_fp8" not in targets(gm)


def test_strict_makes_it_an_error():
    torch._dynamo.reset()
    model, inputs = tiny_dit(1), tiny_inputs()
    fast = torch.compile(model, backend="viditq", options={"scheme": "fp8", "strict": True})
    with torch.no_grad(), pytest.raises(Exception, match="this is cpu") as caught:
        fast(*inputs)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), StrictError)
