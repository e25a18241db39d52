"""Weights as users hold, swap, write, save and load them: no stale copy, no freed memory in sight."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import viditq_fx as vq
from tests.small_models import relative_error
from viditq_fx.ops.blocked import is_freed
from viditq_fx.ops.onednn import onednn_is_exact
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.recipe import SitePlan
from viditq_fx.scheme import QuantScheme

ERROR = 0.02
SAME = 2e-3
W8A8 = QuantScheme.parse("w8a8")
needs_onednn = pytest.mark.skipif(not onednn_is_exact(8), reason="only oneDNN's layout frees plain memory")


class One(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.a = nn.Linear(64, width)

    def forward(self, x):
        return self.a(x)


def one(width=64, seed=0):
    torch.manual_seed(seed)
    return One(width).requires_grad_(False), torch.randn(2, 40, 64)


def compiled(model):
    return torch.compile(model, backend="viditq")


def quantized_and_run():
    """An int8 model whose weight sits in oneDNN's layout, its input, its result, an earlier state dict."""
    model, x = one()
    vq.quantize_(model, (x,))
    before = model.state_dict()
    want = model(x)
    assert relative_error(compiled(model)(x), want) < SAME
    return model, x, want, before


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 96])
def test_transposed_weights(width):
    model, x = one(width)
    kernel = torch.randn(64, width) / 8
    model.load_state_dict({"a.weight": kernel.T, "a.bias": torch.zeros(width)}, assign=True)
    want = model(x)
    assert not model.a.weight.is_contiguous()
    assert relative_error(compiled(model)(x), want) < ERROR
    vq.quantize_(model, (x,))
    assert relative_error(compiled(model)(x), want) < ERROR
    assert relative_error(model(x), want) < ERROR, "eager, after the compiled call"
    assert relative_error(model.a.weight, kernel.T) < ERROR


def test_a_weight_swapped_through_data_is_packed_again():
    """Offloading: a storage of the same address and version holds other values at every call."""
    model, x = one()
    call, offloaded = compiled(model), model.a.weight.data
    for _ in range(6):
        offloaded.mul_(-1.5)
        model.a.weight.data = offloaded.clone()
        assert relative_error(call(x), model(x)) < ERROR
        model.a.weight.data = offloaded


def test_inference_weights_warn_and_repack_finds_their_writes():
    with torch.inference_mode():
        model, x = one()
        call = compiled(model)
        with pytest.warns(UserWarning, match=r"a\.weight was made under torch.inference_mode.*repack"):
            call(x)
        model.a.weight.mul_(-3)
        assert vq.repack(model) == 1
        assert relative_error(call(x), model(x)) < ERROR


@pytest.mark.slow
def test_no_warning_for_weights_that_only_run_under_inference_mode():
    model, x = one()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="viditq")
        call = compiled(model)
        call(x)
        model.a.weight.mul_(-3)
        assert relative_error(call(x), model(x)) < ERROR


def test_repack_covers_buffers():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", torch.randn(64, 64))

        def forward(self, x):
            return nn.functional.linear(x, self.w)

    model, x = Buffered(), torch.randn(40, 64)
    call = compiled(model)
    with torch.no_grad():
        call(x)
        model.w.data.mul_(-2)
        assert vq.repack(model) == 1
        assert relative_error(call(x), model(x)) < ERROR


def test_quantized_under_inference_mode_it_loads_copies_and_moves_later():
    model, x = one()
    with torch.inference_mode():
        vq.quantize_(model, (x,))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    want = model(x)
    compiled(model)(x)
    model.load_state_dict(state)
    assert torch.equal(copy.deepcopy(model)(x), want)
    with torch.inference_mode():
        compiled(model)(x)
        model.to(torch.float32)
        model.load_state_dict(state)
    assert torch.equal(model(x), want)


@needs_onednn
def test_memory_of_a_state_dict_outlives_the_key():
    model, x, want, state = quantized_and_run()
    assert is_freed(model.a._weight_q)
    other, _ = one(seed=3)
    vq.quantize_(other, (x,))
    other.load_state_dict(state)
    assert torch.equal(other(x), want)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["a.weight_q"], model.a.weight_q)


def test_nothing_that_a_model_shows_has_freed_memory():
    model, x, want, _ = quantized_and_run()
    shown = [*model.buffers(), *model.state_dict().values(), model.a.weight_q, model.a.weight]
    assert all(torch.isfinite(tensor.float()).all() for tensor in shown)
    assert torch.equal(model.state_dict()["a.weight_q"], model.a.weight_q)
    assert model.a._weight_q.float().isfinite().all(), "the key reads as zeros and does not crash"
    assert torch.equal(model(x), want)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_export_after_a_compiled_call(strict, tmp_path):
    model, x, want, _ = quantized_and_run()
    program = torch.export.export(model, (x,), strict=strict)
    compiled(model)(x)
    assert relative_error(program.module()(x), want) < SAME
    torch.export.save(program, tmp_path / "program.pt2")
    assert relative_error(torch.export.load(tmp_path / "program.pt2").module()(x), want) < SAME


def test_a_model_mapped_from_a_file(tmp_path):
    model, x, want, _ = quantized_and_run()
    torch.save(model, tmp_path / "model.pt")
    mapped = torch.load(tmp_path / "model.pt", weights_only=False, mmap=True)
    assert relative_error(compiled(mapped)(x), want) < SAME
    assert torch.equal(mapped(x), want)


@pytest.mark.parametrize("backend", ["viditq", "inductor"])
def test_compiled_code_that_reads_the_weight(backend):
    class Reads(One):
        def forward(self, x):
            return nn.functional.linear(self.a(x), self.a.weight)

    torch.manual_seed(0)
    model, x = Reads().requires_grad_(False), torch.randn(2, 40, 64)
    vq.quantize_(model, (x,))
    want = model(x)
    call = torch.compile(model, backend=backend)
    for _ in range(2):
        assert relative_error(call(x), want) < SAME


def test_dynamic_shapes_leave_the_weight_static():
    seen = []

    def backend(gm, inputs):
        seen.extend(n.meta["example_value"].shape for n in gm.graph.nodes if n.name.endswith("weight_q"))
        return gm.forward

    model, x = one()
    vq.quantize_(model, (x,))
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=True)(x)
    assert [tuple(shape) for shape in seen] == [(64, 64)]
    assert all(type(size) is int for shape in seen for size in shape)


def broken(name, value):
    return lambda state: {**state, name: value(state)}


WRONG = {
    "scale of one": (broken("weight_scale", lambda s: torch.ones(1)), "weight_scale: torch.float32 of shape"),
    "scale in bf16": (broken("weight_scale", lambda s: s["weight_scale"].bfloat16()), "got torch.bfloat16"),
    "NaN scale": (broken("weight_scale", lambda s: s["weight_scale"] * float("nan")), "holds NaN"),
    "floats": (broken("weight_q", lambda s: s["weight_q"].float()), "weight_q: torch.int8 of shape"),
    "bias of one": (broken("bias", lambda s: torch.ones(1)), "size mismatch for bias"),
    "misspelt": (broken("weightq", lambda s: s["weight_q"]), r"Unexpected key.*weightq"),
    "two forms": (broken("weight", lambda s: torch.ones(64, 64)), "load one form"),
    "NaN weight": (lambda s: {"weight": torch.full((64, 64), float("nan")), "bias": s["bias"]}, "holds NaN"),
    "wrong shape": (lambda s: {"weight": torch.ones(1, 64), "bias": s["bias"]}, "a float dtype of shape"),
    "no scale": (lambda s: {"weight_q": s["weight_q"], "bias": s["bias"]}, r"Missing key.*weight_scale"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_state_is_an_error_and_changes_no_integer(case):
    change, message = WRONG[case]
    layer = QuantLinear.from_linear(nn.Linear(64, 64).requires_grad_(False), W8A8)
    before = layer.weight.clone()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(change(state))
    if case != "misspelt":  # as in torch, what fits is loaded before a stray key is reported
        assert torch.equal(layer.weight, before)


def test_assign_fills_a_layer_on_meta_and_copy_refuses_to():
    layer, x = QuantLinear.from_linear(nn.Linear(64, 64).requires_grad_(False), W8A8), torch.randn(3, 64)
    want = layer(x)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.to("meta")
    with pytest.raises(RuntimeError, match="assign=True"):
        layer.load_state_dict(state)
    layer.load_state_dict(state, assign=True)
    assert {tensor.device.type for tensor in (layer.weight, layer.weight_scale, layer.bias)} == {"cpu"}
    assert torch.equal(layer(x), want)


def test_an_earlier_handle_still_removes_its_hook():
    linear, seen = nn.Linear(64, 64).requires_grad_(False), []
    handle = linear.register_forward_hook(lambda *_: seen.append(1))
    layer = QuantLinear.from_linear(linear, W8A8)
    handle.remove()
    layer(torch.randn(3, 64))
    assert not seen


@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16])
def test_weight_dtype_follows_the_model(start):
    layer = QuantLinear.from_linear(nn.Linear(64, 64, dtype=start).requires_grad_(False), W8A8)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert layer.to(dtype).weight.dtype == dtype
    assert layer.weight_scale.dtype == torch.float32


def test_copies_of_tied_layers_stay_tied():
    layer = QuantLinear.from_linear(nn.Linear(64, 64).requires_grad_(False), W8A8)
    tied = nn.Sequential(layer, QuantLinear(layer._stored(), None, SitePlan(scheme=W8A8), torch.float32, 64))
    assert tied[0]._weight_q is tied[1]._weight_q
    for other in (copy.deepcopy(tied), pickle.loads(pickle.dumps(tied))):
        assert other[0]._weight_q is other[1]._weight_q
