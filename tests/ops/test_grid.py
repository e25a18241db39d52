"""Min-max weight grids: the error bound, rows that are odd, groups, dtypes, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from viditq_fx.ops import grid as grid_module
from viditq_fx.ops import grid_rows
from viditq_fx.ops.grid import GRIDS, dequantize_weight_grid, quantize_weight_grid
from viditq_fx.ops.grid_rows import largest_zero
from viditq_fx.ops.quantize import EPS


@st.composite
def weights(draw):
    width, depth = draw(st.integers(1, 5)), draw(st.integers(1, 80))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(width, depth, generator=gen) * draw(st.sampled_from([1e-38, 1e-3, 1.0, 1e4]))
    if draw(st.booleans()):
        w[0] = w[0].abs().round()
    w += draw(st.sampled_from([0.0, 0.0, 50.0, -3000.0]))
    return w.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])))


def there_and_back(w, bits, group, grid="minmax"):
    q, scale, zero = quantize_weight_grid(w, bits, group, grid)
    return dequantize_weight_grid(q, scale, zero, group, torch.float32), q, scale, zero


def per_column(statistic, depth, group):
    """[N] or [G, N] -> [N, K]."""
    if not group:
        return statistic.unsqueeze(-1).expand(-1, depth)
    return statistic.t().repeat_interleave(group, dim=1)[:, :depth]


@settings(max_examples=100, deadline=None)
@given(weights(), st.integers(2, 8), st.sampled_from([0, 1, 4, 7, 64]))
def test_error_is_at_most_half_a_step_and_the_step_is_the_range_in_levels(w, bits, group):
    near, q, scale, zero = there_and_back(w, bits, group)
    stored = torch.int8 if bits <= 4 else torch.float32
    assert (q.dtype, scale.dtype, zero.dtype) == (torch.int8, torch.float32, stored)
    assert -(2 ** (bits - 1)) <= int(q.min()) <= int(q.max()) < 2 ** (bits - 1)
    assert torch.equal(zero, zero.float().round())
    assert zero.float().abs().max() <= largest_zero(bits) + 2 ** (bits - 1)
    step = per_column(scale, w.shape[1], group)
    # fp32 places w / s + z to 1/128 of a step where z is as large as it gets.
    assert ((near - w.float()).abs() <= step * (0.5 + 1 / 64)).all()
    for g in range(0, w.shape[1], group or w.shape[1]):
        part = w[:, g : g + (group or w.shape[1])].double()
        largest, span = part.abs().amax(1), part.amax(1) - part.amin(1)
        steps = torch.where(span == 0, 64.0 if bits <= 4 else 2.0**16, largest_zero(bits))
        want = torch.maximum(span / (2**bits - 1), largest / steps).clamp(min=EPS / (2**bits - 1))
        got = scale[g // group] if group else scale
        assert torch.allclose(got.double(), want, rtol=1e-6, atol=0)


def test_the_paper_by_hand():
    """Delta = 15 / 15 = 1, z = 5 of 0..15, so -3 as stored."""
    q, scale, zero = quantize_weight_grid(torch.tensor([[-5.0, 10.0, 0.0, 2.2, -4.6]]), 4, 0, "minmax")
    assert scale.tolist() == [1.0]
    assert zero.tolist() == [-3.0]
    assert q.tolist() == [[-8, 7, -3, -1, -8]]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_row_that_does_not_cross_zero_loses_no_level(grid, bits):
    for sign in (1, -1):
        ends = (100, 101) if bits > 4 else (9, 12)
        w = sign * torch.linspace(*ends, 2000).unsqueeze(0)
        near, q, scale, _ = there_and_back(w, bits, 0, grid)
        assert len(q.unique()) >= 2**bits - (grid == "bgr")
        assert (near - w).abs().max() <= scale[0] * (0.55 if grid == "minmax" else 1.1)  # BGR gives up an end
        assert scale[0] <= 1.1 * (ends[1] - ends[0]) / (2**bits - 1)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_a_row_of_nearly_one_value_has_a_112th_of_it_as_its_step(grid, bits):
    """Its zero point would not fit in a byte otherwise; the error is a fifteenth of an ordinary 4-bit row's."""
    for sign in (1, -1):
        w = sign * torch.linspace(100, 101, 2000).unsqueeze(0)
        near, _, scale, zero = there_and_back(w, bits, 0, grid)
        assert zero.dtype == torch.int8
        assert (near - w).abs().max() <= 101 / 224 * 1.001
        assert 100 / 112 <= scale[0] <= 102 / 112


@settings(max_examples=60, deadline=None)
@given(weights(), st.integers(2, 4), st.sampled_from([0, 3, 64]), st.sampled_from(GRIDS))
def test_zero_points_that_fit_in_a_byte_are_those_of_a_wide_grid(w, bits, group, grid):
    """Bit for bit what fp32 zero points give, in every row (or group) but those that lie far from zero on one side."""
    q, scale, zero = quantize_weight_grid(w, bits, group, grid)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grid_rows, "ZERO_BITS", 0)
        wide_q, wide_scale, wide_zero = quantize_weight_grid(w, bits, group, grid)
    assert wide_zero.dtype == torch.float32
    parts = w.double().split(group or w.shape[1], dim=1)
    if grid == "minmax":
        ordinary = [(p.amax(1) - p.amin(1)) * 112 > p.abs().amax(1) * (2**bits - 1) * 1.001 for p in parts]
    else:
        ordinary = [torch.minimum(-p.amin(1), p.amax(1)) > p.abs().amax(1) / 4 for p in parts]
    plain = torch.stack(ordinary) if group else ordinary[0]
    assert torch.equal(scale[plain], wide_scale[plain])
    assert torch.equal(zero[plain].float(), wide_zero[plain])
    at = per_column(plain, w.shape[1], group)
    assert torch.equal(q[at], wide_q[at])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("group", [0, 3])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-20, 6e4, -3.3e38])
def test_a_row_of_one_value_is_exact(grid, group, value):
    w = torch.full((2, 7), value)
    assert torch.equal(there_and_back(w, 4, group, grid)[0], w)


def test_zeros_tiny_values_and_one_element():
    near, _, scale, _ = there_and_back(torch.tensor([[0.0, 0.0], [1e-38, -1e-38]]), 4, 0)
    assert torch.equal(near, torch.zeros(2, 2))
    assert torch.allclose(scale, torch.full((2,), EPS / 15))
    assert there_and_back(torch.tensor([[3.0]]), 2, 0)[0].item() == 3.0


@pytest.mark.parametrize("grid", GRIDS)
def test_the_whole_range_of_fp32_does_not_overflow(grid):
    w = torch.tensor([[-3e38, 3e38, 1e38, 0.0]])
    near, _, scale, _ = there_and_back(w, 4, 0, grid)
    assert ((near - w).abs() <= scale * 0.51).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_value_spoils_its_row_and_group_and_no_other(grid, bad, dtype):
    w = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for group in (0, 4):
        clean = quantize_weight_grid(w, 4, group, grid)
        spoilt = w.clone()
        spoilt[1, 2] = bad
        near, q, scale, zero = there_and_back(spoilt, 4, group, grid)
        hit = torch.zeros(3, 8, dtype=torch.bool)
        hit[1, : group or 8] = True
        assert torch.isnan(near[hit]).all()
        assert not q[hit].any()
        assert torch.equal(q[~hit], clean[0][~hit])
        fine = torch.isfinite(scale)
        assert fine.sum() == scale.numel() - 1
        assert zero[~fine].tolist() == [0.0]
        for got, want in zip((scale, zero), clean[1:], strict=True):
            assert torch.equal(got[fine], want[fine])


@pytest.mark.parametrize("grid", GRIDS)
def test_a_group_is_a_row_of_its_own(grid, monkeypatch):
    """Also the short last one, and where a matrix is worked on in chunks of one row."""
    w = torch.randn(5, 75, generator=torch.Generator().manual_seed(0)) + 2
    whole = quantize_weight_grid(w, 4, 32, grid)
    for g, columns in enumerate(w.split(32, dim=1)):
        q, scale, zero = quantize_weight_grid(columns, 4, 0, grid)
        assert torch.equal(whole[0][:, g * 32 : (g + 1) * 32], q)
        assert torch.equal(whole[1][g], scale)
        assert torch.equal(whole[2][g], zero)
    monkeypatch.setattr(grid_module, "CPU_CHUNK", 1)
    for got, want in zip(quantize_weight_grid(w, 4, 32, grid), whole, strict=True):
        assert torch.equal(got, want)
    one_group = quantize_weight_grid(w, 4, 100, grid)
    rows = quantize_weight_grid(w, 4, 0, grid)
    assert torch.equal(one_group[0], rows[0])
    assert torch.equal(one_group[1][0], rows[1])


def test_half_precision_weights_are_computed_in_fp32():
    w = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    for grid in GRIDS:
        for got, want in zip(
            quantize_weight_grid(w, 4, 0, grid), quantize_weight_grid(w.float(), 4, 0, grid), strict=True
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_layout_does_not_matter_and_nothing_is_written(dtype):
    w = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=dtype).t()
    before = w.clone()
    for grid in GRIDS:
        for got, want in zip(
            quantize_weight_grid(w, 4, 16, grid),
            quantize_weight_grid(w.contiguous(), 4, 16, grid),
            strict=True,
        ):
            assert torch.equal(got, want)
    assert torch.equal(w, before)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_parameter_is_a_weight_like_any_other(grid):
    w = torch.nn.Parameter(torch.randn(4, 16))
    for got, want in zip(
        quantize_weight_grid(w, 4, 8, grid), quantize_weight_grid(w.detach(), 4, 8, grid), strict=True
    ):
        assert torch.equal(got, want)


def test_no_rows():
    q, scale, zero = quantize_weight_grid(torch.empty(0, 8), 4, 4, "bgr")
    assert (q.shape, scale.shape, zero.shape) == ((0, 8), (2, 0), (2, 0))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((torch.zeros(2, 4), 9, 0, "minmax"), "bits=9; int8 storage holds 2 to 8"),
        ((torch.zeros(2, 4), 4, -1, "minmax"), "group=-1; a group is at least 1"),
        ((torch.zeros(2, 4), 4, 0, "best"), "grid='best'; choose one of"),
        ((torch.zeros(4), 4, 0, "minmax"), r"floating point \[N, K\]"),
        ((torch.zeros(4, 0), 4, 0, "minmax"), "K at least 1"),
        ((torch.zeros(2, 4, dtype=torch.int8), 4, 0, "minmax"), "got torch.int8"),
    ],
)
def test_what_is_refused(args, said):
    with pytest.raises(ValueError, match=said):
        quantize_weight_grid(*args)


def test_scales_of_another_shape_are_refused():
    q, scale, zero = quantize_weight_grid(torch.randn(4, 8), 4, 4, "minmax")
    with pytest.raises(ValueError, match=r"in groups of 0 are \(4,\); got \(2, 4\)"):
        dequantize_weight_grid(q, scale, zero, 0, torch.float32)
