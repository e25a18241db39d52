"""What Inductor generates for CUDA from linears whose input has a scale for each token and block of K."""

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
from viditq_fx.ops import LINEAR_W4A4, LINEAR_W4A8_BLOCK, PACK_INT4, QUANTIZE_PER_BLOCK
from viditq_fx.ops.pack import pack_int4
from viditq_fx.ops.quantize import quantize_per_channel, quantize_per_group
from viditq_fx.scheme import BLOCK, half_width
from viditq_fx.triton_templates import linear_w4_block

pytestmark = pytest.mark.slow
BF16 = torch.bfloat16
NOTE = "; 4-bit inputs are multiplied as int8: Triton has no int4 product"


class Layer(torch.nn.Module):
    """Quantize per block, linear, gate, residual; `bits` of the input, scales of groups of that many or not."""

    def __init__(self, bits, group, depth=1152, width=1152, dtype=BF16, device="cuda"):
        super().__init__()
        self.bits, self.group, self.depth, self.dtype = bits, group, depth, dtype
        groups = (-(-depth // group),) if group else ()
        self.register_buffer("w", torch.empty(width, half_width(depth), dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(*groups, width, device=device))
        self.register_buffer("bias", torch.empty(width, dtype=dtype, device=device))

    def forward(self, x, gate, residual):
        q, scale = QUANTIZE_PER_BLOCK.overload(F.gelu(x), self.bits, BLOCK)
        rest = (scale, self.w, self.scale, self.bias, self.dtype)
        if self.bits == 4:
            y = LINEAR_W4A4.overload(PACK_INT4.overload(q), *rest, self.depth)
        else:
            y = LINEAR_W4A8_BLOCK.overload(q, *rest)
        return residual + gate * y

    def fill(self):
        """Weights for a run: fake tensors had none."""
        gen = torch.Generator().manual_seed(0)
        w = torch.randn(self.w.shape[0], self.depth, generator=gen) * self.depth**-0.5
        q, scale = quantize_per_group(w, 4, self.group) if self.group else quantize_per_channel(w, 4)
        for buffer, value in (
            (self.w, pack_int4(q)),
            (self.scale, scale),
            (self.bias, torch.randn(q.shape[0])),
        ):
            buffer.copy_(value)


def inputs_of(model, tokens, device="cuda"):
    gen = torch.Generator(device=device).manual_seed(1) if device == "cpu" else None
    sizes = ((2, tokens, model.depth), (2, 1, model.w.shape[0]), (2, tokens, model.w.shape[0]))
    return tuple(torch.randn(*size, generator=gen, device=device).to(model.dtype) for size in sizes)


def generate(bits, group, cc=90, dynamic=None, tokens=1024, **sizes):
    """(generated code, names of its arguments, kernel log)."""

    def make():
        model = Layer(bits, group, **sizes)
        return model, *inputs_of(model, tokens)

    install()
    with kernel_log() as log, wide_persistent_reductions():
        code, names = cuda_code(make, cc, dynamic)
    return code, names, log


@pytest.mark.parametrize(("bits", "group", "cc"), [(8, 128, 80), (4, None, 90), (4, 128, 100), (8, 64, 90)])
def test_one_template_with_gate_and_residual_in_its_store(bits, group, cc):
    code, _, log = generate(bits, group, cc)
    kernels = kernel_sources(code)
    assert "extern_kernels." not in code.split("async_compile.wait")[1]
    (name,) = [name for name in kernels if "_tem_" in name]
    assert list(kernels)[-1] == name
    assert len(kernels) == (
        3 if bits == 4 else 2
    )  # the scales; packing, which reads two halves of a row; the GEMM
    signature = re.search(r"'signature': \{.*?\}", kernels[name])[0]
    assert (signature.count("'*u8'"), signature.count("'*i8'")) == ((2, 0) if bits == 4 else (1, 1))
    tail = kernels[name][kernels[name].index("y_acc = y_acc *") :]
    assert len(re.findall(r"tl\.load\(in_ptr\d", tail)) == 2  # residual and gate
    assert tail.count("tl.store(") == 1
    assert assemble_generated(name, kernels[name], cc).spills == 0
    (entry,) = log.values()
    template = f"linear_w4{'a4' if bits == 4 else 'a8_block'}{f'_g{group}' if group else ''}"
    assert entry.kernel.split()[0] == f"triton:{template}"
    assert entry.reason == "estimated best tile" + (NOTE if bits == 4 else "")


def test_symbolic_tokens():
    code, _, log = generate(4, 128, dynamic=True)
    (source,) = [source for name, source in kernel_sources(code).items() if "_tem_" in name]
    assert re.search(r"M = .*ks\d", source)
    assert re.search(r"\n\s+K : tl\.constexpr = 1152\n", source)
    assert len(log) == 1


@pytest.mark.parametrize(
    ("bits", "group", "cc"), [(8, None, 80), (8, 128, 90), (4, None, 80), (4, 128, 90), (4, 64, 80)]
)
def test_generated_code_computes_the_reference(bits, group, cc, tmp_path):
    """The whole wrapper in Triton's interpreter, ragged M, N and K: scales, packing, GEMM and what follows."""
    sizes = {"depth": 200, "width": 72, "dtype": torch.float32}
    code, names, _ = generate(bits, group, cc, tokens=37, **sizes)
    model = Layer(bits, group, **sizes, device="cpu")
    model.fill()
    inputs = inputs_of(model, 37, device="cpu")
    values = dict(zip(("l_x_", "l_gate_", "l_residual_"), inputs, strict=True))
    values |= {f"l_self_buffers_{name}_": buffer for name, buffer in model.named_buffers()}
    ((got,),) = run_interpreted("nogpu.run_generated", [(code, [values[name] for name in names])], tmp_path)
    want = model(*inputs)
    assert (got - want).norm() / want.norm() < 1e-5


def test_without_a_template_the_reference_runs_and_says_why(monkeypatch):
    for template in linear_w4_block.TEMPLATES:
        monkeypatch.setitem(template.__dict__, "supports", lambda problem: "declined for the test")
    for bits, op in ((4, "linear_w4a4"), (8, "linear_w4a8_block")):
        code, _, log = generate(bits, 128)
        assert code.count(f"torch.ops.viditq.{op}.default(") == 1
        assert {(e.kernel, e.reason) for e in log.values()} == {("eager reference", "declined for the test")}
