"""1x1 convolutions as users hold them: compiled, released, quantized in place, saved, loaded, written."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import viditq_fx as vq
from tests.small_models import relative_error
from viditq_fx.errors import ReleasedWeightError, StrictError, ViditqError, WeightError
from viditq_fx.ops.packed_weights import full_bytes, is_released, packed_bytes
from viditq_fx.quant_conv import QuantPointwiseConv
from viditq_fx.runtime import executions
from viditq_fx.scheme import QuantScheme

ERROR = 0.02
RELEASE = {"weights": "release"}
W8A8 = QuantScheme.parse("w8a8")
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.fixture
def eager_inductor(monkeypatch):
    """Execute what the backend hands to Inductor as it is."""
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)


class Block(nn.Module):
    """1x1, SiLU, depthwise 3x3, gate, 1x1 over images, as U-Nets and Sana have them."""

    def __init__(self, width=64):
        super().__init__()
        self.up = nn.Conv2d(width, 4 * width, 1)
        self.depth = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.down = nn.Conv2d(2 * width, width, 1, bias=False)

    def forward(self, x):
        h, gate = self.depth(F.silu(self.up(x))).chunk(2, dim=1)
        return x + self.down(h * F.silu(gate))


def block(batch=3, height=9, seed=0):
    torch.manual_seed(seed)
    return Block().requires_grad_(False), torch.randn(batch, 64, height, 7)


def conv(dims=2, seed=0):
    torch.manual_seed(seed)
    return CONVS[dims](64, 96, 1).requires_grad_(False), torch.randn(3, 64, 20, *(2, 3)[: dims - 1])


def sqnr(want, got):
    want, noise = want.double(), (want - got).double()
    return float(10 * torch.log10(want.square().mean() / noise.square().mean()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_generated_code_of_any_size(dtype, last):
    """Inductor's code, dynamic shapes, one graph for three sizes; the result lies in memory as eager's does."""
    model, _ = block()
    model.to(dtype)
    fast = torch.compile(model, backend="viditq", dynamic=True, fullgraph=True)
    with executions() as ran:
        for batch, height in ((3, 9), (2, 5), (4, 16)):
            x = torch.randn(batch, 64, height, 7).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            want, got = model(x), fast(x)
            assert got.dtype == dtype
            assert got.stride() == want.stride()
            assert sqnr(want, got) > 35
    assert len({id(run.report) for run in ran}) == 1
    assert [site.done for site in ran[0].report.sites] == ["w8a8", "w8a8"]


@pytest.mark.parametrize("dims", CONVS)
def test_generated_code_of_each_rank(dims):
    layer, x = conv(dims)
    with executions() as ran:
        assert relative_error(torch.compile(layer, backend="viditq")(x), layer(x)) < ERROR
    (site,) = ran[0].report.sites
    assert (site.done, site.rows, site.depth, site.width) == ("w8a8", str(x.numel() // 64), 64, 96)
    assert site.kernel


@pytest.mark.usefixtures("eager_inductor")
def test_a_view_that_only_rows_in_order_allow():
    """The eager result is contiguous here, and what comes after may rely on it."""
    layer, x = conv()
    fast = torch.compile(lambda x: layer(x).view(3, -1), backend="viditq", fullgraph=True)
    assert relative_error(fast(x), layer(x).view(3, -1)) < ERROR


@pytest.mark.usefixtures("eager_inductor")
def test_writes_and_loaded_checkpoints_are_noticed():
    layer, x = conv()
    call = torch.compile(layer, backend="viditq")
    call(x)
    layer.weight.mul_(-3)
    assert relative_error(call(x), layer(x)) < ERROR
    layer.load_state_dict(conv(seed=7)[0].state_dict())
    assert relative_error(call(x), layer(x)) < ERROR
    layer.weight.data.neg_()
    assert relative_error(call(x), layer(x)) > 1, "a write through .data leaves no trace"
    assert vq.repack(layer) == 1
    assert relative_error(call(x), layer(x)) < ERROR


@pytest.mark.usefixtures("eager_inductor")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_released(last):
    model, x = block()
    if last:
        model.to(memory_format=torch.channels_last)
    want = model(x)
    call = torch.compile(model, backend="viditq", options=RELEASE)
    for _ in range(2):
        assert relative_error(call(x), want) < ERROR
    assert [is_released(c.weight) for c in (model.up, model.depth, model.down)] == [True, False, True]
    assert (full_bytes(model.up.weight), packed_bytes(model.up.weight) > 0) == (0, True)
    assert torch.isnan(model.up.weight.sum())
    report = vq.explain(call, x)
    assert report.totals()["quantized_weight_bytes_full_resident"] == 0
    for use in (lambda: model(x), model.state_dict):
        with pytest.raises(ReleasedWeightError, match=r"up\.weight: its full-precision memory was released"):
            use()
    with pytest.raises(ReleasedWeightError, match="was released"):
        copy.deepcopy(model)(x)
    state = block(seed=3)[0].state_dict()
    model.load_state_dict(state)
    assert not is_released(model.up.weight)
    want = model(x)
    assert relative_error(call(x), want) < ERROR


@pytest.mark.usefixtures("eager_inductor")
def test_a_copied_released_weight_is_refused_elsewhere():
    layer, x = conv()
    torch.compile(layer, backend="viditq", options=RELEASE)(x)
    other = conv()[0]
    other.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    with pytest.raises(WeightError, match="holds NaN or infinity"):
        torch.compile(other, backend="viditq")(x)


@pytest.mark.parametrize("dims", CONVS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_replaces_convolutions(dims, dtype):
    layer, x = conv(dims)
    model, x = nn.Sequential(layer).to(dtype), x.to(dtype)
    want = model(x)
    report = vq.quantize_(model, (x,))
    quantized = model[0]
    assert isinstance(quantized, QuantPointwiseConv)
    assert report.site("0").done == "w8a8"
    got = model(x)
    assert relative_error(got, want) < ERROR
    assert (got.stride(), got.dtype) == (want.stride(), dtype)
    assert relative_error(model(x[0]), want[0]) < ERROR, "without a batch"
    assert quantized.weight.shape == layer.weight.shape
    assert relative_error(quantized.weight, layer.weight) < ERROR
    assert (quantized.in_channels, quantized.out_channels, quantized.kernel_size) == (64, 96, (1,) * dims)
    assert report.site("0").bytes_packed == 64 * 96 + 4 * 96


@pytest.mark.slow
def test_a_quantized_model_compiles_copies_saves_and_loads():
    model, x = block()
    want = model(x)
    report = vq.quantize_(model, (x,), strict=True)
    assert [site.done for site in report.sites] == ["w8a8", "w8a8"]
    assert isinstance(model.depth, nn.Conv2d)
    eager = model(x)
    assert relative_error(eager, want) < ERROR
    compiled = torch.compile(model, backend="viditq", fullgraph=True)
    assert relative_error(compiled(x), eager) < 2e-3
    assert len([site for site in vq.explain(compiled, x).sites if site.done]) == 2
    assert torch.equal(copy.deepcopy(model)(x), eager)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other, _ = block(seed=4)
    vq.quantize_(other, (x,))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), eager)
    other.load_state_dict(block(seed=5)[0].state_dict())
    assert relative_error(other(x), block(seed=5)[0](x)) < ERROR, "full-precision [N, K, 1, 1] is quantized"
    state = block()[0].state_dict()
    state["up.weight"] = state["up.weight"].flatten(1)
    with pytest.raises(RuntimeError, match=r"up\.weight: a float dtype of shape \(256, 64, 1, 1\) expected"):
        other.load_state_dict(state)


@pytest.mark.usefixtures("eager_inductor")
def test_eager_and_compiled_agree_bit_for_bit():
    """The same integers and scales, whether the module or the pass took the channels last."""
    model, x = block()
    call = torch.compile(model, backend="viditq")(x)
    vq.quantize_(model, (x,))
    assert torch.equal(model(x), call)


@settings(max_examples=30, deadline=None)
@given(
    dims=st.sampled_from((1, 2, 3)),
    sizes=st.lists(st.integers(1, 7), min_size=3, max_size=3),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    last=st.booleans(),
)
def test_the_layer_is_the_convolution_of_its_dequantized_weight(dims, sizes, widths, last):
    torch.manual_seed(0)
    layer = CONVS[dims](*widths, 1).requires_grad_(False)
    quantized = QuantPointwiseConv.from_conv(layer, W8A8)
    x = torch.randn(2, widths[0], *sizes[:dims])
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    layer.weight.copy_(quantized.weight)
    want, got = layer(x), quantized(x)
    bound = x.abs().amax(1, keepdim=True) / 127 / 2 * quantized.weight.flatten(1).abs().sum(1).amax()
    assert ((got - want).abs() <= bound * 1.01 + 1e-5).all()


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}], ids=["strided", "padded"])
def test_quantize_names_what_it_leaves(options):
    model = nn.Sequential(nn.Conv2d(64, 64, 1, **options)).requires_grad_(False)
    x = torch.randn(2, 64, 12, 12)
    report = vq.quantize_(model, (x,))
    assert isinstance(model[0], nn.Conv2d)
    assert report.site("0").done is None
    assert next(iter(options)) in (report.site("0").reason or "")
    with pytest.raises(StrictError, match="0: pointwise convolution"):
        vq.quantize_(model, (x,), strict=True)
    with pytest.raises(ViditqError, match="here: a pointwise convolution"):
        QuantPointwiseConv.from_conv(model[0], W8A8, "here")


def test_a_convolution_that_the_call_does_not_show_is_named():
    class Idle(Block):
        def __init__(self):
            super().__init__()
            self.idle = nn.Conv2d(64, 64, 1)

    report = vq.quantize_(Idle().requires_grad_(False), (block()[1],))
    assert [reason for reason in report.rejects if reason.startswith("idle: no graph of the call shows")]
    assert len(report.rejects) == 1, "the depthwise convolution is no linear"


def test_a_convolution_with_a_forward_of_its_own_is_refused():
    class Scaled(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return 2 * super()._conv_forward(input, weight, bias)

    model, x = nn.Sequential(Scaled(64, 64, 1)).requires_grad_(False), torch.randn(2, 64, 6, 6)
    report = vq.quantize_(model, (x,))
    assert "Scaled has a forward of its own" in (report.site("0").reason or "")
    assert type(model[0]) is Scaled
