"""Quantize keeps its bound, its defined behaviour for odd rows, and its inverse."""

import pytest
import torch
import torch._inductor.config as inductor_config
from hypothesis import given, settings
from hypothesis import strategies as st

from viditq_fx.ops.quantize import (
    EPS,
    dequantize_per_channel,
    dequantize_per_token,
    fake_dequantized,
    fake_per_block,
    fake_per_channel,
    fake_per_token,
    quantize_per_block,
    quantize_per_channel,
    quantize_per_token,
)
from viditq_fx.scheme import largest_int

FINITE = st.floats(-6e4, 6e4, allow_nan=False, width=32)


@st.composite
def rows(draw):
    count, depth = draw(st.integers(1, 5)), draw(st.integers(1, 33))
    values = draw(st.lists(FINITE, min_size=count * depth, max_size=count * depth))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return torch.tensor(values).reshape(count, depth).to(dtype)


@settings(max_examples=150, deadline=None)
@given(rows(), st.integers(2, 8))
def test_error_is_at_most_half_a_step(x, bits):
    q, scale = quantize_per_token(x, bits)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert q.abs().max() <= largest_int(bits)
    error = (dequantize_per_token(q, scale, torch.float32) - x.float()).abs()
    assert (error <= scale * 0.5 * (1 + 1e-5)).all()


@settings(max_examples=60, deadline=None)
@given(rows())
def test_negation_is_exact(x):
    q, scale = quantize_per_token(x, 8)
    q_neg, scale_neg = quantize_per_token(-x, 8)
    assert torch.equal(q_neg, -q)
    assert torch.equal(scale_neg, scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_value_spoils_its_row_and_no_other(bad):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    clean_q, clean_scale = quantize_per_token(x, 8)
    x[1, 2] = bad
    q, scale = quantize_per_token(x, 8)
    assert not torch.isfinite(scale[1]).any()
    assert torch.isnan(dequantize_per_token(q, scale, torch.float32)[1]).all()
    assert torch.equal(q[[0, 2]], clean_q[[0, 2]])
    assert torch.equal(scale[[0, 2]], clean_scale[[0, 2]])


def test_zero_row_and_tiny_row():
    q, scale = quantize_per_token(torch.tensor([[0.0, 0.0], [1e-38, -1e-38]]), 8)
    assert torch.equal(q, torch.zeros(2, 2, dtype=torch.int8))
    assert torch.equal(scale, torch.full((2, 1), EPS * (1 / 127)))


def test_largest_fp16_does_not_overflow():
    x = torch.tensor([[65504.0, -65504.0, 1.0]], dtype=torch.float16)
    q, scale = quantize_per_token(x, 8)
    assert q.tolist() == [[127, -127, 0]]
    assert torch.allclose(dequantize_per_token(q, scale, torch.float32)[0, :2], x.float()[0, :2])


def test_rounds_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])  # scale 1
    assert quantize_per_token(x, 8)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty_batch(shape):
    q, scale = quantize_per_token(torch.empty(shape), 8)
    assert q.shape == shape
    assert scale.shape == (*shape[:-1], 1)


@pytest.mark.parametrize("layout", ["transposed", "strided", "channels_last"])
def test_memory_layout_does_not_matter(layout):
    gen = torch.Generator().manual_seed(0)
    x = {
        "transposed": lambda: torch.randn(8, 6, generator=gen).t(),
        "strided": lambda: torch.randn(6, 16, generator=gen)[:, ::2],
        "channels_last": lambda: torch.randn(2, 8, 4, 4, generator=gen).to(memory_format=torch.channels_last),
    }[layout]()
    for got, want in zip(quantize_per_token(x, 8), quantize_per_token(x.contiguous(), 8), strict=True):
        assert torch.equal(got, want)


def test_per_channel_is_per_token_of_the_weight():
    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    q, scale = quantize_per_channel(w, 8)
    q_rows, scale_rows = quantize_per_token(w, 8)
    assert torch.equal(q, q_rows)
    assert torch.equal(scale, scale_rows[:, 0])
    assert torch.equal(
        dequantize_per_channel(q, scale, torch.float32), dequantize_per_token(q, scale_rows, torch.float32)
    )


@pytest.mark.parametrize("bits", [1, 9, 0, -3])
def test_bad_bits(bits):
    with pytest.raises(ValueError, match="2 to 8 bits"):
        quantize_per_token(torch.ones(1, 4), bits)


def test_bad_rank():
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        quantize_per_channel(torch.ones(2, 3, 4), 8)
    with pytest.raises(ValueError, match="0-d"):
        quantize_per_token(torch.tensor(1.0), 8)


def test_fakes_have_the_shapes_and_strides_of_the_ops():
    """Passes use them in place of running the reference on fake tensors, which takes ten times as long."""
    for x in (torch.randn(3, 5, 40), torch.randn(16, 6).t().to(torch.bfloat16), torch.randn(7)):
        pairs = [(quantize_per_token(x, 8), fake_per_token(x, 8))]
        if x.dim() == 2:
            pairs.append((quantize_per_channel(x, 8), fake_per_channel(x, 8)))
        for real, fake in pairs:
            for got, want in zip(fake, real, strict=True):
                assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
        q, scale = quantize_per_token(x, 8)
        real, fake = dequantize_per_token(q, scale, x.dtype), fake_dequantized(q, scale, x.dtype)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@settings(max_examples=60, deadline=None)
@given(rows(), st.integers(2, 8), st.integers(1, 40))
def test_a_block_is_a_token_of_its_own(x, bits, block):
    q, scale = quantize_per_block(x, bits, block)
    assert (q.shape, scale.shape) == (x.shape, (x.shape[0], -(-x.shape[1] // block)))
    for g in range(scale.shape[1]):
        inside = slice(g * block, (g + 1) * block)
        want_q, want_scale = quantize_per_token(x[:, inside], bits)
        assert torch.equal(q[:, inside], want_q)
        assert torch.equal(scale[:, g : g + 1], want_scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_value_spoils_its_block_and_no_other(bad):
    x = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    x[1, 2, :8] = 0
    clean_q, clean_scale = quantize_per_block(x, 4, 8)
    assert clean_scale[1, 2, 0] == EPS * (1 / 7)
    x[0, 1, 9] = bad
    q, scale = quantize_per_block(x, 4, 8)
    assert not torch.isfinite(scale[0, 1, 1])
    assert torch.isnan(q[0, 1, 8:16] * scale[0, 1, 1]).all()
    scale[0, 1, 1], q[0, 1, 8:16] = clean_scale[0, 1, 1], clean_q[0, 1, 8:16]
    assert torch.equal(q, clean_q)
    assert torch.equal(scale, clean_scale)


def test_blocks_of_odd_tensors():
    gen = torch.Generator().manual_seed(0)
    for x in (
        torch.randn(3, 5, 40, generator=gen),
        torch.randn(40, 6, generator=gen).t(),
        torch.empty(2, 0, 40),
    ):
        real, fake = quantize_per_block(x, 8, 16), fake_per_block(x, 8, 16)
        for got, want in zip(fake, real, strict=True):
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    for wrong in (torch.tensor(1.0), torch.empty(2, 0)):
        with pytest.raises(ValueError, match="K >= 1"):
            quantize_per_block(wrong, 8, 16)
    with pytest.raises(ValueError, match="a block at least 1"):
        quantize_per_block(torch.ones(2, 4), 8, 0)


def test_blocks_are_compiled_to_the_same_bits():
    """Inductor's C++ wrote -128 past the last whole block of a padded reshape (K = 300, torch 2.13)."""
    from viditq_fx.ops import PACK_INT4, QUANTIZE_PER_BLOCK

    def function(x):
        (q, scale), (q_4, scale_4) = (QUANTIZE_PER_BLOCK.overload(x, bits, 128) for bits in (8, 4))
        return q, scale, PACK_INT4.overload(q_4), scale_4

    x = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(0))
    with inductor_config.patch(
        force_disable_caches=True
    ):  # its key knows nothing of what our ops are made of
        compiled = torch.compile(function)(x)
    for got, want in zip(compiled, function(x), strict=True):
        assert torch.equal(got, want)
