"""The attention kernel, run by Triton's interpreter, equals the op's reference."""

import pytest
import torch
from torch.nn import functional as F

from viditq_fx.ops import ATTENTION_INT8

pytest.importorskip("triton", reason="the kernel is a Triton kernel and Triton is not installed")

from nogpu.interpreter import run_interpreted

from viditq_fx.triton_templates.attention_tiles import AttentionConfig

pytestmark = pytest.mark.slow  # a subprocess imports torch and Triton anew for each file

NEVER = torch.zeros(5, 70, dtype=torch.bool)
NEVER[1:, ::3] = True  # row 0 may look at nothing


def drawn(q, kv=None, dtype=torch.float32, scale=1.0, value=None):
    gen = torch.Generator().manual_seed(sum(q))
    kv = kv or q
    shapes = (q, kv, (*kv[:-1], value or kv[-1]))
    return tuple((scale * torch.randn(shape, generator=gen)).to(dtype) for shape in shapes)


def case(q, kv=None, *, mask=None, causal=False, factor=None, gqa=False, tile=(64, 64), **draw):
    m, n = tile
    config = AttentionConfig(block_m=m, block_n=n, num_stages=1, num_warps=4)
    return (*drawn(q, kv, **draw), mask, causal, factor, gqa), config


CASES = {
    "whole-tiles": case((1, 2, 128, 64)),
    "ragged": case((2, 1, 77, 64), (2, 1, 133, 64)),
    "one-token": case((1, 1, 1, 32), (1, 1, 1, 32)),
    "one-query": case((1, 2, 1, 32), (1, 2, 200, 32)),
    "head-40": case((1, 1, 50, 40)),
    "head-72": case((1, 2, 70, 72)),
    "head-256": case((1, 1, 40, 256), tile=(32, 32)),
    "value-of-another-width": case((1, 2, 33, 32), value=48),
    "causal": case((1, 1, 150, 32), causal=True),
    "causal-more-keys": case((1, 1, 70, 32), (1, 1, 200, 32), causal=True, tile=(32, 64)),
    "causal-fewer-keys": case((1, 1, 200, 32), (1, 1, 70, 32), causal=True, tile=(64, 32)),
    "bool-mask-with-a-row-of-nothing": case((2, 2, 5, 32), (2, 2, 70, 32), mask=NEVER),
    "bool-mask-broadcast": case((2, 2, 5, 32), (2, 2, 70, 32), mask=(torch.arange(70) < 9)[None, None, None]),
    "additive-mask": case((2, 2, 65, 32), mask=torch.linspace(-9, 9, 65 * 65).reshape(65, 65)),
    "masked-with-infinity": case((1, 1, 65, 32), mask=torch.full((65, 65), float("-inf")).triu(1)),
    "gqa": case((1, 4, 40, 32), (1, 2, 70, 32), gqa=True),
    "scale": case((1, 1, 64, 32), factor=0.3),
    "scores-of-1e4": case((1, 1, 70, 64), scale=100.0),
    "bf16": case((1, 2, 100, 64), dtype=torch.bfloat16),
    "fp16": case((1, 2, 100, 64), dtype=torch.float16),
    "three-dimensions": case((3, 40, 32)),
    "five-dimensions": case((2, 1, 2, 40, 32)),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interpret")
    payload = [(*case, "16 bits") for case in CASES.values()]
    return dict(zip(CASES, run_interpreted("nogpu.interpret_attention", payload, folder), strict=True))


@pytest.mark.parametrize("label", CASES)
def test_equals_the_reference(results, label):
    args, _ = CASES[label]
    want = ATTENTION_INT8.reference(*args)
    got, lse = results[label]
    tolerance = ATTENTION_INT8.tolerances[want.dtype]
    assert got.shape == want.shape
    assert got.isfinite().all()
    # A score of 1e4 has an ulp of 1e-3, which is what its probability is off by.
    worse = 500 if label == "scores-of-1e4" else 1
    torch.testing.assert_close(got, want, rtol=worse * tolerance.rtol, atol=worse * tolerance.atol)
    assert lse.shape == want.shape[:-1]
    assert not lse.isnan().any()


@pytest.mark.parametrize("label", ["ragged", "causal", "additive-mask", "bf16"])
def test_log_sum_exp_is_that_of_attention(results, label):
    """Against fp64 of the unquantized operands: int8 scores are off by a hundredth; K's mean is put back."""
    (q, k, _, mask, causal, _, _), _ = CASES[label]
    scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    assert (results[label][1] - scores.logsumexp(-1)).abs().max() < 0.02


@pytest.mark.parametrize("label", ["whole-tiles", "head-72", "gqa", "bf16"])
def test_close_to_attention_itself(results, label):
    (q, k, v, *_), _ = CASES[label]
    want = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), enable_gqa=label == "gqa")
    got = results[label][0].double()
    assert F.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.999
    assert (got - want).abs().sum() / want.abs().sum() < 0.03
