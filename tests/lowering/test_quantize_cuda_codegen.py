"""Which kernels quantize rows in Inductor's code for CUDA, on a machine with no GPU."""

import re

import pytest
import torch
from nogpu.fake_cuda import missing
from torch.nn import functional as F

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

from nogpu.assemble import assemble_generated, kernel_sources
from nogpu.fake_cuda import cuda_code

from viditq_fx.backend import read_options
from viditq_fx.lowering.select import compile_with_kernels

pytestmark = pytest.mark.slow
BF16 = torch.bfloat16
OURS = re.compile(r"(rotate_quantize|norm_modulate_quantize|activation_quantize)_kernel\w*\.run\(")


def generate(make, mode="auto", *, cc=90, dynamic=None):
    """(generated code, names of our kernels in the order of their launches, choices by op)."""
    choices = {}

    def compiler(gm, inputs):
        _, inductor = read_options(None)
        targets = {node.name: str(node.target) for node in gm.graph.nodes}
        compiled = compile_with_kernels(gm, inputs, inductor, quantize_kernels=mode)
        choices.update({targets[name].split(".")[1]: choice for name, choice in compiled.by_node.items()})
        return compiled

    code = cuda_code(make, cc, dynamic=dynamic, compiler=compiler).text
    return code, OURS.findall(code[code.index("def call") :]), choices


def empty(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device="cuda")


class Rotated(torch.nn.Module):
    """An activation, rotated and quantized before a linear."""

    def __init__(self, width=3072, group=0, block=256):
        super().__init__()
        self.group, self.block = group, block
        self.register_buffer("multiplier", empty(width, dtype=torch.float32))
        self.register_buffer("q", empty(1152, width, dtype=torch.int8))
        self.register_buffer("scale", empty(1152, dtype=torch.float32))

    def forward(self, x):
        op = torch.ops.viditq
        q, s = op.rotate_quantize.default(F.silu(x), self.multiplier, self.block, 8, self.group)
        return op.linear_w8a8.default(q, s[..., :1], self.q, self.scale, None, BF16)


def rotated(**shape):
    """make() for `Rotated`."""

    def make():
        model = Rotated(**shape)
        return model, empty(2, 512, model.multiplier.shape[0])

    return make


def feed_forward():
    """make() for adaLN, quantize; SwiGLU of two halves, quantize."""

    def make():
        def function(x, scale, shift, both):
            op = torch.ops.viditq
            one = op.norm_modulate_quantize.default(x, "layer_norm", None, None, 1e-6, scale, 1.0, shift, 8)
            value, gate = both.chunk(2, -1)
            return *one, *op.activation_quantize.default(value, "silu", gate, 8)

        return function, empty(2, 512, 1152), empty(2, 1, 1152), empty(2, 1, 1152), empty(2, 512, 9216)

    return make


@pytest.mark.parametrize("dynamic", [False, True])
def test_rotation_is_one_launch_of_ours(dynamic):
    code, ours, choices = generate(rotated(), dynamic=dynamic)
    assert ours == ["rotate_quantize"]
    assert choices["rotate_quantize"].kernel == "triton:rotate_quantize"
    body = code[code.index("def call") :]
    assert "extern_kernels" not in body
    assert len(kernel_sources(code)) == 3  # SiLU, ours, the GEMM
    assert not re.search(r"empty_strided_cuda\([^)]*3072\)[^)]*torch\.float32", body)


def test_what_a_norm_makes_is_stored_once_for_a_rotation():
    """Passed twice, for the multiplier that there is not, it was stored twice."""

    def make():
        def function(x, scale):
            h = torch.nn.functional.layer_norm(x, (1152,)) * (1 + scale)
            return torch.ops.viditq.rotate_quantize.default(h, None, 64, 8, 0)

        return function, empty(2, 1024, 1152), empty(2, 1, 1152)

    code, ours, _ = generate(make)
    assert ours == ["rotate_quantize"]
    body = code[code.index("def call") :]
    assert len(re.findall(r"empty_strided_cuda\([^\n]*1152[^\n]*torch\.bfloat16", body)) == 1


def test_launched_kernel_assembles_with_wide_loads():
    code, *_ = generate(rotated(group=128))
    (source,) = (text for name, text in kernel_sources(code).items() if name.startswith("rotate_quantize"))
    (name,) = (name for name in kernel_sources(code) if name.startswith("rotate_quantize"))
    result = assemble_generated(name, source, 90)
    assert (result.spills, result.stack_bytes) == (0, 0)
    assert result.wide_loads >= 12
    assert set(result.sass_mma) == {"HGMMA"}


def test_inductor_computes_a_rotation_that_is_not_ours():
    code, ours, choices = generate(rotated(), "inductor")
    assert (ours, choices["rotate_quantize"].reason) == ([], "quantize_kernels='inductor'")
    assert "extern_kernels.mm(" in code
    _, ours, choices = generate(rotated(width=4096, block=1024))
    assert (ours, choices["rotate_quantize"].kernel) == ([], "inductor")
    assert "blocks of up to 256" in choices["rotate_quantize"].reason


def test_norms_and_activations_are_inductors_until_asked():
    counts = {}
    for mode in ("auto", "triton"):
        code, ours, choices = generate(feed_forward(), mode)
        counts[mode] = len(kernel_sources(code))
        assert set(choices) == {"norm_modulate_quantize", "activation_quantize"}
        if mode == "auto":
            assert ours == []
            assert all(choice.reason == "quantize_kernels='auto'" for choice in choices.values())
        else:
            assert ours == ["norm_modulate_quantize", "activation_quantize"]
            for name, source in kernel_sources(code).items():
                if not name.startswith("triton_"):
                    assert "fp64" not in source
                    assert assemble_generated(name, source, 90).wide_loads >= 2
    assert counts == {"auto": 2, "triton": 2}  # nothing is copied to please ours


def test_a_cpu_has_none_of_them():
    from viditq_fx.lowering.quantize_cuda import why_no_kernel

    assert "on cpu" in why_no_kernel(torch.device("cpu"))
