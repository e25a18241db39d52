"""The balance of channels is folded into adaLN where that saves work, to the same numbers; elsewhere it says why."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import viditq_fx as vq
from viditq_fx import ops
from viditq_fx.graph_edit import example
from viditq_fx.passes.base import Match, Reject
from viditq_fx.passes.effects import op_name
from viditq_fx.passes.fold_balance import FoldBalance, multiplier_of
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.passes.verify import verify
from viditq_fx.testing import prepared, relative_error, targets

K = 64
NAMES = [step.name for step in default_passes()]
AFTER = default_passes()[NAMES.index("fold_balance") + 1 : NAMES.index("fuse_shared_input")]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def drawn(*shapes, seed=0, dtype=FP32):
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=gen).to(dtype) for shape in shapes)


def multipliers(seed=0, width=K, spread=2.0, signs=True):
    """1 / s over `spread` octaves either way, as calibration finds for channels that differ."""
    gen = torch.Generator().manual_seed(seed)
    values = 2.0 ** ((torch.rand(width, generator=gen) * 2 - 1) * spread)
    return values * (torch.randint(0, 2, (width,), generator=gen) * 2.0 - 1.0) if signs else values


def plan(scheme="w8a8", values=None, rotation=1):
    parsed = vq.QuantScheme.parse(scheme)
    return vq.SitePlan(
        scheme=parsed,
        multiplier=multipliers() if values is None else values,
        rotation=rotation,
        input_scale=torch.tensor(0.05) if parsed.calibrated else None,
    )


def recipe(*args, **named):
    """Of the linears of a function; or, by name, of those of a module."""
    sites = named or {"": args[0] if args else plan()}
    return vq.Recipe(scheme=next(iter(sites.values())).scheme, sites=sites)


class Programs(nn.Module):
    """A function of x and the tensors held, read by linears of these names."""

    def __init__(self, program, names, held=(), dtype=FP32):
        super().__init__()
        torch.manual_seed(3)
        for name in names:
            self.add_module(name, nn.Linear(K, K, bias=False, dtype=dtype))
        self.program, self.linears = program, names
        self.held = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in held)

    def forward(self, x):
        return self.program(
            x, *(getattr(self, n) for n in self.linears), *(self.held[i] for i in range(len(self.held)))
        )


def folded(program, *inputs, plans):
    """(graph, results of the pass) of a program, with the numbers checked."""
    graph = prepared(program, *inputs, upto="fold_balance", recipe=plans)
    before = graph.run()
    results = FoldBalance().run(graph.gm, graph.ctx)
    verify(graph.gm, graph.ctx, after="fold_balance")
    for got, want in zip(graph.run(), before, strict=True):
        assert relative_error(got, want) < 0.02
    return graph, results


def call_of(graph, name):
    """The nodes of a graph that call this."""
    return [node for node in graph.gm.graph.nodes if op_name(node) == name]


def adaln(x, w, scale, shift):
    return F.linear(F.layer_norm(x, (K,)) * (1 + scale[:, None]) + shift[:, None], w)


ADALN = ((2, 20, K), (K, K), (2, K), (2, K))


def test_adaln_becomes_one_op_whose_vectors_are_balanced():
    """Before: norm, adaLN, multiply, quantize. After: vectors multiplied, and one op for all the rest."""
    graph, (result,) = folded(adaln, *drawn(*ADALN), plans=recipe())
    assert isinstance(result, Match)
    made = targets(graph.gm)
    assert made[made.index("layer_norm") :][:3] == ["layer_norm", "add", "mul"]
    assert [node for node in graph.gm.graph.nodes if multiplier_of(node)] == []
    PassPipeline(passes=AFTER).run(graph.gm, graph.ctx)
    (fused,) = call_of(graph, "norm_modulate_quantize")
    _, _, weight, bias, _, scale, offset, shift, _ = fused.args
    assert (weight, bias, offset) == (None, None, 0.0)
    assert [tuple(example(v).shape) for v in (scale, shift)] == [(2, 1, K)] * 2
    (site,) = graph.ctx.report.sites
    assert (site.prologue, site.unfused) == ("layer_norm+modulate", None)


def test_without_the_pass_it_is_told_as_unfused():
    graph = prepared(adaln, *drawn(*ADALN), upto="fold_balance", recipe=recipe())
    PassPipeline(passes=AFTER).run(graph.gm, graph.ctx)
    assert graph.ctx.report.sites[0].prologue is None
    assert "not fused" in str(graph.ctx.report.sites[0].unfused)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_rotation_reads_what_is_balanced_already_as_wide_as_before(dtype):
    graph, (result,) = folded(adaln, *drawn(*ADALN, dtype=dtype), plans=recipe(plan("w8a8-rot", rotation=16)))
    assert isinstance(result, Match)
    (rotation,) = call_of(graph, "rotate_quantize")
    x, multiplier, block, *_ = rotation.args
    assert (multiplier, block, example(x).dtype) == (None, 16, dtype)
    assert ops.TRANSFORM_WEIGHT.overload in {node.target for node in graph.gm.graph.nodes}  # still has 1 / m


def spelled_rms(x, weight=None):
    value = x * torch.rsqrt(x.to(FP32).pow(2).mean(-1, keepdim=True) + 1e-6)
    return value if weight is None else value * weight


MODULATIONS = {
    "scale and shift": lambda n, s, b: n * (1 + s) + b,
    "turned": lambda n, s, b: b + (s + 1) * n,
    "scale": lambda n, s, b: n * (1 + s),
    "factor and shift": lambda n, s, b: torch.add(n.mul(s), b),
    "factor": lambda n, s, b: s * n,
    "shift": lambda n, s, b: n + b,
    "a number and shift": lambda n, s, b: n * 3.0 + b,
    "none": lambda n, s, b: n,
}
NORMALIZED = {
    "layer": lambda x, w, c: F.layer_norm(x, (K,)),
    "layer, affine": lambda x, w, c: F.layer_norm(x, (K,), w, c),
    "layer in fp32": lambda x, w, c: F.layer_norm(x.float(), (K,)).type_as(x),
    "rms, affine": lambda x, w, c: F.rms_norm(x, (K,), w, 1e-6),
    "rms spelled": lambda x, w, c: spelled_rms(x).type_as(x),
    "rms spelled, affine": lambda x, w, c: spelled_rms(x, w).type_as(x),
}
VECTORS = {
    "all": lambda v: v[0],
    "sample": lambda v: v[:2, None],
    "frame": lambda v: v.view(2, 4, K).repeat_interleave(5, 1)[:, :1],
}


@settings(max_examples=20, deadline=None, phases=(Phase.generate,))  # to shrink takes minutes, of captures
@given(
    norm=st.sampled_from(sorted(NORMALIZED)),
    modulation=st.sampled_from(sorted(MODULATIONS)),
    vector=st.sampled_from(sorted(VECTORS)),
    scheme=st.sampled_from(
        ["w8a8", "w8a8-rot", "w4a8-static", "w4a8-rot-static", "w4a4-block", "w6a6-asym-rot"]
    ),
    dtype=st.sampled_from([FP32, BF16, FP16]),
    signs=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_modulation_of_every_norm_gives_the_same_numbers(
    norm, modulation, vector, scheme, dtype, signs, seed
):
    def program(x, w, weight, bias, scale, shift):
        value = MODULATIONS[modulation](
            NORMALIZED[norm](x, weight, bias), VECTORS[vector](scale), VECTORS[vector](shift)
        )
        return F.linear(value.to(x.dtype), w)

    shapes = ((2, 20, K), (K, K), (K,), (K,), (8, K), (8, K))
    planned = plan(scheme, multipliers(seed, signs=signs), 16 if "rot" in scheme else 1)
    inputs = drawn(*shapes, seed=seed, dtype=dtype)
    graph = prepared(program, *inputs, upto="fold_balance", recipe=recipe(planned))
    (before,) = graph.run()
    exact = program(*(t.float() for t in inputs))
    results = FoldBalance().run(graph.gm, graph.ctx)
    # A plain norm's product with m is what a fused norm takes already.
    needless = modulation == "none" and scheme == "w8a8" and norm != "rms spelled, affine"
    kind = Reject if dtype == FP16 and scheme not in ("w8a8", "w4a8-static") else Match
    assert [type(result) for result in results] == ([] if needless else [kind]), results
    PassPipeline(passes=AFTER).run(graph.gm, graph.ctx)
    if scheme == "w8a8":
        assert graph.ctx.report.sites[0].prologue, graph.ctx.report.sites[0].unfused
    (after,) = graph.run()
    assert after.dtype == before.dtype == dtype
    # Half precision rounds elsewhere than before, and integers of few bits flip: neither way is worse.
    assert relative_error(after, exact) < 1.1 * relative_error(before, exact)
    assert dtype != FP32 or relative_error(after, before) < 10 ** (-45 / 20)


def test_all_that_share_a_value_and_its_balance_are_folded_at_once():
    """Linears of a -static scheme each rotate for themselves, and of other bits each quantize for themselves."""
    kinds = {"q": "w8a8-static", "k": "w4a8-static", "v": "w8a8", "up": "w8a7"}
    rotations = {"q": 16, "k": 1, "v": 1, "up": 16}
    plans = recipe(**{n: plan(kinds[n], multipliers(), rotations[n]) for n in kinds})

    def program(x, q, k, v, up, scale, shift):
        h = F.layer_norm(x, (K,)) * (1 + scale) + shift
        return tuple(linear(h) for linear in (q, k, v, up))

    module = Programs(program, tuple(kinds), drawn((K,), (K,)))
    graph, results = folded(module, *drawn((2, 20, K)), plans=plans)
    assert len(results) == 1
    assert isinstance(results[0], Match)
    assert not any(multiplier_of(node) for node in graph.gm.graph.nodes)
    assert targets(graph.gm).count("rotate") == 1  # that which rotates nothing is gone


def test_a_norm_that_is_modulated_twice_is_folded_twice():
    """As in two streams behind one norm: it stays for both, and each rotation reads its own."""
    plans = recipe(q=plan("w8a8-rot", multipliers(1), 16), up=plan("w8a8-rot", multipliers(2), 16))

    def program(x, q, up, s, t):
        n = F.layer_norm(x, (K,))
        return q(n * (1 + s) + t), up(n * (1 + t) + s)

    graph, results = folded(
        Programs(program, ("q", "up"), drawn((K,), (K,))), *drawn((2, 20, K)), plans=plans
    )
    assert [type(result) for result in results] == [Match, Match]
    assert targets(graph.gm).count("layer_norm") == 1


def test_vectors_are_multiplied_in_fp32():
    """In bf16 their products alone would be off by more than the whole quantization of the input to 8 bits is."""
    inputs = drawn(*ADALN, dtype=BF16)
    graph, _ = folded(adaln, *inputs, plans=recipe())
    PassPipeline(passes=AFTER).run(graph.gm, graph.ctx)
    (fused,) = call_of(graph, "norm_modulate_quantize")
    assert {example(fused.args[index]).dtype for index in (5, 7)} == {FP32}
    x, _, scale, shift = (t.double() for t in inputs)
    m, n = multipliers().double(), F.layer_norm(x, (K,))
    vectors = (1 + scale[:, None]) * m, shift[:, None] * m
    want = n * vectors[0] + vectors[1]

    def error(dtype):
        factor, shifted = (v.to(dtype).double() for v in vectors)
        return relative_error(n * factor + shifted, want)

    assert error(FP32) < 1e-6
    assert error(BF16) > 1e-3


def elsewhere(x, q, s):
    h = F.layer_norm(x, (K,)) * (1 + s)
    return q(h) + h


def norm_elsewhere(x, q, s):
    h = F.layer_norm(x, (K,))
    return q(h) + h * s


def other_balance(x, q, up, s):
    h = F.layer_norm(x, (K,)) * (1 + s)
    return q(h), up(h)


def by_token(x, q, s):
    return q(F.layer_norm(x, (K,)) + s.expand(x.shape[0], x.shape[1], K).sin())


def written(x, q, s):
    t = s * 1.0
    h = F.layer_norm(x, (K,)) * t
    t.mul_(2.0)
    return q(h)


REFUSED = {
    "read unbalanced": (elsewhere, {"q": plan()}, "also read by"),
    "a norm read unbalanced": (norm_elsewhere, {"q": plan("w8a8-rot", rotation=16)}, "also read by"),
    "by another multiplier": (
        other_balance,
        {"q": plan(), "up": plan(values=multipliers(5))},
        "also read by",
    ),
    "by a low-rank branch": (
        lambda x, q, s: q(F.layer_norm(x, (K,)) * (1 + s)),
        {"q": plan("w4a4-bgr-svd16")},
        "also read by add_low_rank",
    ),
    "by token": (by_token, {"q": plan()}, "shift has as many numbers"),
    "written in place": (written, {"q": plan()}, "may be written in place by mul_"),
    "in fp16 for a rotation": (
        lambda x, q, s: q(F.layer_norm(x, (K,)) * (1 + s)),
        {"q": plan("w8a8-rot", torch.full((K,), 300.0), 16)},
        "would be balanced in fp16",
    ),
    "by a number a token": (
        lambda x, q, s: q(F.layer_norm(x, (K,)) * (1 + x[..., :1])),
        {"q": plan()},
        "scale has as many numbers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_a_multiplication_says_why(name):
    program, plans, reason = REFUSED[name]
    dtype = FP16 if "fp16" in name else FP32
    module = Programs(program, tuple(plans), drawn((K,), dtype=dtype), dtype)
    graph = prepared(module, *drawn((2, 20, K), dtype=dtype), upto="fold_balance", recipe=recipe(**plans))
    nodes, before = targets(graph.gm), graph.run()
    results = FoldBalance().run(graph.gm, graph.ctx)
    assert results
    assert all(isinstance(r, Reject) and reason in r.reason for r in results), results
    assert {r.site.fqn for r in results} == set(plans)
    assert targets(graph.gm) == nodes
    PassPipeline(passes=AFTER).run(graph.gm, graph.ctx)
    for got, want in zip(graph.run(), before, strict=True):
        assert relative_error(got, want) < 1e-5
    entries = [site for site in graph.ctx.report.sites if site.planned == "w8a8"]
    assert all(reason in site.unfused for site in entries), entries


def test_what_no_norm_makes_is_left_in_silence():
    """An attention's result is balanced where it is quantized: nothing upstream is modulated."""

    def program(x, q):
        return q(torch.softmax(x, -1))

    graph = prepared(
        Programs(program, ("q",)), *drawn((2, 20, K)), upto="fold_balance", recipe=recipe(q=plan())
    )
    assert FoldBalance().run(graph.gm, graph.ctx) == ()
