"""A quantize moves above what only moves rows: the same bits, and only where a norm is then taken in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from viditq_fx.graph_edit import example
from viditq_fx.passes.base import Match, PassContext, Reject
from viditq_fx.passes.hoist_quantize import HoistQuantize
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.passes.verify import verify
from viditq_fx.scheme import QuantScheme
from viditq_fx.testing import as_module, capture, prepared, targets

K = 64
NAMES = [step.name for step in default_passes()]
BEFORE = default_passes()[: NAMES.index("hoist_quantize")]
AFTER = default_passes()[NAMES.index("hoist_quantize") + 1 : NAMES.index("fuse_shared_input")]


def drawn(*shapes, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=gen) for shape in shapes)


def norm(x):
    return F.layer_norm(x, (K,))


def hoisted(program, *inputs):
    """(results of the pass, the graph after it); the graph's value is held to what it was, bit for bit."""
    graph = prepared(program, *inputs, upto="hoist_quantize")
    return hoist(graph), graph


def hoist(graph):
    before = graph.run()
    results = HoistQuantize().run(graph.gm, graph.ctx)
    verify(graph.gm, graph.ctx, after="hoist_quantize")
    assert all(torch.equal(a, b) for a, b in zip(graph.run(), before, strict=True))
    nodes = targets(graph.gm)
    assert not [r for r in HoistQuantize().run(graph.gm, graph.ctx) if isinstance(r, Match)]
    assert targets(graph.gm) == nodes
    return results


def below_the_quantizes(gm):
    """What is called on the way from the quantizes to the linear, in order, getitem left out."""
    called = targets(gm)
    last = len(called) - 1 - called[::-1].index("quantize_per_token")
    return called[last + 1 : called.index("quantize_per_channel")]


def test_before_and_expected():
    def before(x, w, t, s):
        return F.linear(torch.cat([norm(t) * (1 + s), norm(x) * (1 + s)], 1), w)

    results, graph = hoisted(before, *drawn((2, 20, K), (K, K), (2, 9, K), (K,)))
    assert [type(result) for result in results] == [Match]
    assert targets(graph.gm) == [
        *("layer_norm", "add", "mul") * 2,
        *("quantize_per_token", "quantize_per_token", "cat_int8", "cat"),
        *("quantize_per_channel", "linear_w8a8"),
    ]
    (linear,) = (node for node in graph.gm.graph.nodes if node.name in graph.ctx.sites)
    assert [tuple(example(node).shape) for node in linear.args[:2]] == [(2, 29, K), (2, 29, 1)]
    PassPipeline(passes=AFTER).run(graph.gm, graph.ctx)
    assert targets(graph.gm).count("norm_modulate_quantize") == 2
    assert "quantize_per_token" not in targets(graph.gm)
    assert graph.ctx.report.sites[0].prologue == "layer_norm+modulate"


# program of (x, w), what then stands between quantize and linear
MOVES = {
    "permute": (lambda x, w: F.linear(norm(x).permute(1, 0, 2), w), ["permute"] * 2),
    "permute, one list": (lambda x, w: F.linear(norm(x).permute((-2, 0, -1)), w), ["permute"] * 2),
    "transpose": (lambda x, w: F.linear(norm(x).transpose(0, -2).contiguous(), w), ["transpose"] * 2),
    "flatten": (lambda x, w: F.linear(norm(x).flatten(0, 1), w), ["flatten"] * 2),
    "reshape": (lambda x, w: F.linear(norm(x).reshape(-1, K), w), ["reshape"] * 2),
    "view, last size left out": (lambda x, w: F.linear(norm(x).view(4, 10, -1), w), ["reshape"] * 2),
    "unflatten": (lambda x, w: F.linear(norm(x).unflatten(1, (4, 5)), w), ["unflatten"] * 2),
    "unsqueeze": (lambda x, w: F.linear(norm(x).unsqueeze(-2), w), ["unsqueeze"] * 2),
    "squeeze": (lambda x, w: F.linear(norm(x[:, None]).squeeze(1), w), ["squeeze"] * 2),
    "slice": (lambda x, w: F.linear(norm(x)[:, 1:], w), []),
    "ellipsis": (lambda x, w: F.linear(norm(x)[..., 2:, :], w), []),
    "chunk": (lambda x, w: F.linear(norm(x).chunk(2, 1)[1], w), ["chunk"] * 2),
    "split": (lambda x, w: F.linear(norm(x).split([2, 18], dim=-2)[1], w), ["split"] * 2),
    "narrow": (lambda x, w: F.linear(norm(x).narrow(1, 0, 18), w), ["narrow"] * 2),
    "cat over samples, GELU": (lambda x, w: F.linear(torch.cat([F.gelu(x), x + 1]), w), ["cat_int8", "cat"]),
    "negative axis": (lambda x, w: F.linear(torch.cat((x, norm(x)), dim=-2), w), ["cat_int8", "cat"]),
    "a wider type": (lambda x, w: F.linear(norm(x.half()).float().transpose(0, 1), w), ["transpose"] * 2),
    "joined as it was split": (
        lambda x, w: (lambda h: F.linear(torch.cat([h[:, :-7], h[:, -7:]], 1), w))(norm(x)),
        [],
    ),
    "joined the other way round": (
        lambda x, w: (lambda h: F.linear(torch.cat([h[:, -7:], h[:, :-7]], 1), w))(norm(x)),
        ["cat_int8", "cat"],
    ),
    "joined with a gap": (
        lambda x, w: (lambda h: F.linear(torch.cat([h[:, :5], h[:, 6:]], 1), w))(norm(x)),
        ["cat_int8", "cat"],
    ),
    "one after the other": (
        lambda x, w: F.linear(torch.cat([norm(x), x.flip(1)], 1).transpose(0, 1), w),
        ["cat_int8", "cat", "transpose", "transpose"],
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name):
    program, below = MOVES[name]
    results, graph = hoisted(program, *drawn((2, 20, K), (K, K)))
    assert [type(result) for result in results] == [Match]
    assert below_the_quantizes(graph.gm) == below


# program of (x [2, 20, 64], w), why it is refused; None where there is nothing to move
STAYS = {
    "channels are joined": (
        lambda x, w: F.linear(torch.cat([F.gelu(x[..., :32]), x[..., 32:]], -1), w),
        None,
    ),
    "channels are split": (lambda x, w: F.linear(F.gelu(x.repeat(1, 1, 2)).chunk(2, -1)[0], w), None),
    "channels are sliced": (lambda x, w: F.linear(F.gelu(x.repeat(1, 1, 2))[..., :K], w), None),
    "rows are cut": (lambda x, w: F.linear(F.gelu(x.repeat(1, 1, 2)).reshape(2, 40, K), w), None),
    "nothing to take in": (lambda x, w: F.linear(torch.cat([x + 1, x * 2], 1), w), None),
    "nothing in between": (lambda x, w: F.linear(norm(x), w), None),
    "a type that loses bits": (lambda x, w: F.linear(norm(x).bfloat16().float()[:, 1:] * 1, w), None),
    "the cat is read too": (
        lambda x, w: (lambda h: F.linear(h, w) + h)(torch.cat([norm(x), x], 1)),
        "is also read by",
    ),
    "the norm is read too": (
        lambda x, w: (lambda h: F.linear(torch.cat([h, x], 1), w)[:, :20] + h)(norm(x)),
        "a value inside the pattern is also read by",
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays(name):
    program, reason = STAYS[name]
    results, graph = hoisted(program, *drawn((2, 20, K), (K, K)))
    assert [type(result) for result in results] == ([] if reason is None else [Reject])
    assert all(reason in r.reason and r.reason.startswith("norm or activation upstream") for r in results)
    assert targets(graph.gm).count("quantize_per_token") == 1


def test_one_norm_for_a_direct_reader_and_two_cats():
    """Nothing reads the norm unquantized once both cats are quantized above: one quantize serves all three."""

    def program(x, w, t):
        h = norm(x)
        joined, turned = torch.cat([h, t], 1), torch.cat([t, h], 1)
        return F.linear(joined, w), F.linear(h, w), F.linear(turned, w)

    results, graph = hoisted(program, *drawn((2, 20, K), (K, K), (2, 9, K)))
    assert [type(result) for result in results] == [Match, Match]
    assert targets(graph.gm).count("quantize_per_token") == 2
    PassPipeline(passes=AFTER).run(graph.gm, graph.ctx)
    assert targets(graph.gm).count("norm_modulate_quantize") == 1
    assert [site.prologue for site in graph.ctx.report.sites] == ["layer_norm"] * 3


def test_one_that_stays_keeps_what_it_shares_from_moving():
    def program(x, w, t):
        h = norm(x)
        joined, turned = torch.cat([h, t], 1), torch.cat([t, h], 1)
        return F.linear(joined, w), F.linear(turned, w) + turned

    results, graph = hoisted(program, *drawn((2, 20, K), (K, K), (2, 9, K)))
    assert [type(result) for result in results] == [Reject, Reject]
    assert "cat_int8" not in targets(graph.gm)


def test_streams_of_different_kinds_are_both_named():
    def program(x, w, t):
        return F.linear(torch.cat([norm(x), F.gelu(t)], 1), w)

    _, graph = hoisted(program, *drawn((2, 20, K), (K, K), (2, 9, K)))
    PassPipeline(passes=AFTER).run(graph.gm, graph.ctx)
    assert graph.ctx.report.sites[0].prologue == "gelu, layer_norm"


def written_after_the_slice(x, w):
    h = norm(x)
    part = h[:, 1:]
    h.mul_(2)
    return F.linear(part, w)


def written_after_the_cat(x, w):
    y = x + 1
    joined = torch.cat([norm(x), y], 1)
    y += 1
    return F.linear(joined, w) + y.sum()


def operand_written(x, w):
    y = x + 1
    h = norm(y)[:, 1:]
    y += 1000 * w[0]
    return F.linear(h, w) + y[:, 1:]


WRITTEN = [written_after_the_slice, written_after_the_cat, operand_written]


@pytest.mark.parametrize("program", WRITTEN)
def test_writes_in_place(program):
    results, graph = hoisted(program, *drawn((2, 20, K), (K, K)))
    assert [type(result) for result in results] == [Reject]
    before = graph.run()
    PassPipeline(passes=AFTER).run(graph.gm, graph.ctx)
    assert torch.equal(graph.run()[0], before[0])  # the fusing passes keep off it as well


def test_a_write_elsewhere_does_not_matter():
    def program(x, w):
        joined = torch.cat([norm(x), x], 1)
        y = torch.zeros_like(x)
        y[:, 0] = 1.0
        return F.linear(joined, w) + y.repeat(1, 2, 1)

    results, _ = hoisted(program, *drawn((2, 20, K), (K, K)))
    assert [type(result) for result in results] == [Match]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_cats_of_any_axis_and_order(data):
    """Bit for bit whatever is joined where; a cat of channels is never moved."""
    rank = data.draw(st.integers(2, 4), label="rank")
    axis = data.draw(st.integers(-rank, rank - 1), label="axis")
    made = data.draw(st.lists(st.sampled_from(["norm", "gelu", "input", "slice"]), min_size=1, max_size=4))
    last = axis % rank == rank - 1
    parts = {"norm": norm, "gelu": F.gelu, "input": lambda x: x, "slice": lambda x: norm(x)[:]}

    def program(x, w):
        h = torch.cat([parts[kind](x) for kind in made], axis)
        return F.linear(h, w)

    shape = {2: (20, K), 3: (2, 20, K), 4: (2, 5, 6, K)}[rank]
    results, graph = hoisted(program, *drawn(shape, (K, K * len(made) if last else K)))
    expected = not last and {*made} & {"norm", "gelu", "slice"}
    assert [type(result) for result in results] == ([Match] if expected else [])
    assert ("cat_int8" in targets(graph.gm)) == bool(expected)


@pytest.mark.parametrize(
    "program", [MOVES["view, last size left out"][0], MOVES["joined as it was split"][0]]
)
def test_half_precision(program):
    hoisted(program, *(t.bfloat16() for t in drawn((2, 20, K), (K, K))))


def test_dynamic_shapes():
    """Sizes are symbols of the graph; nothing is baked, nothing is asked of them."""

    def program(x, w):
        text = x.shape[1] // 2
        h = norm(x)
        streams = torch.cat([h[:, :text], h[:, text:], x], 1)
        return F.linear(streams.reshape(-1, x.shape[-1]), w)

    x, w = drawn((2, 20, K), (K, K))
    gm, values = capture(as_module(program, x, w), x, dynamic=True)
    ctx = PassContext(scheme=QuantScheme.parse("w8a8"))
    PassPipeline(passes=BEFORE).run(gm, ctx)
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    other = {**values}
    sizes = [n for n in names if not isinstance(values[n], torch.Tensor)]
    assert sizes

    def run():
        gm.recompile()
        with torch.no_grad():
            return gm(*(other[name] for name in names))[0]

    before = run()
    results = HoistQuantize().run(gm, ctx)
    verify(gm, ctx, after="hoist_quantize")
    assert [type(result) for result in results] == [Match]
    assert torch.equal(run(), before)
