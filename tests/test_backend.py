"""torch.compile(model, backend="viditq") as its user meets it: right numbers, clear errors, no surprises."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from tests.small_models import QUANTIZED_PER_LAYER, relative_error, tiny_dit, tiny_inputs
from viditq_fx.cpu_kernels.int8_gemm import kernel_name
from viditq_fx.errors import OptionError, SchemeError, StrictError, WeightError
from viditq_fx.lowering import select_cpu
from viditq_fx.ops.native import native_unavailable
from viditq_fx.ops.onednn import onednn_is_exact
from viditq_fx.passes.hoist_quantize import HoistQuantize
from viditq_fx.runtime import executions

ERROR = 0.02
"""W8A8 over one or two random blocks stays below this relative error; measured 0.004 to 0.009."""
# One block wherever one will do: most of a test's time is the C++ compiler.


def compiled(model, **kwargs):
    return torch.compile(model, backend="viditq", **kwargs)


def run_counting(call, *args):
    """(result, sites quantized in each graph that ran)."""
    with executions() as ran:
        result = call(*args)
    return result, [sum(site.done is not None for site in run.report.sites) for run in ran]


def test_found_by_name_with_no_import():
    code = "import torch; print('viditq' in torch._dynamo.list_backends())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("scheme", ["w8a8", "w8a7"])
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_close_to_fp32(scheme, grad_mode):
    model, inputs = tiny_dit(1), tiny_inputs()
    with grad_mode():
        want = model(*inputs)
        got, quantized = run_counting(compiled(model, options={"scheme": scheme}, fullgraph=True), *inputs)
    assert quantized == [QUANTIZED_PER_LAYER]
    assert 0 < relative_error(got, want) < ERROR * (1 if scheme == "w8a8" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, inputs = tiny_dit(1), tiny_inputs()
    with torch.no_grad():
        want = model(*inputs)
        got, quantized = run_counting(compiled(model.to(dtype)), inputs[0].to(dtype), inputs[1])
    assert got.dtype == dtype
    assert quantized == [QUANTIZED_PER_LAYER]
    assert relative_error(got, want) < 2 * ERROR


@pytest.mark.slow
def test_autocast():
    model, inputs = tiny_dit(1), tiny_inputs()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(*inputs)
        got, quantized = run_counting(compiled(model), *inputs)
    assert got.dtype == want.dtype == torch.bfloat16
    assert quantized == [QUANTIZED_PER_LAYER]
    assert relative_error(got, want) < 2 * ERROR


@pytest.mark.slow
def test_module_compile_method_and_second_shape():
    model = tiny_dit(1)
    want = {n: model(*tiny_inputs(tokens=n)) for n in (40, 56, 33)}
    model.compile(backend="viditq")
    with torch.no_grad():
        for tokens, reference in want.items():
            assert relative_error(model(*tiny_inputs(tokens=tokens)), reference) < ERROR


@pytest.mark.slow
def test_dynamic_shapes_compile_once():
    model = tiny_dit(1)
    call = compiled(model, dynamic=True, fullgraph=True)
    graphs = set()
    with torch.no_grad():
        for batch, tokens in ((2, 40), (1, 64), (3, 33), (4, 100), (2, 77)):
            inputs = tiny_inputs(batch, tokens)
            with executions() as ran:
                got = call(*inputs)
            graphs |= {id(run.report) for run in ran}
            assert relative_error(got, model(*inputs)) < ERROR
    assert len(graphs) <= 2  # batch 1 is a graph of its own in Dynamo, whatever the backend


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_batches(batch):
    model, inputs = nn.Linear(64, 64).requires_grad_(False), (torch.randn(batch, 40, 64),)
    with torch.no_grad():
        assert relative_error(compiled(model)(*inputs), model(*inputs)) < ERROR


def test_empty_batch():
    model, (x, t) = tiny_dit(1), tiny_inputs()
    with torch.no_grad():
        assert compiled(model)(x[:0], t[:0]).shape == (0, 40, 8)


@pytest.mark.slow
def test_a_row_of_nan_stays_in_its_sample():
    model, (x, t) = tiny_dit(1), tiny_inputs(batch=3)
    x[1, 5] = float("nan")
    with torch.no_grad():
        got, want = compiled(model)(x, t), model(x, t)
    assert torch.equal(torch.isnan(got), torch.isnan(want))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_non_contiguous_inputs(layout):
    base = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(3))
    x = {
        "transposed": lambda: base.transpose(1, 2),
        "sliced": lambda: torch.cat([base, base], 2).transpose(1, 2)[:, ::2],
        "expanded": lambda: base[:1].transpose(1, 2).expand(2, -1, -1),
    }[layout]()
    model, t = tiny_dit(1), torch.tensor([1.0, 500.0])
    with torch.no_grad():
        assert relative_error(compiled(model)(x, t), model(x, t)) < ERROR


@pytest.mark.parametrize(("depth", "width"), [(33, 65), (40, 100), (72, 36), (1153, 33)])
def test_odd_channels(depth, width):
    layer = nn.Linear(depth, width).requires_grad_(False)
    x = torch.randn(19, depth)
    got, quantized = run_counting(torch.no_grad()(compiled(layer)), x)
    assert quantized == [1]
    assert relative_error(got, layer(x)) < ERROR


def test_a_model_with_no_linear():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).requires_grad_(False)
    x = torch.randn(1, 3, 8, 8)
    got, quantized = run_counting(compiled(model), x)
    assert quantized == [0]
    torch.testing.assert_close(got, model(x))


def test_tied_weights_are_packed_once():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).requires_grad_(False)
    model[2].weight = model[0].weight
    x = torch.randn(40, 64)
    with executions() as ran:
        got = compiled(model)(x)
    assert len(ran[0].weights) == 1
    assert relative_error(got, model(x)) < ERROR


def test_two_instances_of_one_class():
    first, second, inputs = tiny_dit(1, seed=0), tiny_dit(1, seed=1), tiny_inputs()
    with torch.no_grad():
        for model in (first, second, first):
            assert relative_error(compiled(model)(*inputs), model(*inputs)) < ERROR


def test_one_compiled_block_runs_with_the_weights_of_many():
    """Fails if weights are baked: the three blocks share one compiled graph."""
    model, inputs = tiny_dit(3), tiny_inputs()
    with torch.no_grad():
        want = model(*inputs)
        for block in model.blocks:
            block.compile(backend="viditq", fullgraph=True)
        with executions() as ran:
            got = model(*inputs)
    assert len(ran) == 3
    assert len({id(run.report) for run in ran}) == 1
    assert relative_error(got, want) < ERROR


def test_graph_breaks_are_compiled_piece_by_piece():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    model, x = Broken().requires_grad_(False), torch.randn(40, 64)
    got, quantized = run_counting(compiled(model), x)
    assert quantized == [1, 1]
    assert relative_error(got, model(x)) < ERROR


def test_weight_updates_are_noticed():
    layer, x = nn.Linear(64, 64).requires_grad_(False), torch.randn(40, 64)
    call = compiled(layer)
    call(x)
    layer.weight.mul_(-2)
    assert relative_error(call(x), layer(x)) < ERROR
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    assert relative_error(call(x), layer(x)) < ERROR
    layer.load_state_dict(nn.Linear(64, 64).state_dict(), assign=True)
    layer.requires_grad_(False)
    assert relative_error(call(x), layer(x)) < ERROR


def test_a_write_through_data_needs_repack():
    import viditq_fx as vq

    layer, x = nn.Linear(64, 64).requires_grad_(False), torch.randn(40, 64)
    call = compiled(layer)
    call(x)
    layer.weight.data.mul_(-2)
    assert vq.repack(layer) == 1
    assert relative_error(call(x), layer(x)) < ERROR


def test_gradients_get_plain_inductor_and_a_reject():
    layer, x = nn.Linear(64, 64), torch.randn(40, 64)
    call = compiled(layer)
    with pytest.warns(UserWarning, match="wants gradients"), executions() as ran:
        y = call(x)
    assert "wants gradients" in ran[0].report.rejects[0]
    y.square().sum().backward()
    got = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(x).square().sum().backward()
    torch.testing.assert_close(got, layer.weight.grad)
    with torch.no_grad():
        assert run_counting(call, x)[1] == [1], "without gradients the same model is quantized"


def test_strict_refuses_gradients():
    with pytest.raises(BackendCompilerFailed, match="wants gradients") as caught:
        compiled(nn.Linear(64, 64), options={"strict": True})(torch.randn(40, 64))
    assert isinstance(caught.value.inner_exception, StrictError)


def test_strict_refuses_a_refusal_and_names_the_site():
    model = nn.ModuleDict({"conv": nn.Conv2d(64, 64, 1, stride=2)}).requires_grad_(False)
    with pytest.raises(BackendCompilerFailed, match="conv: pointwise convolution of stride") as caught:
        compiled(lambda x: model["conv"](x), options={"strict": True})(torch.randn(2, 64, 16, 16))
    assert isinstance(caught.value.inner_exception, StrictError)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"shceme": "w8a8"}, OptionError, "did you mean 'scheme'"),
        ({"scheme": "w3a3"}, SchemeError, "not available"),
        ({"scheme": 8}, SchemeError, "a scheme is a name"),
        ({"max_autotune": "yes"}, OptionError, "should be bool"),
        ({"mode": "fastest"}, OptionError, "fastest"),
        ({"quantize_kernels": "fastest"}, OptionError, "auto.*inductor.*triton"),
    ],
)
def test_wrong_options_are_clear(options, kind, message):
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=message) as caught:
        compiled(nn.Linear(64, 64), options=options)(torch.randn(40, 64))
    assert isinstance(caught.value.inner_exception, kind)


def test_inductor_options_and_mode_reach_inductor():
    seen = {}

    def remember(graph):
        seen.update(
            fusion=torch._inductor.config.epilogue_fusion, autotune=torch._inductor.config.max_autotune
        )

    options = {
        "epilogue_fusion": False,
        "mode": "max-autotune-no-cudagraphs",
        "post_grad_custom_pre_pass": remember,
    }
    with torch.no_grad():
        compiled(nn.Linear(64, 64), options=options)(torch.randn(40, 64))
    assert seen == {"fusion": False, "autotune": True}


def test_meta_weight_is_refused_not_crashed():
    model = nn.Linear(64, 64, device="meta").requires_grad_(False)
    x, call = torch.randn(40, 64), compiled(model)
    with torch.no_grad(), pytest.raises(Exception) as plain:  # noqa: PT011 - torch's own refusal, whatever it is
        torch.compile(model, backend="inductor")(x)
    with torch.no_grad(), pytest.raises(type(plain.value), match="meta"):
        call(x)


def test_weight_with_nan_is_a_clear_error():
    layer = nn.Linear(64, 64).requires_grad_(False)
    layer.weight[3, 4] = float("nan")
    with pytest.raises(WeightError, match="weight: the weight holds NaN"):
        compiled(layer)(torch.randn(40, 64))


def test_kernel_choice_is_in_the_report():
    model, inputs = tiny_dit(1), tiny_inputs()
    with torch.no_grad(), executions() as ran:
        compiled(model)(*inputs)
    kernels = {site.kernel for site in ran[0].report.sites if site.done}
    ours = "fp32-exact" if native_unavailable() else kernel_name(8)
    assert kernels == {"onednn-u8" if onednn_is_exact(8) else ours}


def test_quantize_fuses_with_its_producer():
    """LayerNorm, modulate and quantize are one kernel, GELU and quantize another: no opaque op between."""
    from torch._inductor.utils import run_and_get_code

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x, shift, scale):
            h = F.layer_norm(x, (64,)) * (1 + scale) + shift
            return x + self.down(F.gelu(self.up(h)))

    model = Half().requires_grad_(False)
    args = (torch.randn(2, 40, 64), torch.randn(2, 1, 64), torch.randn(2, 1, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, (code, *_) = run_and_get_code(compiled(model), *args)
    body = code[code.index("def call") :]
    assert body.count("cpp_fused_") == 3, (
        "norm+modulate+quantize | epilogue+GELU+quantize | epilogue+residual"
    )
    assert "ops.viditq.quantize_per_token" not in body


@pytest.mark.slow
def test_streams_joined_before_a_linear_cost_no_kernel_more(monkeypatch):
    """Both streams are quantized before the cat: as many kernels as behind it, and the same bits."""
    from torch._inductor.utils import run_and_get_code

    class Joint(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(64, 192)

        def forward(self, x, text, scale):
            streams = (F.layer_norm(t, (64,)) * (1 + scale) for t in (text, x))
            return self.qkv(torch.cat([*streams], 1))

    class JointAbove(Joint):
        def forward(self, x, text, scale):  # code of its own, so that Dynamo compiles it anew
            return super().forward(x, text, scale)

    args = (torch.randn(2, 40, 64), torch.randn(2, 24, 64), torch.randn(2, 1, 64))
    below, above = Joint().requires_grad_(False), JointAbove().requires_grad_(False)
    above.load_state_dict(below.state_dict())
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want_above, (code_above, *_) = run_and_get_code(compiled(above), *args)
        patch.setattr(HoistQuantize, "run", lambda self, gm, ctx: ())
        want_below, (code_below, *_) = run_and_get_code(compiled(below), *args)
    kernels = [code[code.index("def call") :].count("cpp_fused_") for code in (code_above, code_below)]
    assert kernels[0] <= kernels[1]
    assert "aten.cat" not in code_above[code_above.index("def call") :]
    assert relative_error(want_above, want_below) < 1e-6


def test_the_cache_key_holds_our_sources(monkeypatch):
    from viditq_fx.lowering import inductor_compat

    first = inductor_compat.cache_fingerprint().uuid()
    monkeypatch.setattr(inductor_compat, "source_digest", lambda: "edited")
    assert inductor_compat.cache_fingerprint().uuid() != first
    assert inductor_compat.cache_fingerprint(lambda graph: None).uuid() is None


@pytest.mark.slow
def test_each_pass_is_in_the_structured_trace(tmp_path):
    code = (
        "import torch; m = torch.nn.Linear(64, 64).requires_grad_(False); "
        "torch.compile(m, backend='viditq')(torch.randn(40, 64))"
    )
    env = {**os.environ, "TORCH_TRACE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
    text = "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    for name in ("normalize", "annotate_sites", "insert_qdq", "fuse_linear", "place_weights"):
        assert f"viditq_{name}" in text
    assert "torch.ops.viditq.linear_w8a8.default" in text


def test_a_pattern_that_names_nothing_is_told():
    told = r"keep='blocks\.7\.\*' names none of the \d+ linears.*roles here are .*attn\.out"
    with torch.no_grad(), pytest.warns(UserWarning, match=told):
        compiled(tiny_dit(1), options={"keep": ["blocks.7.*", "blocks.0.q"]})(*tiny_inputs())


@pytest.mark.slow
def test_patterns_reach_into_a_block_compiled_alone():
    model, inputs = tiny_dit(1), tiny_inputs()
    model.blocks[0].compile(backend="viditq", options={"keep": ["*.q", "ffn.*"]})
    with torch.no_grad(), executions() as ran:
        model(*inputs)
    kept = {site.fqn for site in ran[0].report.sites if "kept by pattern" in (site.reason or "")}
    assert kept == {"q", "up", "down"}


def test_a_global_pass_of_the_user_still_runs():
    seen = []
    with torch._inductor.config.patch(post_grad_custom_pre_pass=lambda graph: seen.append(len(graph.nodes))):
        with torch.no_grad():
            compiled(nn.Linear(64, 64))(torch.randn(40, 64))
    assert len(seen) == 1


@pytest.mark.slow
def test_linears_that_run_eagerly_are_listed():
    import viditq_fx as vq

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.forward = torch.compiler.disable(self.b.forward)

        def forward(self, x):
            return self.b(self.a(x))

    report = vq.explain(compiled(Half().requires_grad_(False)), torch.randn(40, 64))
    assert [site.fqn for site in report.sites] == ["a"]
    assert report.unseen == ["b"]
    assert "1 linears are in no compiled graph" in str(report)
    with pytest.raises(OptionError, match="did you mean 'scheme'"):
        vq.explain(Half(), torch.randn(40, 64), options={"shceme": "w8a8"})


@pytest.mark.skipif(native_unavailable() is not None, reason=str(native_unavailable()))
@pytest.mark.parametrize("scheme", ["w8a8", "w8a7"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_without_vnni_computes_the_same_by_our_kernel(monkeypatch, scheme, dtype):
    model, inputs = tiny_dit(1).to(dtype), tuple(t.to(dtype) for t in tiny_inputs())
    with torch.no_grad():
        want = compiled(model, options={"scheme": scheme})(*inputs)
        torch._dynamo.reset()
        monkeypatch.setattr(select_cpu, "onednn_is_exact", lambda bits: bits == 7)
        run = compiled(model, options={"scheme": scheme}, dynamic=True)
        with executions() as ran:
            got = run(*inputs)
        longer = run(torch.cat([inputs[0], inputs[0]], dim=1), inputs[1])
    bits = int(scheme[-1])
    assert {site.kernel for site in ran[0].report.sites if site.done} == {kernel_name(bits)}
    # The integers are the same; what Inductor fuses round them may round once otherwise.
    assert relative_error(got, want) < (1e-5 if dtype is torch.float32 else 1e-2)
    assert torch.isfinite(longer).all()
    assert len(ran) == 1
