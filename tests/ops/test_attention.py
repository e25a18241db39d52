"""int8 attention against fp64 attention: shapes, masks, dtypes, rows that see nothing, wide values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from viditq_fx.ops.attention import BLOCK_K, BLOCK_Q, attention_int8, quantize_per_block, spread

MIN_COSINE, MAX_RELATIVE_L1 = 0.999, 0.03


def drawn(seed, *shapes, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=gen).to(dtype) for shape in shapes]


def exact(q, k, v, **options):
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)


def assert_close(got, want):
    got, want = got.double().flatten(), want.double().flatten()
    assert got.isfinite().all()
    assert F.cosine_similarity(got, want, dim=0) >= MIN_COSINE
    assert (got - want).abs().sum() / want.abs().sum() <= MAX_RELATIVE_L1


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2)]),
    queries=st.integers(1, 300),
    keys=st.integers(1, 200),
    width=st.sampled_from([8, 40, 64, 72, 128, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    mask=st.sampled_from([None, "bool", "additive", "causal"]),
    seed=st.integers(0, 1000),
)
def test_close_to_fp64(batch, heads, queries, keys, width, dtype, mask, seed):
    q, k, v = drawn(
        seed, (batch, heads[0], queries, width), *[(batch, heads[1], keys, width)] * 2, dtype=dtype
    )
    attn_mask = None
    if mask == "bool":
        attn_mask = drawn(seed, (batch, 1, 1, keys))[0] > -0.5
        attn_mask[..., 0] = True
    elif mask == "additive":
        attn_mask = drawn(seed, (1, heads[0], queries, keys))[0]
    causal, gqa = mask == "causal", heads[0] != heads[1]
    got = attention_int8(q, k, v, attn_mask, causal, None, gqa)
    exact_mask = attn_mask.double() if mask == "additive" else attn_mask
    want = exact(q, k, v, attn_mask=exact_mask, is_causal=causal, enable_gqa=gqa)
    assert got.dtype == dtype
    assert_close(got, want)


def test_a_row_that_sees_nothing_is_zero():
    q, k, v = drawn(0, *[(1, 2, 20, 32)] * 3)
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    mask[:, :, 3] = False
    got = attention_int8(q, k, v, mask, False, None, False)
    assert torch.equal(got[:, :, 3], torch.zeros(1, 2, 32))
    assert_close(got, exact(q, k, v, attn_mask=mask))


def test_keys_far_from_zero_lose_nothing():
    """What all keys share is subtracted: without that, int8 would spend its range on it."""
    q, k, v = drawn(0, *[(1, 2, 130, 64)] * 3)
    k = k + 100
    assert_close(attention_int8(q, k, v, None, False, None, False), exact(q, k, v))


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e4])
def test_scores_of_any_size_stay_finite(size):
    q, k, v = drawn(1, *[(1, 2, 70, 32)] * 3)
    assert attention_int8(q * size, k, v, None, False, None, False).isfinite().all()


def test_nan_stays_in_its_batch_and_zeros_are_zeros():
    q, k, v = drawn(2, *[(2, 2, 20, 32)] * 3)
    k[0, 0, 3, 3] = torch.nan
    got = attention_int8(q, k, v, None, False, None, False)
    assert got[0, 0].isnan().all()
    assert got[1].isfinite().all()
    assert got[0, 1].isfinite().all()
    zeros = torch.zeros(1, 1, 5, 8)
    assert torch.equal(attention_int8(zeros, zeros, zeros, None, False, None, False), zeros)


def test_no_tokens():
    q, k, v = drawn(2, (1, 2, 0, 32), (1, 2, 5, 32), (1, 2, 5, 32))
    assert attention_int8(q, k, v, None, False, None, False).shape == (1, 2, 0, 32)
    assert not attention_int8(k, q, q, None, False, None, False).any()


def test_scale_and_values_of_another_width():
    q, k, v = drawn(3, (1, 2, 30, 32), (1, 2, 40, 32), (1, 2, 40, 48))
    assert_close(attention_int8(q, k, v, None, False, 0.3, False), exact(q, k, v, scale=0.3))


@pytest.mark.parametrize("block", [BLOCK_Q, BLOCK_K])
@pytest.mark.parametrize("length", [1, 63, 128, 200])
def test_one_scale_a_block_and_error_of_half_a_step(block, length):
    (x,) = drawn(4, (2, length, 16))
    integers, scales = quantize_per_block(x, block)
    assert integers.dtype == torch.int8
    assert integers.abs().max() == 127
    assert scales.shape == (2, -(-length // block))
    scale = spread(scales, block, length)
    assert ((integers * scale - x).abs() <= 0.5001 * scale).all()


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(1, 2, 5, 32), (1, 2, 5, 16), (1, 2, 5, 16)], {}, "one D of q and k"),
        ([(1, 2, 5, 32), (1, 2, 5, 32), (1, 2, 6, 32)], {}, "one L of k and v"),
        ([(1, 2, 5, 512), (1, 2, 5, 512), (1, 2, 5, 32)], {}, "at most 256"),
        ([(1, 4, 5, 32), (1, 2, 5, 32), (1, 2, 5, 32)], {}, "needs enable_gqa"),
        ([(1, 3, 5, 32), (1, 2, 5, 32), (1, 2, 5, 32)], {"gqa": True}, "a multiple"),
        ([(1, 2, 5, 32)] * 3, {"causal": True, "mask": torch.ones(5, 5)}, "not both"),
    ],
)
def test_wrong_arguments_are_clear(shapes, options, message):
    q, k, v = drawn(0, *shapes)
    with pytest.raises(ValueError, match=message):
        attention_int8(
            q, k, v, options.get("mask"), options.get("causal", False), None, options.get("gqa", False)
        )
