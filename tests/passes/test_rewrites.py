"""Every rewrite on its own examples, and the adaLN and FFN patterns in every spelling of the field."""

import pytest
import torch
from torch.nn import functional as F

from viditq_fx.passes.base import Match
from viditq_fx.passes.fuse_activation_quantize import FuseActivationQuantize
from viditq_fx.passes.fuse_norm_quantize import FuseNormQuantize
from viditq_fx.passes.pattern import Rewrite
from viditq_fx.passes.pipeline import default_passes
from viditq_fx.testing import check_example, prepared, relative_error, targets

REWRITES = [step for step in default_passes() if isinstance(step, Rewrite)]
EXAMPLES = [(rewrite, example) for rewrite in REWRITES for example in rewrite.examples]
K = 64


@pytest.mark.parametrize(("rewrite", "example"), EXAMPLES, ids=[f"{r.name}: {e.label}" for r, e in EXAMPLES])
def test_example(rewrite, example):
    """Match count, reason, same numbers, nothing left for a second run, invariants."""
    check_example(rewrite, example)


@pytest.mark.parametrize("rewrite", REWRITES, ids=lambda rewrite: rewrite.name)
def test_every_rewrite_has_examples_of_both_kinds(rewrite):
    assert {bool(example.matches) for example in rewrite.examples} == {True, False}


def linears(program, *inputs):
    """The graph of a program whose linears are integer linears."""
    return prepared(program, *inputs, upto="fuse_norm_quantize")


def rms(x, weight=None):
    value = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
    return value if weight is None else value * weight


# program, shapes of what it takes besides x [2, 20, K], what the report says
ADALN = {
    "operands turned": (lambda x, s, b: b[:, None] + (s[:, None] + 1) * F.layer_norm(x, (K,)), [(2, K)] * 2),
    "chunk of six": (
        lambda x, m: F.layer_norm(x, (K,)) * (1 + m.chunk(6, 1)[1][:, None]) + m.chunk(6, 1)[0][:, None],
        [(2, 6 * K)],
    ),
    "split": (
        lambda x, m: (
            F.layer_norm(x, (K,)) * (1 + torch.split(m, K, dim=1)[1].unsqueeze(1))
            + torch.split(m, K, dim=1)[0].unsqueeze(1)
        ),
        [(2, 3 * K)],
    ),
    "indexed table": (
        lambda x, t, e: F.layer_norm(x, (K,)) * (1 + (t[None] + e)[:, 1:2]) + (t[None] + e)[:, 0:1],
        [(6, K), (2, 6, K)],
    ),
    "per token": (
        lambda x, m: F.layer_norm(x, (K,)) * (1 + m[:, :, 0]) + m[:, :, 1],
        [(2, 20, 6, K)],
    ),
    "cast to fp32 and back": (
        lambda x, s, b: (F.layer_norm(x.float(), (K,)) * (1 + s[:, None]) + b[:, None]).type_as(x),
        [(2, K)] * 2,
    ),
    "affine norm": (
        lambda x, w, c, s, b: F.layer_norm(x, (K,), w, c, eps=1e-6) * (1 + s[:, None]) + b[:, None],
        [(K,), (K,), (2, K), (2, K)],
    ),
    "methods": (
        lambda x, s, b: F.layer_norm(input=x, normalized_shape=[K]).mul(s[:, None].add(1)).add(b[:, None]),
        [(2, K)] * 2,
    ),
    "dropout in eval": (
        lambda x, s, b: F.dropout(F.layer_norm(x, (K,)) * (1 + s[:, None]) + b[:, None], 0.1, False),
        [(2, K)] * 2,
    ),
    "rms called": (
        lambda x, w, s, b: F.rms_norm(x, (K,), w, 1e-6) * (1 + s[:, None]) + b[:, None],
        [(K,), (2, K), (2, K)],
    ),
    "rms spelled, scale only": (lambda x, s: rms(x) * (1 + s[:, None]), [(2, K)]),
    "rms spelled, affine": (lambda x, w, s: rms(x, w) * (1 + s[:, None]), [(K,), (2, K)]),
    "whole factor": (lambda x, s: rms(x) * s[:, None], [(2, K)]),
}
NAMES = {"rms": "rms_norm+modulate"}


def drawn(shapes, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=gen) for shape in shapes)


@pytest.mark.parametrize("name", ADALN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adaln_in_every_spelling(name, dtype):
    program, shapes = ADALN[name]
    inputs = tuple(t.to(dtype) for t in drawn([(2, 20, K), *shapes, (K, K)]))
    graph = linears(lambda x, *rest: F.linear(program(x, *rest[:-1]).to(x.dtype), rest[-1]), *inputs)
    (before,) = graph.run()
    (result,) = FuseNormQuantize().run(graph.gm, graph.ctx)
    assert isinstance(result, Match), result
    rms_or_layer = "rms_norm" if name.startswith("rms") or name == "whole factor" else "layer_norm"
    assert graph.ctx.report.sites[0].prologue == f"{rms_or_layer}+modulate"
    assert not {"layer_norm", "rms_norm", "rsqrt", "quantize_per_token"} & set(targets(graph.gm))
    (after,) = graph.run()
    assert after.dtype == before.dtype == dtype
    # bf16 loses the roundings between norm, scale, shift and quantize.
    assert relative_error(after, before) < (1e-5 if dtype == torch.float32 else 2e-2)


FFN = {
    "gelu": (lambda x: F.gelu(x), K),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), K),
    "silu": (lambda x: x * torch.sigmoid(x), K),
    "relu_squared": (lambda x: F.relu(x) ** 2, K),
    "silu*gate": (lambda x: x[..., K:] * F.silu(x[..., :K]), 2 * K),
    "gelu*gate": (lambda x: x.split(K, -1)[0] * F.gelu(x.split(K, -1)[1]), 2 * K),
    "gelu_tanh*gate": (lambda x: F.gelu(x.chunk(2, -1)[0], approximate="tanh").mul(x.chunk(2, -1)[1]), 2 * K),
}


@pytest.mark.parametrize("name", FFN)
def test_feed_forward_in_every_spelling(name):
    program, width = FFN[name]
    inputs = drawn([(2, 20, width), (K, K)])
    graph = linears(lambda x, w: F.linear(program(x), w), *inputs)
    (before,) = graph.run()
    (result,) = FuseActivationQuantize().run(graph.gm, graph.ctx)
    assert isinstance(result, Match), result
    assert graph.ctx.report.sites[0].prologue == name
    assert relative_error(graph.run()[0], before) < 1e-5


REFUSED = {
    "the norm read unquantized": (lambda x, w: F.linear(F.layer_norm(x, (K,)), w) + F.layer_norm(x, (K,)), 1),
    "scale makes it larger": (lambda x, w: F.linear(F.layer_norm(x, (K,)) * x.new_ones(3, 1, 1, K), w), 0),
    "scaled by a number": (lambda x, w: F.linear(F.layer_norm(x, (K,)) * 3.0, w), 0),
    "normalised over two dimensions": (lambda x, w: F.linear(F.layer_norm(x, (20, K)), w), 0),
    "rounded to integers": (lambda x, w: F.linear(F.layer_norm(x, (K,)).to(torch.int32).float(), w), 0),
    "rounded to fp8": (
        lambda x, w: F.linear(F.layer_norm(x, (K,)).to(torch.float8_e4m3fn).to(x.dtype), w),
        0,
    ),
    "its bits read": (lambda x, w: F.linear(F.layer_norm(x, (K,)).view(torch.int32).float(), w), 0),
    "a mean over tokens": (
        lambda x, w: F.linear(x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6), w),
        0,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_looks_like_adaln_keeps_its_numbers(name):
    program, matches = REFUSED[name]
    inputs = drawn([(2, 20, K), (K, K)])
    graph = linears(program, *inputs)
    (before,) = graph.run()
    results = FuseNormQuantize().run(graph.gm, graph.ctx)
    assert sum(isinstance(r, Match) for r in results) == matches
    assert relative_error(graph.run()[0], before) < 1e-5


def test_a_value_written_in_place_is_refused():
    def program(x, w):
        h = F.layer_norm(x, (K,))
        h[:, 0] = 3.0
        return F.linear(h * 2.0, w) + F.linear(h.to(x.dtype), w)

    inputs = drawn([(2, 20, K), (K, K)])
    graph = linears(program, *inputs)
    (before,) = graph.run()
    assert not [r for r in FuseNormQuantize().run(graph.gm, graph.ctx) if isinstance(r, Match)]
    assert torch.equal(graph.run()[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_rms_norm_without_eps_takes_the_eps_that_torch_takes(dtype):
    """Of small values: eps is as large as their squares where it is taken for that of the half-precision type."""
    x, w = drawn([(2, 20, K), (K, K)])
    graph = linears(lambda x, w: F.linear(F.rms_norm(x, (K,)), w), (0.05 * x).to(dtype), w.to(dtype))
    (before,) = graph.run()
    (result,) = FuseNormQuantize().run(graph.gm, graph.ctx)
    assert isinstance(result, Match)
    assert relative_error(graph.run()[0], before) < (1e-5 if dtype == torch.float32 else 2e-2)
