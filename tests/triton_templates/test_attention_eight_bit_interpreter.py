"""The attention kernel with P V in e4m3 and in int8, run by Triton's interpreter: what it is to compute, to the bit of
a rounding; close to attention itself.

`emulated` does in fp64 and in plain torch what the kernel does tile after tile of keys, so that a wrong order of keys,
scale or maximum shows, which errors of roundings would hide.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from viditq_fx.ops import ATTENTION_INT8_FP8, ATTENTION_INT8_INT8
from viditq_fx.ops.attention import BLOCK_K, BLOCK_Q, quantize_queries_and_keys, spread
from viditq_fx.ops.attention_eight_bit import spread_of_values, token_scale, values_to_fp8, values_to_int8

pytest.importorskip("triton", reason="the kernel is a Triton kernel and Triton is not installed")

from nogpu.interpreter import run_interpreted

from viditq_fx.triton_templates.attention_int8 import columns
from viditq_fx.triton_templates.attention_tiles import AttentionConfig

OPS = {"fp8": ATTENTION_INT8_FP8, "int8": ATTENTION_INT8_INT8}
NEVER = torch.zeros(5, 70, dtype=torch.bool)
NEVER[1:, ::3] = True  # row 0 may look at nothing


def drawn(q, kv=None, dtype=torch.float32, scale=1.0, value=None, odd=lambda v: v):
    gen = torch.Generator().manual_seed(sum(q))
    kv = kv or q
    q, k, v = (torch.randn(shape, generator=gen) for shape in (q, kv, (*kv[:-1], value or kv[-1])))
    return tuple(t.to(dtype) for t in (q * scale, k * scale, odd(v)))


def case(q, kv=None, *, mask=None, causal=False, factor=None, gqa=False, tile=(64, 64), **draw):
    m, n = tile
    config = AttentionConfig(block_m=m, block_n=n, num_stages=1, num_warps=4)
    return (*drawn(q, kv, **draw), mask, causal, factor, gqa), config


def uneven(v):
    """A channel of zeros, one of 1e4, one that lies far from zero, and a token of 50 times the others."""
    v[..., 9, :] *= 50
    v[..., 0], v[..., 1], v[..., 2] = 0, v[..., 1] * 1e4, v[..., 2] + 300
    return v


SHAPES = {
    "whole-tiles": case((1, 2, 128, 64)),
    "ragged": case((2, 1, 77, 64), (2, 1, 133, 64)),
    "one-token": case((1, 1, 1, 32), (1, 1, 1, 32)),
    "one-query": case((1, 2, 1, 32), (1, 2, 200, 32)),
    "head-40": case((1, 1, 50, 40)),
    "head-72": case((1, 2, 70, 72)),
    "head-128": case((1, 1, 40, 128), (1, 1, 300, 128), tile=(64, 128)),
    "head-256": case((1, 1, 40, 256), tile=(32, 32)),
    "value-of-another-width": case((1, 2, 33, 32), value=48),
    "causal": case((1, 1, 150, 32), causal=True),
    "causal-more-keys": case((1, 1, 70, 32), (1, 1, 200, 32), causal=True, tile=(32, 64)),
    "causal-fewer-keys": case((1, 1, 200, 32), (1, 1, 70, 32), causal=True, tile=(64, 32)),
    "bool-mask-with-a-row-of-nothing": case((2, 2, 5, 32), (2, 2, 70, 32), mask=NEVER, tile=(32, 32)),
    "bool-mask-broadcast": case(
        (2, 2, 5, 32), (2, 2, 70, 32), mask=(torch.arange(70) > 66)[None, None, None]
    ),
    "additive-mask": case((2, 2, 65, 32), mask=torch.linspace(-9, 9, 65 * 65).reshape(65, 65)),
    "masked-with-infinity": case((1, 1, 65, 32), mask=torch.full((65, 65), float("-inf")).triu(1)),
    "gqa": case((1, 4, 40, 32), (1, 2, 70, 32), gqa=True),
    "scale": case((1, 1, 64, 32), factor=0.3),
    "scores-of-1e4": case((1, 1, 70, 64), scale=100.0),
    "uneven-values": case((1, 2, 70, 64), (1, 2, 100, 64), odd=uneven),
    "bf16": case((1, 2, 100, 64), dtype=torch.bfloat16),
    "fp16-at-its-limit": case((1, 2, 100, 64), dtype=torch.float16, odd=lambda v: v.sign() * 65504),
    "three-dimensions": case((3, 40, 32)),
}
CASES = {f"{values}-{label}": (*case, values) for values in OPS for label, case in SHAPES.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    found = run_interpreted("nogpu.interpret_attention", list(CASES.values()), tmp_path_factory.mktemp("run"))
    return dict(zip(CASES, found, strict=True))


def scores(q, k, mask, causal, factor):
    """As the kernel has them, in fp64; of queries and keys of as many heads."""
    q_int, s_q, k_int, s_k = quantize_queries_and_keys(q, k)
    s = (q_int.double() @ k_int.double().mT) * spread(s_q, BLOCK_Q, q.shape[-2]).double()
    s = s * spread(s_k, BLOCK_K, k.shape[-2]).double().mT * (factor or q.shape[-1] ** -0.5)
    if causal:
        mask = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else s + mask
    return s


def emulated(args, config, values):
    q, k, v, mask, causal, factor, gqa = args
    k, v = ((t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) if gqa else t) for t in (k, v))
    s = scores(q, k, mask, causal, factor)
    mean, far = spread_of_values(v)
    token = (
        token_scale(v, mean, far) if values == "int8" else torch.ones_like(v[..., :1], dtype=torch.float32)
    )
    v8 = values_to_fp8(v, mean, far) if values == "fp8" else values_to_int8(v, mean, far, token)
    v8 = v8.double() * (token.double() / 127 if values == "int8" else 1 / 448) / token.double()
    s = s + token.double().log().mT
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    top, total = (torch.full((*q.shape[:-1], 1), x, dtype=torch.float64) for x in (-math.inf, 0))
    for start in range(0, k.shape[-2], config.block_n):
        part, keys = s[..., start : start + config.block_n], slice(start, start + config.block_n)
        block = part.amax(-1, keepdim=True)
        ahead = torch.maximum(top, block)
        safe = ahead.nan_to_num(neginf=0.0)
        p = (part - safe).exp()
        if values == "fp8":
            p8 = (p * 256).float().to(torch.float8_e4m3fn).double() / 256
        else:
            level = (block - safe).exp().clamp(min=1e-300)
            p8 = (p / level * 127).round() / 127 * level
        shrink = (top - safe).exp()
        out = out * shrink + p8 @ v8[..., keys, :]
        total = total * shrink + (p / token.double().mT[..., keys]).sum(-1, keepdim=True)
        top = ahead
    seen = total > 0
    return torch.where(
        seen, out / total.where(seen, torch.ones_like(total)) * far.double() + mean.double(), 0.0
    )


@pytest.mark.parametrize("label", CASES)
def test_does_what_it_is_to_do_tile_after_tile(results, label):
    """But for single roundings of P that fp32 puts on the other side: a sixteenth (e4m3) or a 127th of one p."""
    args, config, values = CASES[label]
    want, (got, lse) = emulated(args, config, values), results[label]
    assert got.shape == want.shape
    assert got.isfinite().all()
    assert lse.shape == want.shape[:-1]
    assert not lse.isnan().any()
    size = want.abs().amax((-2, -3), keepdim=True).clamp(min=1e-30)
    difference = ((got.double() - want) / size).abs()
    rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[got.dtype]
    # A score of 1e4 has an ulp of 1e-3, which is what its probability is off by.
    mean = 1e-3 if label.endswith("scores-of-1e4") else 3e-4
    assert difference.mean() < mean + rounding, difference.mean()
    assert difference.max() < 2e-2 + rounding, difference.max()


@pytest.mark.parametrize("label", [name for name in CASES if not name.endswith("scores-of-1e4")])
def test_equals_the_reference(results, label):
    args, _, values = CASES[label]
    want = OPS[values].reference(*args)
    got = results[label][0].float()
    tolerance = OPS[values].tolerances[want.dtype]
    size = want.float().abs().amax((-2, -3), keepdim=True).clamp(min=1.0)
    torch.testing.assert_close(got / size, want.float() / size, rtol=tolerance.rtol, atol=tolerance.atol)


@pytest.mark.parametrize("values", OPS)
@pytest.mark.parametrize("label", ["ragged", "causal", "additive-mask", "bf16", "uneven-values"])
def test_log_sum_exp_is_that_of_attention(results, values, label):
    (q, k, _, mask, causal, _, _), _ = SHAPES[label]
    s = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    if mask is not None:
        s = s + mask
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    assert (results[f"{values}-{label}"][1] - s.logsumexp(-1)).abs().max() < 0.02


@pytest.mark.parametrize("values", OPS)
@pytest.mark.parametrize("label", ["whole-tiles", "head-128", "head-256", "gqa", "bf16"])
def test_close_to_attention_itself(results, values, label):
    (q, k, v, *_), _ = SHAPES[label]
    want = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), enable_gqa=label == "gqa")
    got = results[f"{values}-{label}"][0].double()
    assert F.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.999
    assert (got - want).abs().sum() / want.abs().sum() < {"fp8": 0.042, "int8": 0.03}[values]


@pytest.mark.parametrize("length", [1, 16, 37])
def test_columns_are_the_keys_in_another_order(length):
    v = torch.randn(2, 3, length, 5)
    got = columns(v)
    order = [8 * h + 2 * t + j for t in range(4) for h in range(2) for j in range(2)]
    assert sorted(order) == list(range(16))
    padded = F.pad(v, (0, 0, 0, -length % 16))
    places = [16 * (n // 16) + order[n % 16] for n in range(padded.shape[-2])]
    assert torch.equal(got, padded[..., places, :].mT)
