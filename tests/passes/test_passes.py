"""Each pass on small graphs: Before and Expected, rejects, idempotence, what verify catches."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.small_models import (
    GEMMS_PER_LAYER,
    KEPT_OUTSIDE_LAYERS,
    QUANTIZED_PER_LAYER,
    capture,
    context,
    count,
    targets,
    tiny_dit,
    tiny_inputs,
)
from viditq_fx import ops
from viditq_fx.errors import VerifyError
from viditq_fx.passes.annotate_sites import SITE_KEY, AnnotateSites
from viditq_fx.passes.base import Match, Reject
from viditq_fx.passes.fuse_linear import FuseLinear
from viditq_fx.passes.insert_qdq import InsertQdq
from viditq_fx.passes.normalize import Normalize
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.passes.place_weights import SLOT_KEY, PlaceWeights
from viditq_fx.passes.verify import verify

WIDTH = 64


def linear_and_back(weight, bias):
    """A graph of one linear that is no stem, head or condition: there is no attention."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return F.dropout(self.a(x), 0.5, False)

    return Two().eval()


def run(passes, gm, ctx):
    return [step.run(gm, ctx) for step in passes]


@pytest.fixture
def one_linear():
    model = linear_and_back(None, None)
    return capture(model, torch.randn(20, WIDTH)), context()


def test_normalize_removes_idle_dropout_and_nothing_else(one_linear):
    gm, ctx = one_linear
    assert targets(gm) == ["linear", "dropout"]
    Normalize().run(gm, ctx)
    assert targets(gm) == ["linear"]
    Normalize().run(gm, ctx)
    assert targets(gm) == ["linear"]


def test_normalize_keeps_dropout_that_drops():
    gm = capture(lambda x: F.dropout(x, 0.5, True), torch.randn(4, 4))
    Normalize().run(gm, context())
    assert targets(gm) == ["dropout"]


def test_normalize_removes_dead_linears_but_no_writes():
    def before(x, w):
        F.linear(x, w)  # dead
        y = torch.empty_like(x)
        y[..., ::2] = x[..., ::2] * 2
        y[..., 1::2] = x[..., 1::2]
        return y

    gm = capture(before, torch.randn(4, 8), torch.randn(8, 8))
    Normalize().run(gm, context())
    assert "linear" not in targets(gm)
    assert count(gm, "setitem") == 2


def test_normalize_gives_linear_one_spelling():
    gm = capture(lambda x, w: F.linear(bias=None, weight=w, input=x), torch.randn(4, 8), torch.randn(8, 8))
    Normalize().run(gm, context())
    (node,) = [n for n in gm.graph.nodes if n.target is F.linear]
    assert len(node.args) == 3
    assert not node.kwargs


@pytest.mark.parametrize("layers", [1, 3])
def test_every_linear_is_annotated_with_its_role(layers):
    gm, ctx = capture(tiny_dit(layers), *tiny_inputs()), context()
    run((Normalize(), AnnotateSites()), gm, ctx)
    roles = [site.role for site in ctx.report.sites]
    for role in ("attn.q", "attn.k", "attn.v", "attn.out", "ffn.up", "ffn.down"):
        assert roles.count(role) == layers
    assert roles.count("cond") == 1 + layers
    assert (roles.count("stem"), roles.count("head")) == (1, 1)
    assert {s.fqn for s in ctx.report.sites} >= {"stem", "time", "head", "blocks.0.q", "blocks.0.modulation"}


def test_node_sites_are_module_names():
    model = tiny_dit(2)
    gm, ctx = capture(model, *tiny_inputs()), context()
    run((Normalize(), AnnotateSites()), gm, ctx)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {site.fqn for site in ctx.report.sites} == linears
    assert {n.meta[SITE_KEY].fqn for n in gm.graph.nodes if SITE_KEY in n.meta} == linears


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(("blocks.0.*",), 6), (("attn.out",), 2), (("blocks.*.q", "ffn.up"), 4), (("nothing",), 0)],
)
def test_keep_adds_to_the_policy(keep, expected):
    gm, ctx = capture(tiny_dit(2), *tiny_inputs()), context(keep=keep)
    run((Normalize(), AnnotateSites()), gm, ctx)
    kept = [s for s in ctx.report.sites if s.reason and s.reason.startswith("kept by pattern")]
    assert len([s for s in kept if s.role not in {"cond"}]) == expected
    assert all(s.planned is None for s in kept)


def test_few_rows_stay_in_full_precision_with_a_reason():
    gm, ctx = capture(tiny_dit(1), *tiny_inputs(batch=1, tokens=16)), context()
    results = run((Normalize(), AnnotateSites()), gm, ctx)[1]
    q = ctx.report.site("blocks.0.q")
    assert q.planned is None
    assert "M=16 rows" in (q.reason or "")
    assert all(isinstance(result, Reject) for result in results)


def test_few_channels_stay_in_full_precision():
    gm, ctx = capture(nn.Linear(64, 8).requires_grad_(False), torch.randn(40, 64)), context()
    run((Normalize(), AnnotateSites()), gm, ctx)
    assert "K=64, N=8" in (ctx.report.sites[0].reason or "")


@pytest.mark.parametrize(
    ("call", "args", "reason"),
    [
        (lambda x, w: F.linear(x, w), (torch.randn(40, 64), torch.randn(64, 64)), "not a parameter"),
        (nn.Linear(64, 64, dtype=torch.float64), (torch.randn(40, 64, dtype=torch.float64),), "dtype"),
    ],
    ids=["computed-weight", "fp64"],
)
def test_what_cannot_be_packed_is_refused_with_a_reason(call, args, reason):
    gm, ctx = capture(call, *args), context()
    run((Normalize(), AnnotateSites()), gm, ctx)
    (site,) = ctx.report.sites
    assert site.planned == "w8a8"
    assert reason in (site.reason or "")


def test_qdq_nodes_surround_the_operands(one_linear):
    gm, ctx = one_linear
    run((Normalize(), AnnotateSites(), InsertQdq()), gm, ctx)
    assert targets(gm) == [
        "quantize_per_token",
        "dequantize_per_token",
        "quantize_per_channel",
        "dequantize_per_channel",
        "linear",
    ]
    before = len(gm.graph.nodes)
    InsertQdq().run(gm, ctx)
    assert len(gm.graph.nodes) == before, "a second run inserts nothing"


def test_linears_that_share_an_input_share_one_quantize():
    gm, ctx = capture(tiny_dit(1), *tiny_inputs()), context()
    run((Normalize(), AnnotateSites(), InsertQdq()), gm, ctx)
    assert count(gm, "quantize_per_token") == 4  # q|k|v, out, up, down
    assert count(gm, "quantize_per_channel") == 6


def test_graph_with_qdq_gives_the_fused_numbers():
    """With fusion off the graph still runs, and the integer ops give the same values."""
    model, inputs = tiny_dit(1), tiny_inputs()
    values = {}
    for last in (InsertQdq, FuseLinear):
        gm, ctx = capture(model, *inputs), context()
        run(_passes_to(last), gm, ctx)
        gm.recompile()
        values[last] = gm(*_graph_inputs(gm, model, inputs))[0]
    torch.testing.assert_close(values[InsertQdq], values[FuseLinear], rtol=1e-5, atol=1e-5)


def _passes_to(last):
    """The pipeline up to a pass, that one included."""
    names = [step.name for step in default_passes()]
    return default_passes()[: names.index(last.name) + 1]


def _graph_inputs(gm, model, inputs):
    """Values of a captured graph's placeholders, by source."""
    from viditq_fx.passes.dataflow import source_name
    from viditq_fx.site import fqn_of_source

    state = model.state_dict()
    out = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            name = fqn_of_source(source_name(node))
            shape = node.meta["example_value"].shape
            out.append(state[name] if name in state else next(x for x in inputs if x.shape == shape))
    return out


def test_fuse_linear_leaves_integer_linears_only(one_linear):
    gm, ctx = one_linear
    results = run(_passes_to(FuseLinear), gm, ctx)[-1]
    assert targets(gm) == ["quantize_per_token", "quantize_per_channel", "linear_w8a8"]
    assert [type(result) for result in results] == [Match]
    assert FuseLinear().run(gm, ctx) == ()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a7"])
def test_scheme_chooses_op_and_width(scheme):
    gm, ctx = capture(tiny_dit(1), *tiny_inputs()), context(scheme)
    run(default_passes(), gm, ctx)
    assert count(gm, f"linear_{scheme}") == GEMMS_PER_LAYER
    quantizes = [
        n for n in gm.graph.nodes if "_quantize" in str(n.target) or "quantize_per_token" in str(n.target)
    ]
    assert {n.args[-1] for n in quantizes} == {int(scheme[-1])}


def test_weights_become_inputs_and_full_precision_ones_go():
    gm, ctx = capture(tiny_dit(2), *tiny_inputs()), context()
    run(_passes_to(FuseLinear), gm, ctx)
    placeholders = sum(n.op == "placeholder" for n in gm.graph.nodes)
    results = PlaceWeights().run(gm, ctx)
    quantized = 2 * QUANTIZED_PER_LAYER
    assert len(results) == len(ctx.weight_slots) == quantized
    assert all(all(slot.frees_source) for slot in ctx.weight_slots)
    assert sum(n.op == "placeholder" for n in gm.graph.nodes) == placeholders + quantized
    assert count(gm, "quantize_per_channel") == 0
    assert not any(n.op == "get_attr" for n in gm.graph.nodes), "nothing is baked"
    for node in gm.graph.nodes:
        if SLOT_KEY in node.meta:
            assert node.meta["example_value"] is not None
            assert node.meta["tensor_dict"]["_dynamo_static_input_type"] == "unguarded"
    assert PlaceWeights().run(gm, ctx) == ()


def test_a_weight_that_is_read_elsewhere_too_stays():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x):
            return self.a(x) + self.a.weight.sum()

    gm, ctx = capture(Tied().requires_grad_(False), torch.randn(40, WIDTH)), context()
    run(default_passes(), gm, ctx)
    (slot,) = ctx.weight_slots
    assert slot.frees_source == (False,)


def test_one_parameter_gives_one_pair():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.a(F.gelu(self.a(x)))

    gm, ctx = capture(Twice().requires_grad_(False), torch.randn(40, WIDTH)), context()
    run(default_passes(), gm, ctx)
    assert count(gm, "linear_w8a8") == 2
    assert len(ctx.weight_slots) == 1


@pytest.mark.parametrize("layers", [1, 4])
def test_pipeline_counts_and_traces(layers):
    gm, ctx = capture(tiny_dit(layers), *tiny_inputs()), context()
    seen = []
    PassPipeline(
        passes=default_passes(), observer=lambda name, g: seen.append((name, len(g.graph.nodes)))
    ).run(gm, ctx)
    names = [p.name for p in default_passes()]
    assert [name for name, _ in seen] == names == [trace.name for trace in ctx.report.passes]
    matches = {trace.name: trace.matches for trace in ctx.report.passes}
    quantized = QUANTIZED_PER_LAYER * layers
    assert matches["insert_qdq"] == matches["fuse_linear"] == quantized
    assert matches["fuse_shared_input"] == 3 * layers
    assert matches["place_weights"] == GEMMS_PER_LAYER * layers
    assert len(ctx.report.sites) == quantized + layers + KEPT_OUTSIDE_LAYERS
    before = len(gm.graph.nodes)
    for step in default_passes():
        step.run(gm, ctx)
    assert len(gm.graph.nodes) == before, "the pipeline is idempotent"
    assert len(ctx.report.sites) == quantized + layers + KEPT_OUTSIDE_LAYERS


def _quantized():
    gm, ctx = capture(tiny_dit(1), *tiny_inputs()), context()
    run(default_passes(), gm, ctx)
    return gm, ctx


def test_verify_finds_an_orphan_quantize():
    gm, ctx = _quantized()
    node = next(n for n in gm.graph.nodes if n.target is ops.LINEAR_W8A8.overload)
    pair = node.args[0].args[0]
    with gm.graph.inserting_after(pair):
        gm.graph.call_function(pair.target, pair.args).meta.update(pair.meta)
    with pytest.raises(VerifyError, match="orphan quantize"):
        verify(gm, ctx, after="test")


def test_verify_finds_a_scale_of_the_wrong_shape():
    gm, ctx = _quantized()
    node = next(n for n in gm.graph.nodes if n.target is ops.LINEAR_W8A8.overload)
    x_scale, w_scale = node.args[1], node.args[3]
    node.update_arg(1, w_scale)
    node.update_arg(3, x_scale)
    with pytest.raises(VerifyError, match="match neither token nor channel"):
        verify(gm, ctx, after="test")


def test_verify_finds_a_lost_site():
    gm, ctx = _quantized()
    ctx.sites["gone"] = ctx.report.sites[0]
    with pytest.raises(VerifyError, match="lost their node"):
        verify(gm, ctx, after="test")


def test_verify_finds_a_planned_site_that_nothing_was_done_for():
    gm, ctx = _quantized()
    site = ctx.report.site("blocks.0.q")
    site.done = None
    with pytest.raises(VerifyError, match=r"blocks\.0\.q"):
        verify(gm, ctx, after="place_weights")
