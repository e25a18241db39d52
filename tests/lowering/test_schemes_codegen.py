"""What Inductor generates for CUDA from linears in 4 bits and in fp8: one kernel each, with what follows fused in."""

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

from viditq_fx.lowering.inductor_compat import wide_persistent_reductions
from viditq_fx.lowering.install import install
from viditq_fx.lowering.kernel_log import kernel_log
from viditq_fx.ops.weight_forms import linear_in_scheme, quantize_input, quantize_weight, stored_dtype
from viditq_fx.scheme import QuantScheme
from viditq_fx.triton_templates import linear_fp8, linear_w4a8

pytestmark = pytest.mark.slow
BF16 = torch.bfloat16
CASES = [(scheme, cc) for scheme in ("w4a8", "w4a8-g128") for cc in (80, 89, 90, 100)]
CASES += [("w4a8-g64", 80), ("w4a8-g64", 90)]
CASES += [("fp8", cc) for cc in (89, 90, 100)]
TEMPLATES = {
    "w4a8": "linear_w4a8",
    "w4a8-g128": "linear_w4a8_g128",
    "w4a8-g64": "linear_w4a8_g64",
    "fp8": "linear_w8a8_fp8",
}
POINTERS = {**dict.fromkeys(("w4a8", "w4a8-g128", "w4a8-g64"), "'*u8'"), "fp8": "'*fp8e4nv'"}
"""Types of the weight as it is stored."""


class FeedForward(torch.nn.Module):
    """LayerNorm, modulate, linear, GELU, linear, gate, residual: half of a DiT block, in one scheme."""

    def __init__(self, scheme, dim=1152, hidden=4608, dtype=BF16, device="cuda"):
        super().__init__()
        self.dim, self.dtype, self.scheme = dim, dtype, QuantScheme.parse(scheme)
        self.form = self.scheme.weight_form
        for name, (width, depth) in {"up": (hidden, dim), "down": (dim, hidden)}.items():
            groups = () if self.form.group is None else (-(-depth // self.form.group),)
            shape, kind = (width, self.form.stored_width(depth)), stored_dtype(self.form)
            stored = torch.empty(shape, dtype=kind, device=device)
            self.register_buffer(f"{name}_q", stored)
            self.register_buffer(f"{name}_scale", torch.empty(*groups, width, device=device))
            if self.form.grid:
                zero = torch.empty(*groups, width, dtype=torch.int8, device=device)
                self.register_buffer(f"{name}_zero", zero)
            self.register_buffer(f"{name}_bias", torch.empty(width, dtype=dtype, device=device))

    def linear(self, x, name):
        parts = ("q", "scale", *(["zero"] if self.form.grid else []))
        stored = tuple(getattr(self, f"{name}_{part}") for part in parts)
        bias = getattr(self, f"{name}_bias")
        return linear_in_scheme(self.scheme, x, *quantize_input(x, self.scheme), stored, bias, self.dtype)

    def forward(self, x, shift, scale, gate):
        h = F.layer_norm(x, (self.dim,)) * (1 + scale) + shift
        return x + gate * self.linear(F.gelu(self.linear(h, "up"), approximate="tanh"), "down")

    def fill(self):
        """Weights for a run: fake tensors had none."""
        torch.manual_seed(0)
        for name, depth in (("up", self.dim), ("down", self.up_q.shape[0])):
            width = getattr(self, f"{name}_q").shape[0]
            stored = quantize_weight(torch.randn(width, depth) * depth**-0.5, self.form)
            parts = dict(zip(("q", "scale", "zero"), stored, strict=False))
            for part, value in (parts | {"bias": torch.randn(width)}).items():
                getattr(self, f"{name}_{part}").copy_(value)


def inputs_of(model, batch=2, tokens=1024, device="cuda"):
    x = torch.randn(batch, tokens, model.dim, device=device).to(model.dtype)
    return x, *(torch.randn(batch, 1, model.dim, device=device).to(model.dtype) for _ in range(3))


def generate(scheme, cc=90, dynamic=None, tokens=1024, **sizes):
    """(generated code, names of its arguments, kernel log)."""

    def make():
        model = FeedForward(scheme, **sizes)
        return model, *inputs_of(model, tokens=tokens)

    install()
    with kernel_log() as log, wide_persistent_reductions():
        code, names = cuda_code(make, cc, dynamic)
    return code, names, log


@pytest.mark.parametrize(("scheme", "cc"), CASES)
def test_half_block_is_four_kernels_that_do_not_spill(scheme, cc):
    code, _, log = generate(scheme, cc)
    kernels = kernel_sources(code)
    assert [re.match(r"triton_(\w+?)_fused", name)[1] for name in kernels] == ["per", "tem", "per", "tem"]
    assert "extern_kernels." not in code.split("async_compile.wait")[1]
    assert [entry.kernel.split()[0] for entry in log.values()] == [f"triton:{TEMPLATES[scheme]}"] * 2
    assert [entry.reason for entry in log.values()] == ["estimated best tile"] * 2
    for kernel, source in kernels.items():
        if "_tem_" in kernel:
            assert POINTERS[scheme] in source
            assert assemble_generated(kernel, source, cc).spills == 0, kernel


@pytest.mark.parametrize("scheme", ["w4a8", "fp8"])
def test_gate_and_residual_are_in_the_store(scheme):
    *_, last = kernel_sources(generate(scheme)[0]).values()
    tail = last[last.index("y_acc = y_acc *") :]
    assert len(re.findall(r"tl\.load\(in_ptr\d", tail)) == 2  # residual and gate
    assert tail.count("tl.store(") == 1


def test_zero_points_are_read_in_the_store_a_byte_each():
    kernels = kernel_sources(generate("w4a8-asym")[0])
    assert [re.match(r"triton_(\w+?)_fused", name)[1] for name in kernels] == ["per", "tem", "per", "tem"]
    *_, last = kernels.values()
    zero = re.search(r"'(in_ptr\d)': '\*i8'", last)[1]
    tail = last[last.index("y_acc = y_acc *") :]
    assert f"tl.load({zero} + (tl.broadcast_to(idx_n, " in tail
    assert tail.count("tl.store(") == 1


def test_symbolic_tokens():
    code, _, log = generate("w4a8-g128", dynamic=True)
    templates = [source for name, source in kernel_sources(code).items() if "_tem_" in name]
    assert all(re.search(r"M = .*ks\d", source) for source in templates)
    assert all(re.search(r"\n    N = \d+\n    K = \d+\n", source) for source in templates)
    assert len(log) == 2


@pytest.mark.parametrize(
    ("scheme", "cc"),
    [
        ("w4a8", 90),
        ("w4a8-g128", 90),
        ("w4a8", 80),
        ("w4a8-g128", 80),
        ("w4a8-g64-asym", 90),
        ("w4a8-asym", 90),
        ("fp8", 90),
    ],
)
def test_generated_code_computes_the_reference(scheme, cc, tmp_path):
    """The whole wrapper in Triton's interpreter: ragged M, N and K, swapped tiles (sm_90) and plain ones."""
    sizes = {"dim": 72, "hidden": 200, "dtype": torch.float32}
    code, names, _ = generate(scheme, cc, tokens=37, **sizes)
    model = FeedForward(scheme, **sizes, device="cpu")
    model.fill()
    inputs = inputs_of(model, tokens=37, device="cpu")
    values = dict(zip(("l_x_", "l_shift_", "l_scale_", "l_gate_"), inputs, strict=True))
    values |= {f"l_self_buffers_{name}_": buffer for name, buffer in model.named_buffers()}
    ((got,),) = run_interpreted("nogpu.run_generated", [(code, [values[name] for name in names])], tmp_path)
    want = model(*inputs)
    assert (got - want).norm() / want.norm() < 1e-5


def declined(monkeypatch):
    for template in (*linear_w4a8.TEMPLATES, linear_fp8.TEMPLATE):
        monkeypatch.setitem(template.__dict__, "supports", lambda problem: "declined for the test")


def test_without_a_template_4_bits_run_the_reference_and_say_why(monkeypatch):
    declined(monkeypatch)
    code, _, log = generate("w4a8")
    assert code.count("torch.ops.viditq.linear_w4a8.default(") == 2
    assert {(e.kernel, e.reason) for e in log.values()} == {("eager reference", "declined for the test")}


def test_without_a_template_fp8_runs_cublas_where_that_computes_it(monkeypatch):
    declined(monkeypatch)
    code, _, log = generate("fp8")
    assert code.count("extern_kernels.viditq_scaled_mm_linear(") == 2
    assert {(e.kernel, e.reason) for e in log.values()} == {("extern:scaled_mm", "declined for the test")}
    _, _, log = generate("fp8", dtype=torch.float16)
    assert {e.kernel for e in log.values()} == {"simulation: e4m3 values, fp32 arithmetic"}
