"""Writes of every spelling are kept, order what is quantized, and keep a weight from being packed early."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.small_models import capture, context, count, relative_error
from viditq_fx.passes.base import Match, Reject
from viditq_fx.passes.effects import write_roots
from viditq_fx.passes.fuse_activation_quantize import FuseActivationQuantize
from viditq_fx.passes.fuse_norm_quantize import FuseNormQuantize
from viditq_fx.passes.normalize import Normalize
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.runtime import executions
from viditq_fx.testing import prepared

LIBRARY = torch.library.Library("viditq_tests", "FRAGMENT")
LIBRARY.define("increment(Tensor(a!) x) -> ()")
LIBRARY.impl("increment", lambda x: [x.add_(1)][1:] or None, "CompositeExplicitAutograd")
LIBRARY.define("attend(Tensor q, Tensor k, Tensor v) -> Tensor")
LIBRARY.impl("attend", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), "CompositeExplicitAutograd")
torch.library.register_fake("viditq_tests::attend", lambda q, k, v: torch.empty_like(q), lib=LIBRARY)


def power(x):
    y = x
    y **= 2


WRITES = {
    "inplace keyword": lambda x: F.relu(x, inplace=True),
    "inplace by position": lambda x: F.leaky_relu(x, 0.1, True),
    "method": lambda x: x.view(-1).mul_(3),
    "function": lambda x: torch.sigmoid_(x),
    "augmented power": power,
    "augmented through a view": lambda x: x[:, :3].__imul__(5),
    "setitem": lambda x: x.__setitem__((slice(None), 0), 7.0),
    "out": lambda x: torch.mul(x, 2, out=x),
    "op that mutates": lambda x: torch.ops.viditq_tests.increment(x),
    "overload that mutates": lambda x: torch.ops.viditq_tests.increment.default(x),
    "through a cast of the same dtype": lambda x: x.float().add_(3),
}


class Written(nn.Module):
    """Two linears read one tensor, which is written between them."""

    def __init__(self, write):
        super().__init__()
        self.a, self.b, self.write = nn.Linear(64, 64), nn.Linear(64, 64), write

    def forward(self, x):
        h = F.layer_norm(x, (64,))
        first = self.a(h)
        self.write(h)
        return first, self.b(h)


@pytest.mark.parametrize("name", WRITES)
def test_a_write_between_two_linears_is_kept_and_seen(name, monkeypatch):
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
    model, x = Written(WRITES[name]).requires_grad_(False), torch.randn(2, 20, 64)
    with executions() as ran:
        results = torch.compile(model, backend="viditq", fullgraph=True)(x)
    assert [site.done for site in ran[0].report.sites] == ["w8a8", "w8a8"]
    for got, want in zip(results, model(x), strict=True):
        assert relative_error(got, want) < 0.02


@pytest.mark.parametrize("name", WRITES)
def test_a_write_that_nothing_reads_is_not_removed(name):
    gm = capture(Written(WRITES[name]), torch.randn(2, 20, 64))
    before = write_roots(gm.graph)
    assert before
    Normalize().run(gm, context())
    assert write_roots(gm.graph) == before


def test_a_weight_written_in_the_graph_is_refused():
    class Decays(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)

        def forward(self, x):
            self.a.weight.view(-1).mul_(0.5)
            return self.a(x)

    gm, ctx = capture(Decays().requires_grad_(False), torch.randn(20, 64)), context()
    PassPipeline(passes=default_passes()).run(gm, ctx)
    assert "written inside the graph" in ctx.report.sites[0].reason
    assert ctx.report.sites[0].done is None


def opaque_reasons(model, *inputs, **options):
    gm, ctx = capture(model.requires_grad_(False).eval(), *inputs), context(**options)
    PassPipeline(passes=default_passes()).run(gm, ctx)
    return [(site.fqn, site.planned, site.done, site.reason) for site in ctx.report.sites]


class Product(nn.Module):
    def __init__(self, product):
        super().__init__()
        self.weight, self.product = nn.Parameter(torch.randn(64, 64)), product

    def forward(self, x):
        return self.product(x, self.weight)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w,
        lambda x, w: torch.matmul(x, w.t()),
        lambda x, w: torch.einsum("...k,kn->...n", x, w),
    ],
)
def test_a_product_that_is_no_linear_is_reported(product):
    ((_, planned, done, reason),) = opaque_reasons(Product(product), torch.randn(20, 64))
    assert planned == "w8a8"
    assert done is None
    assert "spelled as" in reason


def test_a_linear_inside_a_higher_order_op_is_reported_and_can_be_kept():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)

        def forward(self, x):
            return checkpoint(self.a, x, use_reentrant=False)

    ((_, planned, _, reason),) = opaque_reasons(Checkpointed(), torch.randn(20, 64))
    assert planned == "w8a8"
    assert "a linear inside torch's higher-order op" in reason
    ((_, planned, _, reason),) = opaque_reasons(Checkpointed(), torch.randn(20, 64), keep=("other",))
    assert planned is None
    assert "kept by pattern" in reason


def test_a_custom_attention_op_counts_as_attention():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(8, 64), nn.Linear(64, 8)
            self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))

        def forward(self, x):
            x = self.stem(x)
            q, k, v = (p(x).unflatten(-1, (2, 32)).transpose(1, 2) for p in (self.q, self.k, self.v))
            x = x + self.out(torch.ops.viditq_tests.attend(q, k, v).transpose(1, 2).flatten(2))
            return self.head(x)

    gm, ctx = capture(Block().requires_grad_(False), torch.randn(2, 20, 8)), context()
    PassPipeline(passes=default_passes()).run(gm, ctx)
    roles = {site.fqn: site.role for site in ctx.report.sites}
    assert roles == dict(stem="stem", q="attn.q", k="attn.k", v="attn.v", out="attn.out", head="head")


def test_a_weight_of_one_dimension_is_refused():
    class Dot(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w = nn.Linear(64, 64), nn.Parameter(torch.randn(64))

        def forward(self, x):
            return F.linear(self.a(x), self.w)

    reasons = opaque_reasons(Dot(), torch.randn(20, 64))
    assert reasons[0][2] == "w8a8"
    assert reasons[1][2] is None
    assert reasons[1][3]


def test_a_sinusoid_of_a_projection_is_content():
    class Sine(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.b(torch.sin(self.a(x)))

    assert [done for _, _, done, _ in opaque_reasons(Sine(), torch.randn(2, 20, 64))] == ["w8a8", "w8a8"]


def test_what_an_opaque_attention_reads_is_no_query():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.attention = nn.Linear(8, 64), nn.MultiheadAttention(64, 2, batch_first=True)
            self.up, self.down, self.head = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 8)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            x = x + self.down(F.gelu(self.up(x)))
            return self.head(x)

    gm, ctx = capture(Block().train().requires_grad_(False), torch.randn(2, 20, 8)), context()
    PassPipeline(passes=default_passes()).run(gm, ctx)
    roles = {site.fqn: site.role for site in ctx.report.sites}
    assert roles == dict(stem="stem", attention="other", up="ffn.up", down="ffn.down", head="head")


def test_a_write_into_newer_memory_keeps_the_quantize_shared():
    """Rotary embeddings write into a tensor that they make: what was quantized before cannot change."""

    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x):
            h = F.layer_norm(x, (64,))
            q = self.q(h)
            out = torch.empty_like(q)
            out[..., ::2], out[..., 1::2] = q[..., 1::2], q[..., ::2]
            k = self.k(h)
            k[:, :3] = 0
            return out, k, self.v(h)

    gm, ctx = capture(Rotary().requires_grad_(False), torch.randn(2, 20, 64)), context()
    PassPipeline(passes=default_passes()).run(gm, ctx)
    assert count(gm, "norm_modulate_quantize") == 1
    assert {site.joined for site in ctx.report.sites} == {"q"}


def norm_input_written(x, weight):
    y = x + 1
    h = F.layer_norm(y, (64,))
    y += 1000 * weight[0]
    return h, y


def shift_written(x, weight):
    shift = weight[0] + 1
    h = F.layer_norm(x, (64,)) + shift
    shift.mul_(100)
    return h, shift


def gate_written(x, weight):
    gate = x * 2
    h = F.silu(x) * gate
    gate[:, 0] = 50.0
    return h, gate


@pytest.mark.parametrize("program", [norm_input_written, shift_written, gate_written])
def test_an_operand_written_after_the_norm_is_not_read_late(program):
    """The fused op stands where the quantize stood: by then the operands of the norm may hold other values."""

    def late(x, weight):
        h, written = program(x, weight)
        return F.linear(h, weight), written

    gen = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 20, 64, generator=gen), torch.randn(64, 64, generator=gen)
    graph = prepared(late, *inputs, upto="fuse_norm_quantize")
    before = graph.run()
    for step in (FuseNormQuantize(), FuseActivationQuantize()):
        for result in step.run(graph.gm, graph.ctx):
            assert isinstance(result, Reject)
            assert "may be written in place by" in result.reason
    assert all(torch.equal(a, b) for a, b in zip(graph.run(), before, strict=True))


def activated_in_place(activate, is_read):
    """An activation that writes its input; something reads the input afterwards, or nothing does."""

    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            hidden = self.up(x)
            activated = activate(hidden)
            return self.down(activated), hidden * 2 if is_read else x

    return FeedForward().eval().requires_grad_(False)


@pytest.mark.parametrize("activate", [nn.SiLU(inplace=True), nn.ReLU(inplace=True)])
@pytest.mark.parametrize("is_read", [True, False])
def test_an_activation_in_place_is_folded_where_nothing_else_sees_it(activate, is_read):
    torch.manual_seed(0)
    graph = prepared(
        activated_in_place(activate, is_read), torch.randn(2, 20, 64), upto="fuse_activation_quantize"
    )
    before = graph.run()
    (result,) = FuseActivationQuantize().run(graph.gm, graph.ctx)
    assert isinstance(result, Reject) == is_read, result
    assert max(relative_error(a, b) for a, b in zip(graph.run(), before, strict=True)) < 1e-5


def test_adaln_in_place_is_folded():
    """Each write goes into memory that the pattern itself made; then a pass looks for writes behind it."""

    def program(x, w, scale, shift):
        h = F.layer_norm(x, (64,))
        h *= 1 + scale
        h += shift
        return F.linear(h, w) + F.linear(F.silu(x), w)

    gen = torch.Generator().manual_seed(0)
    shapes = (2, 20, 64), (64, 64), (64,), (64,)
    graph = prepared(program, *(torch.randn(s, generator=gen) for s in shapes), upto="fuse_norm_quantize")
    before = graph.run()
    for step, matches in ((FuseNormQuantize(), 1), (FuseActivationQuantize(), 1)):
        results = step.run(graph.gm, graph.ctx)
        assert [type(result) for result in results].count(Match) == matches, results
    assert relative_error(graph.run()[0], before[0]) < 1e-5


def gate_accumulates(x, weight):
    gate = F.linear(x, weight)
    whole = gate[:, 1:]
    gate *= F.silu(x)
    return gate, whole


def test_a_write_that_a_view_shows_is_not_folded_away():
    def program(x, weight):
        h, view = gate_accumulates(x, weight)
        return F.linear(h, weight), view

    gen = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 20, 64, generator=gen), torch.randn(64, 64, generator=gen)
    graph = prepared(program, *inputs, upto="fuse_activation_quantize")
    before = graph.run()
    assert not [r for r in FuseActivationQuantize().run(graph.gm, graph.ctx) if isinstance(r, Match)]
    assert all(torch.equal(a, b) for a, b in zip(graph.run(), before, strict=True))
