"""What Inductor generates for CUDA from the kernels whose store stands in a loop over tiles, when one of them wins."""

import re

import pytest
import torch
from nogpu.fake_cuda import missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

from nogpu.assemble import assemble_generated, kernel_sources
from nogpu.fake_cuda import cuda_code
from nogpu.interpreter import run_interpreted

from viditq_fx.lowering import inductor_compat
from viditq_fx.lowering.install import install
from viditq_fx.lowering.kernel_log import kernel_log
from viditq_fx.ops.quantize import quantize_per_channel, quantize_per_token
from viditq_fx.triton_templates import linear_w8a8_persistent, linear_w8a8_tma

pytestmark = pytest.mark.slow
BF16 = torch.bfloat16
TEMPLATES = {t.name: t for t in (linear_w8a8_persistent.TEMPLATE, linear_w8a8_tma.TEMPLATE)}


class Gated(torch.nn.Module):
    """residual + gate * linear(x), the gate broadcast over tokens: the epilogue of a DiT block."""

    def __init__(self, depth, width, dtype=BF16, device="cuda"):
        super().__init__()
        self.dtype = dtype
        self.register_buffer("w", torch.empty(width, depth, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(width, device=device))
        self.register_buffer("bias", torch.empty(width, dtype=dtype, device=device))

    def forward(self, x, x_scale, gate, residual):
        y = torch.ops.viditq.linear_w8a8(x, x_scale, self.w, self.scale, self.bias, self.dtype)
        return residual + gate * y


@pytest.fixture
def winner(monkeypatch):
    """Call with a template's name: it is then the cheapest, and taken on any torch."""
    monkeypatch.setattr(inductor_compat, "why_no_descriptors", lambda boxes, multiple: None)

    def wins(name):
        for known, template in TEMPLATES.items():
            cost = 0.0 if known == name else float("inf")
            monkeypatch.setitem(template.__dict__, "cost", lambda config, problem, cost=cost: cost)

    return wins


def generate(tokens, depth, width, dtype=BF16, cc=90):
    def make():
        def empty(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="cuda")

        x = empty(2, tokens, depth, dtype=torch.int8), empty(2, tokens, 1, dtype=torch.float32)
        return Gated(depth, width, dtype), *x, empty(2, 1, width), empty(2, tokens, width)

    install()
    with kernel_log() as log:
        code, names = cuda_code(make, cc)
    return code, names, [entry.kernel for entry in log.values()]


@pytest.mark.parametrize("cc", [90, 100])
@pytest.mark.parametrize("name", TEMPLATES)
def test_gate_and_residual_are_stored_in_the_loop(winner, name, cc):
    winner(name)
    code, _, kernels = generate(2048, 3072, 3072, cc=cc)
    assert [k.split()[0] for k in kernels] == [f"triton:{name}"]
    ((kernel, source),) = kernel_sources(code).items()
    store = re.findall(r"^( +)tl\.store\(", source, flags=re.MULTILINE)
    assert [len(indent) for indent in store] == [8]
    tail = source[source.index("y_acc += ") :]
    assert len(re.findall(r"tl\.load\(in_ptr\d", tail)) >= 2  # residual and gate
    assert re.search(rf"{kernel}\.run\(.*, {132 if cc == 90 else 148}, 1, 1, stream=", code)
    result = assemble_generated(kernel, source, cc)
    assert (result.spills, result.stack_bytes) == (0, 0), result
    assert set(result.sass_mma) <= {"IMMA", "IGMMA", "UTCIMMA"}
    assert (result.tensor_loads > 0) == (name == "linear_w8a8_tma")


def why_no_descriptors(monkeypatch, offset=0):
    """What the lowering found of an int8 x that begins so many bytes into its memory."""
    found = []
    real = inductor_compat.why_no_descriptors

    def ask(boxes, multiple):
        found.append(real(boxes, multiple))
        return found[-1]

    def make():
        x = torch.empty(2, 256, 64, dtype=torch.int8, device="cuda")
        scale, w = torch.empty(256, 1, device="cuda"), torch.empty(64, 64, dtype=torch.int8, device="cuda")

        def function(x, scale, w):
            x_MK = torch.as_strided(x, (256, 64), (64, 1), offset)
            return torch.ops.viditq.linear_w8a8(x_MK, scale, w, scale[:64, 0].contiguous(), None, BF16)

        return function, x, scale, w

    install()
    monkeypatch.setattr(inductor_compat, "why_no_descriptors", ask)
    cuda_code(make, 90)
    return found[0]


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 sets the allocator at every launch")
def test_descriptors_are_not_offered_where_another_thread_would_find_no_memory(monkeypatch):
    assert "only in the thread that launches a kernel first" in why_no_descriptors(monkeypatch)


@pytest.mark.skipif(torch.__version__ >= "2.12", reason="a later torch may decline all descriptors")
def test_descriptors_want_aligned_memory(monkeypatch):
    assert why_no_descriptors(monkeypatch, offset=16) is None
    assert "multiple of 16 bytes" in why_no_descriptors(monkeypatch, offset=8)


def three_programs(code):
    """The generated code with a grid of 3, so that each program walks over several tiles."""
    code, constants = re.subn(r"PROGRAMS : tl\.constexpr = 132", "PROGRAMS : tl.constexpr = 3", code)
    code, grids = re.subn(r", \d+, 1, 1, (stream=\w+\))", r", 3, 1, 1, \1", code)
    assert (constants, grids) == (1, 1)
    return code


def test_generated_code_computes_the_reference(winner, tmp_path):
    """Two samples of ragged M, N and K."""
    tokens, depth, width = 130, 176, 200
    torch.manual_seed(0)
    model = Gated(depth, width, torch.float32, device="cpu")
    w_NK, scale_N = quantize_per_channel(torch.randn(width, depth) * depth**-0.5, 8)
    model.load_state_dict({"w": w_NK, "scale": scale_N, "bias": torch.randn(width)})
    x = quantize_per_token(torch.randn(2, tokens, depth), 8)
    inputs = (*x, torch.randn(2, 1, width), torch.randn(2, tokens, width))
    values = dict(zip(("l_x_", "l_x_scale_", "l_gate_", "l_residual_"), inputs, strict=True))
    values |= {f"l_self_buffers_{name}_": buffer for name, buffer in model.named_buffers()}
    payload = []
    for template in TEMPLATES:
        winner(template)
        code, names, kernels = generate(tokens, depth, width, dtype=torch.float32)
        assert [k.split()[0] for k in kernels] == [f"triton:{template}"]
        payload.append((three_programs(code), [values[name] for name in names]))
    for (got,) in run_interpreted("nogpu.run_generated", payload, tmp_path):
        torch.testing.assert_close(got, model(*inputs), rtol=1e-5, atol=1e-5)
