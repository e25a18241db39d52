"""What backend="viditq" has Inductor generate on a CPU: kernels, how many, their trace and their cache key."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.small_models import compiled, relative_error, tiny_dit, tiny_inputs
from viditq_fx.cpu_kernels.int8_gemm import kernel_name
from viditq_fx.lowering import select_cpu
from viditq_fx.ops.native import native_unavailable
from viditq_fx.ops.onednn import onednn_is_exact
from viditq_fx.passes.hoist_quantize import HoistQuantize
from viditq_fx.runtime import executions


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


@pytest.mark.skipif(native_unavailable() is not None, reason=str(native_unavailable()))
@pytest.mark.parametrize("scheme", ["w8a8", "w8a7"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
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
