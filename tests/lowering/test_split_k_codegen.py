"""What Inductor generates for CUDA where K is split: int32 parts, then one expression fused with what follows."""

import re

import pytest
import torch
from nogpu.fake_cuda import missing
from torch.nn import functional as F

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

from nogpu.assemble import assemble_generated, kernel_sources
from nogpu.fake_cuda import cuda_code
from nogpu.interpreter import run_interpreted

from viditq_fx.lowering import inductor_compat
from viditq_fx.lowering.install import install
from viditq_fx.lowering.kernel_log import kernel_log
from viditq_fx.ops.quantize import quantize_per_channel, quantize_per_token
from viditq_fx.triton_templates import linear_w8a8_split_k

pytestmark = pytest.mark.slow
BF16 = torch.bfloat16
DEPTH = 333


class Down(torch.nn.Module):
    """A W8A8 linear of text tokens, then GELU and quantize, or a gate."""

    def __init__(self, depth=12288, width=3072, dtype=BF16, then="quantize", device="cuda"):
        super().__init__()
        self.dtype, self.then = dtype, then
        self.register_buffer("w", torch.empty(width, depth, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(width, device=device))
        for name in ("bias", "gate"):
            self.register_buffer(name, torch.empty(width, dtype=dtype, device=device))

    def forward(self, x, x_scale):
        y = torch.ops.viditq.linear_w8a8(x, x_scale, self.w, self.scale, self.bias, self.dtype)
        if self.then == "gate":
            return y * self.gate
        return torch.ops.viditq.quantize_per_token(F.gelu(y, approximate="tanh"), 8)


def generate(tokens=77, cc=90, dynamic=None, **options):
    """(generated code, its arguments' names, kernel log)."""

    def make():
        model = Down(**options)
        x = torch.empty(1, tokens, model.w.shape[1], dtype=torch.int8, device="cuda")
        return model, x, torch.empty(1, tokens, 1, device="cuda")

    install()
    with kernel_log() as log, inductor_compat.wide_persistent_reductions():
        code, names = cuda_code(make, cc, dynamic)
    return code, names, log


@pytest.fixture
def always(monkeypatch):
    """Split whatever it costs: small shapes would not be."""
    monkeypatch.setitem(linear_w8a8_split_k.TEMPLATE.__dict__, "cost", lambda config, problem: 0.0)


@pytest.mark.parametrize("cc", [80, 90])
def test_sums_are_added_in_the_kernel_that_quantizes(cc):
    code, _, log = generate(cc=cc)
    (entry,) = log.values()
    assert re.fullmatch(r"triton:linear_w8a8_split_k \S+ split [24] s\d w\d", entry.kernel), entry.kernel
    assert entry.reason == "estimated best tile"
    (gemm, gemm_source), (quantize, source) = kernel_sources(code).items()
    assert "_tem_" in gemm
    assert "_per_" in quantize
    parts = int(re.search(r"split (\d)", entry.kernel)[1])
    assert len(re.findall(r"'\*i32'", source)) == 1
    assert len(re.findall(r"tl\.load\(in_ptr0", source)) == parts
    assert not re.search(r"'out_ptr\d': '\*bf16'", source)
    result = assemble_generated(gemm, gemm_source, cc)
    assert (result.spills, result.stack_bytes) == (0, 0), result
    assert set(result.sass_mma) == {"IGMMA" if cc == 90 else "IMMA"}


def test_a_shallow_k_or_many_rows_are_not_split():
    for options in ({"depth": 3072}, {"tokens": 512}):
        _, _, log = generate(then="gate", **options)
        assert [e.kernel.split()[0] for e in log.values()] == ["triton:linear_w8a8"], options


def interpreted(code, names, model, tokens):
    """(arguments of the generated code, what the model computes) for that many rows."""
    inputs = quantize_per_token(torch.randn(1, tokens, DEPTH), 8)
    values = dict(zip(("l_x_", "l_x_scale_"), inputs, strict=True))
    values |= {f"l_self_buffers_{name}_": buffer for name, buffer in model.named_buffers()}
    values |= dict(zip((n for n in names if re.fullmatch(r"s\d+", n)), (tokens, DEPTH), strict=True))
    return [values[name] for name in names], model(*inputs)


def test_generated_code_computes_the_reference_for_other_rows_too(always, tmp_path):
    """M is symbolic: compiled for 37 rows, run with 37 and with 67; N and K are ragged."""
    torch.manual_seed(0)
    w_NK, scale_N = quantize_per_channel(torch.randn(50, DEPTH) * DEPTH**-0.5, 8)
    buffers = {"w": w_NK, "scale": scale_N, "bias": torch.randn(50), "gate": torch.randn(50)}
    payload, wanted = [], []
    for then in ("quantize", "gate"):
        sizes = {"depth": DEPTH, "width": 50, "dtype": torch.float32, "then": then}
        code, names, log = generate(tokens=37, dynamic=True, **sizes)
        assert [e.kernel.split()[0] for e in log.values()] == ["triton:linear_w8a8_split_k"]
        model = Down(**sizes, device="cpu")
        model.load_state_dict(buffers)
        for tokens in (37, 67):
            args, want = interpreted(code, names, model, tokens)
            payload.append((code, args))
            wanted.append(want)
    results = run_interpreted("nogpu.run_generated", payload, tmp_path)
    for (got, scale), (want, want_scale) in zip(results[:2], wanted[:2], strict=True):
        assert int((got.int() - want.int()).abs().max()) <= 1  # tanh may round differently
        torch.testing.assert_close(scale, want_scale, rtol=1e-5, atol=0)
    for (got,), want in zip(results[2:], wanted[2:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_split_that_the_estimate_prefers_is_taken_untimed(monkeypatch):
    monkeypatch.setattr(inductor_compat, "wants_autotuning", lambda: True)
    _, _, log = generate()
    (entry,) = log.values()
    assert entry.kernel.startswith("triton:linear_w8a8_split_k")
    assert entry.reason == "estimated best tile"
