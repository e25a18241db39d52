"""The integer linear against fp64 arithmetic: exact sums, one epilogue, no early cast."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from viditq_fx import ops
from viditq_fx.ops import onednn
from viditq_fx.ops.base import EPILOGUE_TOLERANCES
from viditq_fx.ops.linear import EXACT_K, exact_int_matmul, linear_w8a8
from viditq_fx.ops.onednn import matmul_f32s8, matmul_u8s8, onednn_is_exact, shift_to_u8
from viditq_fx.ops.quantize import quantize_per_channel, quantize_per_token

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sqnr_db(reference, got):
    return 10 * torch.log10(reference.square().sum() / (reference - got).square().sum())


def exact(x, w):
    return x.double() @ w.double().t()


@st.composite
def integers(draw, largest=127):
    rows, width = draw(st.integers(0, 17)), draw(st.integers(1, 40))
    depth = draw(st.sampled_from([1, 7, 16, 33, 64, 1039, 1040, 1041, 2081]))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    extreme = draw(st.booleans())
    x = torch.randint(-largest, largest + 1, (rows, depth), generator=gen, dtype=torch.int8)
    w = torch.randint(-127, 128, (width, depth), generator=gen, dtype=torch.int8)
    if extreme:  # the largest sums there are
        x, w = torch.full_like(x, largest), torch.full_like(w, 127)
    return x, w


@settings(max_examples=60, deadline=None)
@given(integers())
def test_fp32_slices_are_exact(operands):
    x, w = operands
    assert torch.equal(exact_int_matmul(x, w).double(), exact(x, w))
    assert torch.equal(matmul_f32s8(x.float(), w).double(), exact(x, w).float().double())


def test_weights_that_could_round_are_sliced():
    # Sums alternate above 2^24 in units that fp32 drops: a single GEMM would be off.
    x, w = torch.full((1, 2081), 127.0), torch.full((1, 2081), 127, dtype=torch.int8)
    w[0, -1] = 1
    assert matmul_f32s8(x, w).item() == float(torch.tensor(127 * 127 * 2080 + 127).float())


def test_one_slice_more_would_not_be_exact():
    # Why EXACT_K is what it is: the first sum beyond 2^24, where fp32 has no odd integers. Weights reach -128.
    assert 127 * 128 * EXACT_K <= 2**24 < 127 * 128 * (EXACT_K + 1)


@settings(max_examples=60, deadline=None)
@given(integers(largest=63))
def test_onednn_7_bit_is_exact_on_every_cpu(operands):
    x, w = operands
    assert torch.equal(matmul_u8s8(shift_to_u8(x, 64), w, 64).double(), exact(x, w).float().double())


@pytest.mark.skipif(not onednn_is_exact(8), reason="this CPU's oneDNN saturates with 8-bit inputs")
@settings(max_examples=60, deadline=None)
@given(integers())
def test_onednn_8_bit_is_exact_where_it_is_chosen(operands):
    x, w = operands
    assert torch.equal(matmul_u8s8(shift_to_u8(x, 128), w, 128).double(), exact(x, w).float().double())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 17),
    st.integers(1, 40),
    st.sampled_from([1, 8, 17, 100, 1152]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_linear_holds_to_fp64(rows, width, depth, dtype, with_bias, seed):
    gen = torch.Generator().manual_seed(seed)
    x_q, x_scale = quantize_per_token(torch.randn(rows, depth, generator=gen), 8)
    w_q, w_scale = quantize_per_channel(torch.randn(width, depth, generator=gen), 8)
    bias = torch.randn(width, generator=gen).to(dtype) if with_bias else None
    want = exact(x_q, w_q) * x_scale.double() * w_scale.double() + (0 if bias is None else bias.double())
    got = linear_w8a8(x_q, x_scale, w_q, w_scale, bias, dtype)
    assert got.dtype == dtype
    tolerance = EPILOGUE_TOLERANCES[dtype]
    # The sum of two terms can cancel: the error is bounded by the terms, not by their sum.
    size = (exact(x_q, w_q) * x_scale.double() * w_scale.double()).abs() + (
        0 if bias is None else bias.double().abs()
    )
    assert ((got.double() - want).abs() <= tolerance.atol + tolerance.rtol * size).all()


@pytest.mark.parametrize("depth", [1152, 1536, 3072, 4608, 5120])
@pytest.mark.parametrize("op", [ops.LINEAR_W8A8, ops.LINEAR_W8A7], ids=lambda op: op.name)
def test_sqnr_on_gaussian_data(depth, op):
    bits, floor = (8, 35) if op is ops.LINEAR_W8A8 else (7, 30)
    gen = torch.Generator().manual_seed(depth)
    x, w = torch.randn(64, depth, generator=gen), torch.randn(256, depth, generator=gen) * depth**-0.5
    got = op.overload(*quantize_per_token(x, bits), *quantize_per_channel(w, 8), None, torch.float32)
    assert sqnr_db(F.linear(x.double(), w.double()), got.double()) >= floor


def test_fp16_result_near_its_largest_number():
    # A cast before the last scale would be inf: the integers alone reach 127 * 127 * 256.
    x, w = torch.full((1, 256), 16.0), torch.full((1, 256), 15.99)
    got = linear_w8a8(*quantize_per_token(x, 8), *quantize_per_channel(w, 8), None, torch.float16)
    assert torch.isfinite(got).all()
    assert abs(got.item() - 256 * 16 * 15.99) < 64


def test_a_nan_row_stays_in_its_row():
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    x[2, 3] = float("nan")
    w = quantize_per_channel(torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), 8)
    got = linear_w8a8(*quantize_per_token(x, 8), *w, None, torch.float32)
    assert torch.isnan(got[2]).all()
    assert torch.isfinite(got[[0, 1, 3]]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(0, a[0].float()), "must be int8"),
        (lambda a: a.__setitem__(2, a[2][:, :-1]), "share no K"),
        (lambda a: a.__setitem__(1, a[1].squeeze(-1)), "scales must be"),
        (lambda a: a.__setitem__(3, a[3][:-1]), "scales must be"),
        (lambda a: a.__setitem__(4, torch.zeros(3)), "bias must be"),
    ],
)
def test_operands_that_do_not_fit(change, message):
    args = [
        *quantize_per_token(torch.ones(2, 8), 8),
        *quantize_per_channel(torch.ones(4, 8), 8),
        None,
        torch.float32,
    ]
    change(args)
    with pytest.raises(ValueError, match=message):
        linear_w8a8(*args)


def test_it_has_no_derivative_and_says_so():
    x = torch.randn(2, 8, requires_grad=True)
    y = ops.LINEAR_W8A8.overload(
        *ops.QUANTIZE_PER_TOKEN.overload(x, 8),
        *quantize_per_channel(torch.ones(4, 8), 8),
        None,
        torch.float32,
    )
    with pytest.raises(RuntimeError, match="is for inference and has no derivative"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_reach_the_integers(dtype):
    x, w = torch.full((4, 2048), 127, dtype=torch.int8), torch.full((8, 2048), 127, dtype=torch.int8)
    small = w[:, :100].contiguous()
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(exact_int_matmul(x, w).double(), exact(x, w))
        assert torch.equal(matmul_f32s8(x.float(), w).double(), exact(x, w).float().double())
        assert torch.equal(matmul_f32s8(x[:, :100].float(), small).double(), exact(x[:, :100], small))


@pytest.fixture
def untried(monkeypatch):
    """As in a new process: nothing was tried, no scales are kept."""
    monkeypatch.setattr(onednn, "_EXACT", {})
    onednn._unit_scales.cache_clear()
    yield
    onednn._unit_scales.cache_clear()


def test_default_dtype_and_device_do_not_reach_the_kernels(untried):
    x = torch.randint(1, 127, (20, 64), dtype=torch.uint8)
    w, empty = torch.randint(-127, 128, (96, 64), dtype=torch.int8), torch.empty(0, 64, dtype=torch.uint8)
    want = exact(x.to(torch.int32) - 64, w)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            assert onednn_is_exact(7)
            got, none = matmul_u8s8(x, w, 64), matmul_u8s8(empty, w, 64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.double(), want)
    assert torch.equal(matmul_u8s8(x, w, 64), got)
    assert (none.dtype, none.device.type, none.shape) == (torch.float32, "cpu", (0, 96))


def test_a_trial_that_fails_is_tried_again(untried, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(onednn, "matmul_u8s8", fails)
        assert not onednn_is_exact(7)
    assert onednn_is_exact(7)
