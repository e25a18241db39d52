"""Pointwise convolutions become linears over channels where they are quantized, and stay what they are elsewhere."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.small_models import capture, context, count, targets, tiny_dit
from viditq_fx.passes.annotate_sites import AnnotateSites
from viditq_fx.passes.linearize_convolutions import LinearizeConvolutions
from viditq_fx.passes.normalize import Normalize
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.testing import capture as capture_with_values
from viditq_fx.testing import prepared, relative_error

BATCH, WIDTH, HEIGHT, BREADTH = 2, 64, 5, 7
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class OfTokens(nn.Module):
    """Sana's feed-forward: tokens made an image, 1x1, depthwise 3x3, a gate, 1x1, tokens again."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.up = nn.Conv2d(width, 4 * width, 1)
        self.depth = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.down = nn.Conv2d(2 * width, width, 1, bias=False)

    def forward(self, x):
        image = x.unflatten(1, (HEIGHT, BREADTH)).permute(0, 3, 1, 2)
        h, gate = self.depth(F.silu(self.up(image))).chunk(2, dim=1)
        return x + self.down(h * F.silu(gate)).flatten(2, 3).permute(0, 2, 1)


def tokens():
    return torch.randn(BATCH, HEIGHT * BREADTH, WIDTH, generator=torch.Generator().manual_seed(1))


def image(dims=2, width=WIDTH):
    return torch.randn(BATCH, width, 9, *(3, 2)[: dims - 1], generator=torch.Generator().manual_seed(1))


def build(make, *args, **kwargs):
    torch.manual_seed(0)
    return make(*args, **kwargs).eval().requires_grad_(False)


def linearized(model, x):
    """The graph of a call after the pass, which ran."""
    return prepared(model, x, upto="insert_qdq")


def whole(model, *inputs, keep=(), dynamic=False):
    """(the graph after all passes, its report)."""
    gm, ctx = capture(model, *inputs, dynamic=dynamic), context(keep=keep)
    PassPipeline(passes=default_passes()).run(gm, ctx)
    return gm, ctx.report


def test_an_image_gets_one_permute_on_each_side():
    graph = linearized(build(nn.Conv2d, WIDTH, 96, 1), image())
    assert targets(graph.gm) == ["permute", "clone", "flatten", "linear", "permute", "clone"]
    results = LinearizeConvolutions().run(graph.gm, graph.ctx)
    assert results == (), "a second run finds nothing"


def test_channels_last_needs_no_copy():
    x = image().contiguous(memory_format=torch.channels_last)
    graph = linearized(build(nn.Conv2d, WIDTH, 96, 1), x)
    assert targets(graph.gm) == ["permute", "flatten", "linear", "permute"]


def test_tokens_stay_tokens():
    """Expected: no permute is left of those round the convolutions, but for the depthwise one's own."""
    graph = linearized(build(OfTokens), tokens())
    assert targets(graph.gm) == [
        *("flatten", "linear", "unflatten", "permute", "silu", "conv2d", "chunk"),
        *("permute", "permute", "silu", "mul", "flatten", "linear", "flatten", "add"),
    ]
    up, down = (n for n in graph.gm.graph.nodes if n.target is F.linear)
    assert up.args[0].op == "placeholder"
    assert tuple(down.meta["example_value"].shape) == (BATCH, HEIGHT, BREADTH, WIDTH)


@pytest.mark.parametrize(
    "there_and_back",
    [
        lambda conv, x: conv(x.transpose(1, 2)).transpose(1, 2),
        lambda conv, x: conv(x.mT).mT,
        lambda conv, x: conv(x.movedim(-1, 1).contiguous()).movedim(1, -1),
        lambda conv, x: conv(torch.swapaxes(x, 1, 2)).permute(0, 2, 1),
    ],
    ids=["transpose", "mT", "copied", "swapaxes"],
)
def test_spellings_of_the_permute_cancel(there_and_back):
    conv, x = build(nn.Conv1d, WIDTH, WIDTH, 1), tokens()
    graph = linearized(lambda x: there_and_back(conv, x), x)
    assert targets(graph.gm) == ["flatten", "linear"]
    assert relative_error(graph.run()[0], there_and_back(conv, x)) < 1e-5


@settings(max_examples=40, deadline=None)
@given(
    dims=st.sampled_from((1, 2, 3)),
    size=st.integers(1, 6),
    widths=st.tuples(st.integers(32, 70), st.integers(32, 70)),
    batch=st.sampled_from((None, 1, 3)),
    bias=st.booleans(),
    last=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    padding=st.sampled_from((0, "valid", "same")),
)
@example(
    dims=2,
    size=2,
    widths=(34, 32),  # as many channels as rows: no batch, so none of them is pooled
    batch=None,
    bias=False,
    last=False,
    dtype=torch.float32,
    padding=0,
)
def test_the_graph_computes_what_the_convolution_does(dims, size, widths, batch, bias, last, dtype, padding):
    """Values and memory layout, for any rank, size, layout and batch; rows too few for the policy do not count."""
    torch._dynamo.reset()
    conv = build(CONVS[dims], *widths, 1, bias=bias, padding=padding, dilation=2).to(dtype)
    space = (17, size, size + 1)[:dims]
    x = torch.randn(*(() if batch is None else (batch,)), widths[0], *space).to(dtype)
    if last:
        x = x.movedim(-dims - 1, -1).contiguous().movedim(-1, -dims - 1)
    graph = linearized(conv, x)
    assert count(graph.gm, "linear") == 1
    assert count(graph.gm, f"conv{dims}d") == 0
    (got,), want = graph.run(), conv(x)
    assert relative_error(got, want) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert got.dtype == want.dtype
    moved = [d for d in range(want.dim()) if want.shape[d] > 1]
    assert [got.stride(d) for d in moved] == [want.stride(d) for d in moved]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stride": 2}, "stride (2, 2)"),
        ({"padding": 1}, "padding (1, 1)"),
    ],
    ids=["strided", "padded"],
)
def test_what_is_no_linear_is_refused_with_a_reason(options, reason):
    gm, report = whole(build(nn.Conv2d, WIDTH, WIDTH, 1, **options), image())
    assert targets(gm) == ["conv2d"]
    (site,) = report.sites
    assert (site.planned, site.done) == ("w8a8", None)
    assert reason in (site.reason or "")
    assert site.flops > 0


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 3}, {"kernel_size": 1, "groups": 2}, {"kernel_size": 1, "groups": WIDTH}],
    ids=["3x3", "grouped", "depthwise"],
)
def test_other_convolutions_are_no_sites(options):
    gm, report = whole(build(nn.Conv2d, WIDTH, WIDTH, **options), image())
    assert targets(gm) == ["conv2d"]
    assert report.sites == []


@pytest.mark.parametrize(
    ("model", "keep", "reason"),
    [
        (lambda: nn.Conv2d(WIDTH, WIDTH, 1), ("*",), "kept by pattern"),
        (lambda: nn.Conv2d(WIDTH, 8, 1), (), "fewer than 32 channels"),
        (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(WIDTH, WIDTH, 1)), (), "conditioning"),
        (lambda: nn.Sequential(nn.AdaptiveAvgPool2d((4, 2)), nn.Conv2d(WIDTH, WIDTH, 1)), (), "M=16 rows"),
    ],
    ids=["keep", "channels", "pooled", "rows"],
)
def test_what_stays_in_full_precision_stays_the_same_call(model, keep, reason):
    model = build(model)
    before, (after, report) = capture(model, image()), whole(model, image(), keep=keep)
    (site,) = report.sites
    assert reason in (site.reason or "")
    assert site.planned is None
    assert [n.format_node() for n in after.graph.nodes] == [n.format_node() for n in before.graph.nodes]
    assert count(after, "conv2d") == 1


def test_a_patch_embedder_of_kernel_one_stays_and_is_a_stem():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(WIDTH, 8, 1)
            self.wide = nn.Conv2d(WIDTH, 8, 1)
            self.body = tiny_dit(1)

        def forward(self, x, t):
            return self.body(self.patches(x).flatten(2).transpose(1, 2), t)

    gm, report = whole(build(Embedded), image(), torch.tensor([1.0, 500.0]))
    site = report.site("patches")
    assert (site.role, site.planned) == ("stem", None)
    assert "embeds the model's input" in (site.reason or "")
    assert count(gm, "conv2d") == 1


def test_a_weight_that_the_graph_writes_is_refused():
    conv = build(nn.Conv2d, WIDTH, WIDTH, 1)

    def call(x):
        conv.weight.mul_(0.5)
        return conv(x)

    gm, report = whole(call, image())
    assert "written inside the graph" in (report.sites[0].reason or "")
    assert count(gm, "conv2d") == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda conv, x: conv(x).add_(1).permute(0, 2, 3, 1),
        lambda conv, x: (h := conv(x), h.permute(0, 2, 3, 1), h.mul_(3))[1],
        lambda conv, x: (p := (y := x.permute(0, 2, 3, 1) * 1).permute(0, 3, 1, 2), y.mul_(3), conv(p))[2],
        lambda conv, x: (
            p := (y := x.permute(0, 2, 3, 1) * 1).permute(0, 3, 1, 2).contiguous(),
            y.mul_(3),
            conv(p),
        )[2],
        lambda conv, x: (y := x * 1, h := F.silu(y), y.mul_(3), conv(h))[3],
        lambda conv, x: (y := x * 1, a := conv(y), y.mul_(3), a + conv(y))[3],
        lambda conv, x: (
            y := x * 1,
            v := y.view(x.shape),
            a := conv(v),
            y[:].mul_(3),
            a + conv(v),
        )[4],
        lambda conv, x: (y := conv(x), a := conv(y), y.mul_(3), a + conv(y))[3],
        lambda conv, x: (y := conv(x), h := F.silu(y), y.mul_(3), conv(h) + conv(y))[3],
        lambda conv, x: (y := x * 1, a := conv(y), y.moveaxis(1, 2).mul_(3), a + conv(y))[3],
        lambda conv, x: (y := x * 1, a := conv(y), y.swapdims(1, 2).mul_(3), a + conv(y))[3],
        lambda conv, x: (y := x * 1, a := conv(y), F.dropout2d(y, 0.1, False).mul_(3), a + conv(y))[3],
    ],
    ids=(
        "result view-of-result tokens copied-tokens activated read-twice view-read-twice result-read-twice "
        "result-activated moved-axis swapped-dims idle-dropout"
    ).split(),
)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_writes_in_place_keep_their_order(write, form):
    conv, x = build(nn.Conv2d, WIDTH, WIDTH, 1), image().to(memory_format=form)
    gm, values = capture_with_values(lambda x: write(conv, x), x.clone())
    ctx = context()
    PassPipeline(passes=(Normalize(), AnnotateSites(), LinearizeConvolutions())).run(gm, ctx)
    assert count(gm, "conv2d") == 0
    got = gm(*(values[n.name] for n in gm.graph.nodes if n.op == "placeholder"))[0]
    assert relative_error(got, write(conv, x.clone())) < 1e-5


def test_convolutions_of_one_image_share_one_quantize_and_run_as_one():
    class Projections(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Conv2d(WIDTH, 32, 1), nn.Conv2d(WIDTH, WIDTH, 1)

        def forward(self, x):
            return self.q(x).sum(1), self.k(x)

    model = build(Projections)
    gm, report = whole(model, image())
    assert count(gm, "quantize_per_token") == 1
    assert count(gm, "linear_w8a8") == 1
    assert [site.joined for site in report.sites] == ["q", "q"]
    assert not [n for n in gm.graph.nodes if n.target is torch.flatten], "the weights are inputs"
    fast = torch.compile(model, backend="viditq")(image())
    assert max(relative_error(got, want) for got, want in zip(fast, model(image()), strict=True)) < 0.02


def test_sites_flops_and_folded_ops_of_a_feed_forward():
    gm, report = whole(build(OfTokens), tokens())
    up, down = report.site("up"), report.site("down")
    rows = BATCH * HEIGHT * BREADTH
    assert (up.rows, up.depth, up.width, up.flops) == (str(rows), WIDTH, 4 * WIDTH, 8 * rows * WIDTH * WIDTH)
    assert (down.rows, down.flops) == (str(rows), 4 * rows * WIDTH * WIDTH)
    assert up.bytes_full == 4 * 4 * WIDTH * WIDTH
    assert up.bytes_packed == 4 * WIDTH * WIDTH + 4 * 4 * WIDTH
    assert (up.role, down.role) == ("ffn.up", "ffn.down")
    assert (up.done, down.done, down.prologue) == ("w8a8", "w8a8", "silu*gate")
    assert len(report.sites) == 2, "each is counted once"
    size = len(gm.graph.nodes)
    for step in default_passes():
        step.run(gm, context())
    assert len(gm.graph.nodes) == size


def test_symbolic_sizes():
    class Any(OfTokens):
        def forward(self, image):
            return self.down(self.depth(self.up(image)).chunk(2, dim=1)[0])

    _, report = whole(build(Any), image(), dynamic=True)
    assert [site.done for site in report.sites] == ["w8a8", "w8a8"]
    assert all(site.flops and site.flops_hinted for site in report.sites)


@pytest.mark.parametrize(
    "call",
    [
        lambda conv, x: F.conv2d(input=x, weight=conv.weight, bias=conv.bias),
        lambda conv, x: F.conv2d(x, conv.weight, bias=conv.bias, stride=(1, 1), groups=1),
        lambda conv, x: F.linear(x.movedim(1, -1), conv.weight.view(96, WIDTH), conv.bias).movedim(-1, 1),
        lambda conv, x: F.linear(x.movedim(1, -1), conv.weight.squeeze(-1).squeeze(-1), conv.bias).movedim(
            -1, 1
        ),
    ],
    ids=["keywords", "some-keywords", "linear-view", "linear-squeeze"],
)
def test_other_spellings_are_quantized_alike(call):
    conv, x = build(nn.Conv2d, WIDTH, 96, 1), image()
    gm, report = whole(lambda x: call(conv, x), x)
    assert [site.done for site in report.sites] == ["w8a8"]
    assert count(gm, "linear_w8a8") == 1


def test_a_weight_regrouped_into_other_rows_is_refused():
    weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    _, report = whole(lambda x: F.linear(x, weight.view(32, 128)), torch.randn(40, 128))
    assert "not a parameter" in (report.sites[0].reason or "")


def test_low_rank_adapters_of_a_convolution_stay_beside_it():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Conv2d(WIDTH, WIDTH, 1)
            self.a, self.b = nn.Conv2d(WIDTH, 4, 1, bias=False), nn.Conv2d(4, WIDTH, 1, bias=False)

        def forward(self, x):
            return self.base(x) + 0.5 * self.b(self.a(x))

    gm, report = whole(build(Adapted), image())
    assert [site.fqn for site in report.sites if site.done] == ["base"]
    assert count(gm, "conv2d") == 2
