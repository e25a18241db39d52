"""Static scales: one for each position is what one scale gives at each position, and other shapes are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from viditq_fx.ops.static_scale import positions_of, quantize_static


@st.composite
def calls(draw):
    positions, depth = draw(st.integers(1, 7)), draw(st.integers(1, 33))
    batch = draw(st.lists(st.integers(1, 3), max_size=2))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(*batch, positions, depth, generator=gen)
    x = x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    if batch and draw(st.booleans()):
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    scale_S = torch.rand(positions, generator=gen) * 0.05 + 1e-3  # some values are clipped, some are not
    return x, scale_S, draw(st.integers(2, 8))


@settings(max_examples=80, deadline=None)
@given(calls())
def test_each_position_is_quantized_by_its_own_scale(given_call):
    x, scale_S, bits = given_call
    q, s = quantize_static(x, scale_S, bits)
    assert q.shape == x.shape
    assert s.shape == (*x.shape[:-1], 1)
    for position, scale in enumerate(scale_S):
        want_q, want_s = quantize_static(x[..., position, :], scale, bits)
        assert torch.equal(q[..., position, :], want_q)
        assert torch.equal(s[..., position, :], want_s)


def test_scales_of_other_shapes_are_refused():
    x = torch.randn(2, 5, 8)
    for shape in ((2,), (8,), (4,), (5, 1), (2, 5), (1, 1), (0,)):
        with pytest.raises(ValueError, match=r"one for each position .* for x \(2, 5, 8\)"):
            quantize_static(x, torch.ones(shape), 8)
    with pytest.raises(ValueError, match="bits are 2 to 8, not 9"):
        quantize_static(x, torch.ones(5), 9)
    assert [positions_of(x[0]), positions_of(x), positions_of(x[None])] == [1, 5, 5]
