"""The 4-bit linear against fp64 arithmetic, its packing, and the CPU kernel that reads it as it is stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from viditq_fx.cpu_kernels import int4_gemm
from viditq_fx.ops import int4
from viditq_fx.ops.int4 import int4_unavailable, matmul_s8s4
from viditq_fx.ops.linear_w4a8 import LINEAR_W4A8, linear_w4a8, matmul_int4
from viditq_fx.ops.pack import pack_int4, unpack_int4
from viditq_fx.ops.quantize import (
    dequantize_per_channel,
    dequantize_per_group,
    quantize_per_channel,
    quantize_per_group,
    quantize_per_token,
)
from viditq_fx.ops.weight_forms import dequantize_weight, quantize_weight
from viditq_fx.scheme import GROUPS, QuantScheme, group_of, half_width

needs_kernel = pytest.mark.skipif(int4_unavailable() is not None, reason=str(int4_unavailable()))
DEPTHS = [1, 7, 33, 40, 64, 127, 128, 129, 300, 333, 1152, 1216, 2081]


def weight(width, depth, gen, extreme=False):
    """Symmetric rounding makes no -8, asymmetric weights do: kernels and references have to hold it."""
    w = torch.randint(-8, 8, (width, depth), generator=gen, dtype=torch.int8)
    return torch.full_like(w, 7 if depth % 2 else -8) if extreme else w


@st.composite
def operands(draw):
    """(x int8, w int8 in four bits, scales of groups of either size)."""
    rows, width, depth = draw(st.integers(1, 9)), draw(st.integers(1, 13)), draw(st.sampled_from(DEPTHS))
    gen, extreme = torch.Generator().manual_seed(draw(st.integers(0, 2**31))), draw(st.booleans())
    x = torch.randint(-127, 128, (rows, depth), generator=gen, dtype=torch.int8)
    w = weight(width, depth, gen, extreme)
    scales = torch.rand(-(-depth // draw(st.sampled_from(GROUPS))), width, generator=gen) + 0.1
    return (torch.full_like(x, -127) if extreme else x), w, scales


def exact(x, w):
    return x.double() @ w.double().t()


def exact_groups(x, w, scales):
    """(the sum, the sum of magnitudes of its products) in fp64."""
    size = next(size for size in GROUPS if -(-w.shape[1] // size) == len(scales))
    w_f64 = w.double() * scales.double().t().repeat_interleave(size, dim=1)[:, : w.shape[1]]
    return x.double() @ w_f64.t(), x.double().abs() @ w_f64.abs().t()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.sampled_from(DEPTHS), st.integers(0, 2**31))
def test_pack_round_trip(width, depth, seed):
    w = torch.randint(-8, 8, (width, depth), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4(w)
    assert packed.shape == (width, half_width(depth))
    assert torch.equal(unpack_int4(packed, depth), w)


@pytest.mark.parametrize("shape", [(300,), (2, 3, 300), (0, 300), (2, 0, 5)])
def test_rows_of_any_rank_are_packed_one_by_one(shape):
    q = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed, depth = pack_int4(q), shape[-1]
    assert packed.shape == (*shape[:-1], half_width(depth))
    assert torch.equal(packed.reshape(-1, half_width(depth)), pack_int4(q.reshape(-1, depth)))
    assert torch.equal(unpack_int4(packed, depth), q)


def test_layout_is_two_halves():
    w = torch.zeros(1, 256, dtype=torch.int8)
    w[0, 5], w[0, 128 + 5] = -3, 6
    packed = pack_int4(w)
    assert packed[0, 5] == (6 << 4 | (16 - 3))
    assert packed.count_nonzero() == 1


def test_what_four_bits_do_not_hold():
    for wrong in (8, -9):
        with pytest.raises(ValueError, match=f"four bits hold -8 to 7; got integers from {wrong} to {wrong}"):
            pack_int4(torch.full((1, 4), wrong, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"int8 \[..., K\]"):
        pack_int4(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"K=300 are uint8 \[\.\.\., 192\]"):
        unpack_int4(torch.zeros(2, 64, dtype=torch.uint8), 300)


@settings(max_examples=60, deadline=None)
@given(operands())
def test_sums_are_exact(given_operands):
    x, w, scales = given_operands
    packed = pack_int4(w)
    assert torch.equal(matmul_int4(x, packed, None).double(), exact(x, w))
    got, (want, size) = matmul_int4(x, packed, scales), exact_groups(x, w, scales)
    assert ((got.double() - want).abs() <= 1e-6 * size).all()


@needs_kernel
@settings(max_examples=80, deadline=None)
@given(operands())
def test_our_kernel_is_exact(given_operands):
    x, w, scales = given_operands
    packed = pack_int4(w)
    assert torch.equal(int4_gemm.multiply(x, packed, None).double(), exact(x, w))
    got, (want, size) = int4_gemm.multiply(x, packed, scales), exact_groups(x, w, scales)
    assert ((got.double() - want).abs() <= 2e-6 * size).all()


@needs_kernel
@pytest.mark.parametrize("rows", [1, 17, 64, 130])
def test_our_kernel_on_many_tiles_and_threads(rows):
    gen = torch.Generator().manual_seed(rows)
    x = torch.randint(-127, 128, (rows, 4500), generator=gen, dtype=torch.int8)
    w = weight(259, 4500, gen)  # -8 among them
    assert torch.equal(int4_gemm.multiply(x, pack_int4(w), None).double(), exact(x, w))


def test_without_a_compiler_it_is_exact_in_blocks(monkeypatch):
    gen = torch.Generator().manual_seed(0)
    x, w = torch.randint(-127, 128, (3, 5, 300), generator=gen, dtype=torch.int8), weight(37, 300, gen)
    scales = torch.rand(3, 37, generator=gen)
    monkeypatch.setattr(int4, "int4_unavailable", lambda: "no compiler")
    monkeypatch.setattr(int4, "BLOCK_BYTES", 4 * 300 * 10)  # ten channels at a time
    got = matmul_s8s4(x, pack_int4(w), None)
    assert torch.equal(got.double(), exact(x.reshape(15, 300), w).reshape(3, 5, 37))
    want = matmul_int4(x.reshape(15, 300), pack_int4(w), scales).reshape(3, 5, 37)
    torch.testing.assert_close(matmul_s8s4(x, pack_int4(w), scales), want, rtol=1e-6, atol=1e-4)


@needs_kernel
def test_no_rows_and_wrong_operands():
    packed = pack_int4(torch.ones(8, 64, dtype=torch.int8))
    assert matmul_s8s4(torch.zeros(2, 0, 64, dtype=torch.int8), packed, None).shape == (2, 0, 8)
    with pytest.raises(ValueError, match="matmul_s8s4: needs int8"):
        matmul_s8s4(torch.zeros(2, 300, dtype=torch.int8), packed, None)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 17),
    st.integers(1, 40),
    st.sampled_from(DEPTHS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.sampled_from(["w4a8", "w4a8-g128", "w4a8-g64"]),
    st.integers(0, 2**31),
)
def test_linear_holds_to_fp64(rows, width, depth, dtype, with_bias, scheme, seed):
    gen = torch.Generator().manual_seed(seed)
    x_q, x_scale = quantize_per_token(torch.randn(rows, depth, generator=gen), 8)
    form = QuantScheme.parse(scheme).weight_form
    stored, scale = quantize_weight(torch.randn(width, depth, generator=gen), form)
    bias = torch.randn(width, generator=gen).to(dtype) if with_bias else torch.zeros(width, dtype=dtype)
    w_q = unpack_int4(stored, depth)
    sums, size = exact_groups(x_q, w_q, scale if form.group else scale.expand(-(-depth // 128), width))
    want, got = sums * x_scale.double() + bias.double(), linear_w4a8(x_q, x_scale, stored, scale, bias, dtype)
    assert got.dtype == dtype
    tolerance = LINEAR_W4A8.tolerances[dtype]
    bound = tolerance.atol + tolerance.rtol * (size * x_scale.double() + bias.double().abs())
    assert ((got.double() - want).abs() <= bound).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.sampled_from(DEPTHS), st.sampled_from(GROUPS), st.integers(0, 2**31))
def test_a_group_rounds_by_half_a_step_at_most(width, depth, group, seed):
    w = torch.randn(width, depth, generator=torch.Generator().manual_seed(seed))
    q, scale = quantize_per_group(w, 4, group)
    assert scale.shape == (-(-depth // group), width)
    assert q.abs().max() <= 7
    error = (dequantize_per_group(q, scale, group, torch.float32) - w).abs()
    for g, scale_N in enumerate(scale):
        assert (error[:, g * group : (g + 1) * group] <= 0.5001 * scale_N[:, None]).all()


@pytest.mark.parametrize("grid", ["", "-asym"])
def test_smaller_groups_make_a_smaller_error(grid):
    w = torch.randn(24, 333, generator=torch.Generator().manual_seed(0))
    errors = []
    for scheme in ("w4a8", "w4a8-g128", "w4a8-g64"):
        form = QuantScheme.parse(scheme + grid).weight_form
        errors.append(
            (dequantize_weight(quantize_weight(w, form), 333, form, torch.float32) - w).square().mean()
        )
    assert errors[0] > 1.1 * errors[1] > 1.2 * errors[2]


@pytest.mark.parametrize("depth", [1, 64, 65, 128, 129, 333, 1216])
def test_scales_tell_the_size_of_their_groups(depth):
    """But for one that holds all of K: its size is the widest, and makes no difference."""
    for group in GROUPS:
        assert group_of(-(-depth // group), depth) == (group if depth > 64 else 128)
    assert group_of(-(-depth // 64) + 1, depth) is None


def test_one_group_is_the_whole_channel():
    w = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    (q, scale), (q_1, scale_1) = quantize_per_channel(w, 4), quantize_per_group(w, 4, 128)
    assert torch.equal(q, q_1)
    assert torch.equal(scale, scale_1[0])


FORMS = ["w8a8", "w4a8", "w4a8-g128", "w4a8-g64", "w8a8-asym", "w4a8-bgr", "w4a8-g128-asym", "w4a8-g64-asym"]


@pytest.mark.parametrize("scheme", FORMS)
def test_forms_give_back_what_they_store(scheme):
    w = torch.randn(24, 300, generator=torch.Generator().manual_seed(0))
    form = QuantScheme.parse(scheme).weight_form
    stored, scale, *zero = quantize_weight(w, form)
    assert sum(t.numel() * t.element_size() for t in (stored, scale, *zero)) == form.nbytes(24, 300)
    back = dequantize_weight((stored, scale, *zero), 300, form, torch.float32)
    if form.group is None and form.grid is None:
        assert torch.equal(back, dequantize_per_channel(*quantize_per_channel(w, form.bits), torch.float32))
    clipped = 2.0 if form.grid == "bgr" else 0.51  # BGR gives up the ends of a row for the rest of it
    assert (back - w).abs().max() <= clipped * scale.max()


@pytest.mark.parametrize(("scheme", "floor"), [("w4a8", 16.0), ("w4a8-g128", 18.5), ("w4a8-g64", 19.2)])
def test_sqnr_on_gaussian_data(scheme, floor):
    gen = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 3072, generator=gen), torch.randn(256, 3072, generator=gen) * 3072**-0.5
    weights = quantize_weight(w, QuantScheme.parse(scheme).weight_form)
    got = linear_w4a8(*quantize_per_token(x, 8), *weights, None, torch.float32).double()
    want = F.linear(x.double(), w.double())
    assert 10 * torch.log10(want.square().sum() / (want - got).square().sum()) >= floor


def test_a_nan_row_stays_in_its_row():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(4, 200, generator=gen)
    x[2, 3] = float("nan")
    for scheme in ("w4a8", "w4a8-g128", "w4a8-g64"):
        weights = quantize_weight(torch.randn(8, 200, generator=gen), QuantScheme.parse(scheme).weight_form)
        got = linear_w4a8(*quantize_per_token(x, 8), *weights, None, torch.float32)
        assert torch.isnan(got[2]).all()
        assert torch.isfinite(got[[0, 1, 3]]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(0, a[0].float()), "int8 and packed uint8"),
        (lambda a: a.__setitem__(2, a[2].view(torch.int8)), "int8 and packed uint8"),
        (lambda a: a.__setitem__(2, a[2][:, :-1]), "share no K"),
        (lambda a: a.__setitem__(3, a[3].expand(2, 4)), "scales must be"),
        (lambda a: a.__setitem__(1, a[1].squeeze(-1)), "scales must be"),
        (lambda a: a.__setitem__(4, torch.zeros(3)), "bias must be"),
    ],
)
def test_operands_that_do_not_fit(change, message):
    weights = quantize_weight(torch.ones(4, 8), QuantScheme.parse("w4a8").weight_form)
    args = [*quantize_per_token(torch.ones(2, 8), 8), *weights, None, torch.float32]
    change(args)
    with pytest.raises(ValueError, match=message):
        linear_w4a8(*args)
