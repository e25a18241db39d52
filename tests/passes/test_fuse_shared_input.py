"""Projections that read one input run as one wide GEMM: the same numbers bit for bit, weights still inputs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import viditq_fx as vq
from tests.small_models import capture, context, count, relative_error, targets, tiny_dit, tiny_inputs
from viditq_fx import ops
from viditq_fx.ops.packed_weights import joined_bias, packed_bytes, packed_group, packed_weight
from viditq_fx.passes.fuse_shared_input import FuseSharedInput
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.runtime import executions
from viditq_fx.scheme import WeightForm

K = 64
INT8 = WeightForm()


class Projections(nn.Module):
    """Linears of several widths over one input; `forward` says what becomes of them."""

    def __init__(self, widths=(64, 96, 32), biases=(True, True, True)):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(K, w, bias=b) for w, b in zip(widths, biases, strict=True))

    def forward(self, x):
        return [part(x) for part in self.parts]


def joined_paths(model, *inputs, passes=None):
    """Paths of the sites of each wide GEMM."""
    gm, ctx = capture(model.requires_grad_(False), *inputs), context()
    PassPipeline(passes=passes or default_passes()).run(gm, ctx)
    groups = {}
    for site in ctx.report.sites:
        if site.joined is not None:
            groups.setdefault(site.joined, []).append(site.fqn)
    return gm, ctx, list(groups.values())


class Branches(nn.Module):
    """Two streams, cross attention and a gated feed-forward, as the families of the field spell them."""

    def __init__(self):
        super().__init__()
        names = ("to_q", "to_k", "to_v", "add_k", "add_v", "gate", "up", "down")
        self.layers = nn.ModuleDict({name: nn.Linear(K, K) for name in names})

    def forward(self, x, text):
        to = self.layers
        q, k, v = to["to_q"](x), to["to_k"](x), to["to_v"](x)
        k, v = torch.cat([k, to["add_k"](text)], 1), torch.cat([v, to["add_v"](text)], 1)
        h = F.scaled_dot_product_attention(*(t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v)))
        h = F.layer_norm(h.transpose(1, 2).flatten(2), (K,))
        return x + to["down"](F.silu(to["gate"](h)) * to["up"](h))


def test_what_shares_an_input_is_joined_and_nothing_else():
    _, _, groups = joined_paths(Branches(), torch.randn(2, 20, K), torch.randn(2, 24, K))
    assert [[path.removeprefix("layers.") for path in group] for group in groups] == [
        ["to_q", "to_k", "to_v"],
        ["add_k", "add_v"],
        ["gate", "up"],
    ]


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_for_bit_as_apart(biases, dtype, monkeypatch):
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
    model, x = Projections(biases=biases).requires_grad_(False).to(dtype), torch.randn(2, 20, K).to(dtype)
    got = torch.compile(model, backend="viditq", fullgraph=True)(x)
    for part, value in zip(model.parts, got, strict=True):
        q, s = ops.QUANTIZE_PER_TOKEN.reference(x, 8)
        w, w_scale = ops.QUANTIZE_PER_CHANNEL.reference(part.weight, 8)
        want = ops.LINEAR_W8A8.reference(q, s, w, w_scale, part.bias, dtype)
        assert torch.equal(value, want)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (Projections(biases=(True, True, False)), [2]),  # those with a bias, and not the one without
        (Projections(widths=(64,), biases=(True,)), []),
    ],
)
def test_reject_cases(model, sizes):
    gm, _, groups = joined_paths(model, torch.randn(2, 20, K))
    assert [len(group) for group in groups] == sizes
    assert FuseSharedInput().run(gm, context()) == ()


def test_a_weight_read_twice_stays_packed_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(K, K), nn.Linear(K, K)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.a(x), self.b(x)

    gm, ctx, groups = joined_paths(Twice(), torch.randn(20, K))
    assert groups == []
    assert len(ctx.weight_slots) == 1
    assert count(gm, "linear_w8a8") == 2


def test_joined_weights_and_biases_are_inputs():
    gm, ctx, _ = joined_paths(Projections(), torch.randn(20, K))
    (slot,), (bias,) = ctx.weight_slots, ctx.bias_slots
    assert len(slot.sources) == len(bias.sources) == 3
    assert slot.frees_source == (True, True, True)
    assert count(gm, "cat") == 0
    assert count(gm, "linear_w8a8") == 1


@pytest.mark.slow
def test_generated_code_regional_and_dynamic():
    """Three blocks of one class and three lengths through one graph, each with its own joined weights."""
    model = tiny_dit(3)
    for block in model.blocks:
        block.compile(backend="viditq", fullgraph=True, dynamic=True)
    reports = set()
    with torch.no_grad():
        for tokens in (40, 56, 33):
            inputs = tiny_inputs(tokens=tokens)
            want = tiny_dit(3)(*inputs)
            with executions() as ran:
                assert relative_error(model(*inputs), want) < 0.02
            reports |= {id(run.report) for run in ran}
    assert (
        len(reports) == 2
    )  # the stem's result is a view: Dynamo guards on its base, so block 0 is a graph apart
    sites = vq.explain(model, *inputs).sites
    assert {site.kernel for site in sites if site.done} == {
        next(s.kernel for s in sites if s.fqn == "blocks.0.out")
    }


def test_a_write_to_one_part_or_bias_is_noticed():
    model, x = Projections().requires_grad_(False), torch.randn(2, 20, K)
    call = torch.compile(model, backend="viditq")
    call(x)
    for write in (
        lambda: model.parts[1].weight.mul_(-2),
        lambda: model.parts[2].bias.add_(3),
        lambda: model.load_state_dict(Projections().state_dict()),
    ):
        write()
        for got, want in zip(call(x), model(x), strict=True):
            assert relative_error(got, want) < 0.02
    model.parts[0].bias.data.add_(5)
    vq.repack(model)
    assert relative_error(call(x)[0], model(x)[0]) < 0.02


@pytest.mark.slow
def test_release_frees_every_part():
    model, x = Projections().requires_grad_(False), torch.randn(2, 20, K)
    want = model(x)
    call = torch.compile(model, backend="viditq", options={"weights": "release"})
    for _ in range(2):
        for got, reference in zip(call(x), want, strict=True):
            assert relative_error(got, reference) < 0.02
    report = vq.explain(call, x)
    assert report.totals()["quantized_weight_bytes_full_resident"] == 0
    assert (
        report.totals()["quantized_weight_bytes_packed"] == sum(s.resident_packed for s in report.sites) > 0
    )


def test_groups_go_with_their_weights_and_old_ones_at_once():
    weights = [nn.Parameter(torch.randn(32, K), requires_grad=False) for _ in range(2)]
    names = ["a", "b"]
    first, _ = packed_group(weights, INT8, names)
    assert packed_group(weights, INT8, names)[0] is first
    apart = torch.cat([packed_weight(w, INT8, "w")[0] for w in weights])
    assert torch.equal(first, apart)
    before = packed_bytes(weights[0])
    for _ in range(3):
        weights[1].mul_(2)
        packed_group(weights, INT8, names)
    assert packed_bytes(weights[0]) == before, "the forms of weights since written are not kept"
    biases = [nn.Parameter(torch.randn(n), requires_grad=False) for n in (3, 4)]
    assert torch.equal(joined_bias(biases), torch.cat(biases))
    assert joined_bias(biases) is joined_bias(biases)


def test_blocks_that_read_one_text_are_not_joined_with_each_other():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(K, K) for _ in range(4)) for _ in range(2))

        def forward(self, x, text):
            for q, k, v, out in self.blocks:
                heads = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q(x), k(text), v(text)))
                x = x + out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
            return x

    _, _, groups = joined_paths(Cross(), torch.randn(2, 20, K), torch.randn(2, 24, K))
    assert groups == [["blocks.0.1", "blocks.0.2"], ["blocks.1.1", "blocks.1.2"]]


def across_rows(x, q, k, v):
    return q.view(-1) * 2, k.unflatten(-1, (4, -1)).transpose(1, 2).mT, v.view(len(v), -1) * 3


def transposed(x, q, k, v):
    return q.transpose(0, 1), k * 2, v * 2


def attended(x, q, k, v):
    return torch.ops.viditq_layouts.rows(q), k.view(*k.shape[:-1], 4, 16) * 2, v.mul_(2) + 1


LIBRARY = torch.library.Library("viditq_layouts", "FRAGMENT")
LIBRARY.define("rows(Tensor x) -> Tensor")
LIBRARY.impl("rows", lambda x: x.view(-1, 16) * 2, "CompositeExplicitAutograd")
torch.library.register_fake("viditq_layouts::rows", lambda x: x.new_empty(x.numel() // 16, 16), lib=LIBRARY)


class ReadAs(Projections):
    def __init__(self, use):
        super().__init__(widths=(64, 64, 64))
        self.use = use

    def forward(self, x):
        return self.use(x, *(part(x) for part in self.parts))


@pytest.mark.slow
@pytest.mark.parametrize(("use", "copies"), [(across_rows, 3), (transposed, 1), (attended, 1)])
def test_a_part_is_copied_where_its_reader_wants_memory_of_its_own(use, copies):
    """A slice of the wide result has other strides than the projection's own: `view` across them raises."""
    model, x = ReadAs(use).eval().requires_grad_(False), torch.randn(2, 20, K)
    gm, _, groups = joined_paths(model, x)
    assert [len(group) for group in groups] == [3]
    assert targets(gm).count("clone") == copies
    want = model(x)
    for got, wanted in zip(torch.compile(model, backend="viditq", fullgraph=True)(x), want, strict=True):
        assert got.stride() == wanted.stride()
        assert relative_error(got, wanted) < 0.02


def test_a_graph_break_hands_out_what_the_model_would():
    class Broken(Projections):
        def forward(self, x):
            q, k, v = super().forward(x)
            torch._dynamo.graph_break()
            return q.view(-1, 16), k.view(-1), v.view(len(x), -1)

    model, x = Broken().eval().requires_grad_(False), torch.randn(2, 20, K)
    for got, want in zip(torch.compile(model, backend="viditq")(x), model(x), strict=True):
        assert relative_error(got, want) < 0.02


def test_a_bias_that_the_graph_writes_is_not_joined_beforehand():
    class Drifting(Projections):
        def forward(self, x):
            self.parts[1].bias.add_(1)
            return super().forward(x)

    model, x = Drifting().eval().requires_grad_(False), torch.randn(2, 20, K)
    eager, call = copy.deepcopy(model), torch.compile(model, backend="viditq")
    for _ in range(3):
        for got, want in zip(call(x), eager(x), strict=True):
            assert relative_error(got, want) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("again", [1, 2])
def test_a_weight_joined_here_and_in_another_group_or_alone_there(again):
    """Self-attention, then cross-attention with the same weights."""

    class Twice(Projections):
        def forward(self, x, text):
            return [*super().forward(x), *(part(text) for part in self.parts[:again])]

    model = Twice().eval().requires_grad_(False)
    inputs = torch.randn(2, 20, K), torch.randn(2, 30, K)
    want = model(*inputs)
    for got, wanted in zip(
        torch.compile(model, backend="viditq", fullgraph=True)(*inputs), want, strict=True
    ):
        assert relative_error(got, wanted) < 0.02
