"""The low-rank branch: it takes off what it can, adds what it took, and is the same every time."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from viditq_fx.ops.low_rank import add_low_rank, split_low_rank
from viditq_fx.ops.packed_weights import packed_weight
from viditq_fx.ops.rotate import rotate
from viditq_fx.ops.weight_forms import dequantize_weight, quantize_weight
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.scheme import QuantScheme


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(8, 40),
    depth=st.sampled_from([16, 48, 64]),
    rank=st.integers(1, 8),
    rotation=st.sampled_from([1, 4, 16]),
    smoothed=st.booleans(),
)
def test_what_is_left_and_the_branch_make_the_whole_product(width, depth, rank, rotation, smoothed):
    w, x = drawn(width, depth), drawn(5, depth, seed=1)
    multiplier = torch.rand(depth, generator=torch.Generator().manual_seed(2)) + 0.5 if smoothed else None
    rest, down, up = split_low_rank(w, multiplier, rotation, rank)
    y = add_low_rank(rotate(x, multiplier, rotation) @ rest.t(), x, down, up, torch.float32)
    torch.testing.assert_close(y, x @ w.t(), rtol=1e-4, atol=1e-4)
    assert torch.equal(rest, split_low_rank(w, multiplier, rotation, rank)[0])
    singular = torch.linalg.svdvals(rest)
    whole = torch.linalg.svdvals(w if multiplier is None else w / multiplier)
    assert singular[0] <= whole[min(rank, len(whole) - 1)] * 1.2 + 0.02 * whole[0]  # bf16 factors, randomized


def test_an_outlier_direction_no_longer_sets_the_grid():
    w = drawn(64, 128) + 40 * torch.outer(drawn(64, seed=1), drawn(128, seed=2)) / 64**0.5
    errors = {}
    for name in ("w4a4-asym", "w4a4-asym-svd16"):
        form = QuantScheme.parse(name).weight_form
        back = dequantize_weight(quantize_weight(w, form), 128, form, torch.float32)
        errors[name] = float((back - w).norm() / w.norm())
    assert errors["w4a4-asym-svd16"] < 0.3 * errors["w4a4-asym"]


def test_a_weight_packed_under_autocast_is_the_same():
    """The first compiled call packs, and pipelines make it under autocast."""
    w = drawn(64, 128) + 20 * drawn(64, 1, seed=1) @ drawn(1, 128, seed=2)
    for form in (
        QuantScheme.parse("w4a8-asym-svd16").weight_form,
        replace(QuantScheme.parse("w4a8-g128-svd16").weight_form, rotation=64),
    ):
        want = packed_weight(nn.Parameter(w.clone()), form, "outside")
        with torch.autocast("cpu", torch.bfloat16):
            got = packed_weight(nn.Parameter(w.clone()), form, "inside")
            back = dequantize_weight(got, 128, form, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(back, dequantize_weight(want, 128, form, torch.float32))


def test_a_branch_of_a_rank_that_is_none():
    for rank in (0, 9):
        with pytest.raises(ValueError, match="1 to min"):
            split_low_rank(drawn(8, 16), None, 1, rank)


def test_a_weight_that_is_not_finite_is_refused_by_its_scale():
    form = QuantScheme.parse("w4a4-svd16").weight_form
    w = drawn(32, 64)
    w[3, 5] = torch.nan
    assert not torch.isfinite(quantize_weight(w, form)[1]).all()


def test_a_layer_with_a_branch_saves_and_loads():
    scheme = QuantScheme.parse("w4a4-bgr-rot-svd16")
    first, second = (
        QuantLinear.from_linear(torch.nn.Linear(64, 32).requires_grad_(False), scheme) for _ in range(2)
    )
    x = drawn(3, 64)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    assert {"branch_down", "branch_up", "weight_zero", "rotation"} < set(first.state_dict())
    full = drawn(32, 64, seed=9)
    second.load_state_dict({"weight": full, "bias": torch.zeros(32)})
    assert float((second.weight - full).norm() / full.norm()) < 0.15
