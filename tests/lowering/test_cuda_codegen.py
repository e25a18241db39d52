"""What Inductor generates for CUDA from graphs of our ops, on a machine with no GPU."""

import re

import pytest
import torch
import torch._inductor.config as inductor_config
from nogpu.fake_cuda import missing
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import get_code
from torch.nn import functional as F

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

from nogpu.assemble import assemble_generated, kernel_sources
from nogpu.fake_cuda import cuda_code
from nogpu.interpreter import run_interpreted

from viditq_fx.lowering.inductor_compat import wide_persistent_reductions
from viditq_fx.lowering.install import install
from viditq_fx.lowering.kernel_log import kernel_log
from viditq_fx.ops.quantize import quantize_per_channel

pytestmark = pytest.mark.slow
BF16 = torch.bfloat16


class FeedForward(torch.nn.Module):
    """LayerNorm, modulate, W8A8 linear, GELU, W8A8 linear, gate, residual: half of a DiT block."""

    def __init__(self, dim=1152, hidden=4608, dtype=BF16, device="cuda"):
        super().__init__()
        self.dim, self.dtype = dim, dtype
        for name, (width, depth) in {"up": (hidden, dim), "down": (dim, hidden)}.items():
            q_NK = torch.empty(width, depth, dtype=torch.int8, device=device)
            self.register_buffer(f"{name}_q", q_NK)
            self.register_buffer(f"{name}_scale", torch.empty(width, device=device))
            self.register_buffer(f"{name}_bias", torch.empty(width, dtype=dtype, device=device))

    def linear(self, x, name):
        weights = (getattr(self, f"{name}_{part}") for part in ("q", "scale", "bias"))
        return torch.ops.viditq.linear_w8a8(*torch.ops.viditq.quantize_per_token(x, 8), *weights, self.dtype)

    def forward(self, x, shift, scale, gate):
        h = F.layer_norm(x, (self.dim,)) * (1 + scale) + shift
        return x + gate * self.linear(F.gelu(self.linear(h, "up"), approximate="tanh"), "down")


def feed_forward_inputs(model, batch=2, tokens=1024, device="cuda"):
    x = torch.randn(batch, tokens, model.dim, device=device).to(model.dtype)
    return x, *(torch.randn(batch, 1, model.dim, device=device).to(model.dtype) for _ in range(3))


def feed_forward():
    model = FeedForward()
    return model, *feed_forward_inputs(model)


def generate(make, cc=90, dynamic=None):
    """(generated code, kernel log)."""
    install()
    install()  # twice is once
    with kernel_log() as log, wide_persistent_reductions():
        code = cuda_code(make, cc, dynamic)
    return code.text, log


def linear(x_size, width, *, bias=True, out_dtype=BF16, depth=None, wrap=lambda y, x: y, op="linear_w8a8"):
    """make() for one integer linear, with something behind it."""

    def make():
        weight = torch.empty(width, depth or x_size[-1], dtype=torch.int8, device="cuda")
        scale = torch.empty(width, device="cuda")
        bias_N = torch.empty(width, device="cuda", dtype=BF16) if bias else None

        def function(x, s, w, w_scale, b):
            return wrap(getattr(torch.ops.viditq, op)(x, s, w, w_scale, b, out_dtype), x)

        x = torch.empty(x_size, dtype=torch.int8, device="cuda")
        return function, x, torch.empty(*x_size[:-1], 1, device="cuda"), weight, scale, bias_N

    return make


@pytest.fixture(scope="module")
def block():
    return generate(feed_forward)


def test_half_block_is_four_kernels(block):
    code, log = block
    kinds = [re.match(r"triton_(\w+?)_fused", name)[1] for name in kernel_sources(code)]
    assert kinds == ["per", "tem", "per", "tem"]
    assert "extern_kernels." not in code.split("async_compile.wait")[1]
    assert [entry.kernel.split()[0] for entry in log.values()] == ["triton:linear_w8a8"] * 2


def test_gate_and_residual_are_in_the_store(block):
    *_, last = kernel_sources(block[0]).values()
    tail = last[last.index("y_acc = ") :]
    assert len(re.findall(r"tl\.load\(in_ptr\d", tail)) == 2  # residual and gate
    assert tail.count("tl.store(") == 1


def test_dequantized_value_is_never_cast_to_an_integer(block):
    for name, source in kernel_sources(block[0]).items():
        if "_tem_" in name:
            assert not re.search(r"to\(tl\.int\d+\)", source[source.index("y_acc = ") :])


def test_quantize_reads_its_input_once(block):
    for name, source in kernel_sources(block[0]).items():
        if "_per_" in name:
            assert "for " not in source[source.index("def ") :]
            assert "'*i8'" in source


def test_half_block_assembles_without_spills(block):
    for name, source in kernel_sources(block[0]).items():
        result = assemble_generated(name, source, 90)
        assert (result.spills, result.stack_bytes) == (0, 0), name
        assert set(result.sass_mma) == ({"IGMMA"} if "_tem_" in name else set()), name


def two_streams(above):
    """make() for adaLN of two streams, joined before one linear; quantized above the cat or below."""

    def make():
        def empty(*shape, dtype=BF16):
            return torch.empty(*shape, dtype=dtype, device="cuda")

        def function(x, text, scale, shift, w, w_scale):
            op = torch.ops.viditq
            if above:
                made = (
                    op.norm_modulate_quantize(t, "layer_norm", None, None, 1e-5, scale, 1.0, shift, 8)
                    for t in (text, x)
                )
                integers, scales = zip(*made, strict=True)
                pair = op.cat_int8(integers, 1), torch.cat(scales, 1)
            else:
                made = [F.layer_norm(t, (1920,)) * (1 + scale) + shift for t in (text, x)]
                pair = op.quantize_per_token(torch.cat(made, 1), 8)
            return op.linear_w8a8(*pair, w, w_scale, None, BF16)

        modulation = empty(2, 1, 1920), empty(2, 1, 1920)
        weight = empty(1920, 1920, dtype=torch.int8), empty(1920, dtype=torch.float32)
        return function, empty(2, 4096, 1920), empty(2, 226, 1920), *modulation, *weight

    return make


def test_streams_quantized_above_a_cat_leave_no_full_precision_copy():
    codes = {above: generate(two_streams(above))[0] for above in (True, False)}
    kernels = {above: len(kernel_sources(code)) for above, code in codes.items()}
    assert kernels[True] <= kernels[False]
    outside = {
        above: "".join(source for name, source in kernel_sources(code).items() if "_tem_" not in name)
        for above, code in codes.items()
    }
    assert not re.search(r"'out_ptr\d': '\*bf16'", outside[True])
    assert re.search(r"'out_ptr\d': '\*bf16'", outside[False])


def test_symbolic_tokens():
    code, log = generate(feed_forward, dynamic=True)
    templates = [source for name, source in kernel_sources(code).items() if "_tem_" in name]
    assert len(kernel_sources(code)) == 4
    assert all(re.search(r"M = .*ks\d", source) for source in templates)
    assert all(re.search(r"\n    N = \d+\n    K = \d+\n", source) for source in templates)
    assert len(log) == 2


@pytest.mark.parametrize("cc", [80, 89, 100])
def test_other_architectures(cc):
    code, log = generate(feed_forward, cc=cc)
    assert len(kernel_sources(code)) == 4
    assert all(entry.kernel.startswith("triton:") for entry in log.values())


SHAPES = {
    "vector": linear((64,), 32),
    "matrix": linear((40, 96), 33, bias=False),
    "four-dims": linear((2, 3, 5, 64), 48, out_dtype=torch.float16, op="linear_w8a7"),
    "odd-k": linear((2, 9, 33), 24, out_dtype=torch.float32),
    "one-row": linear((1, 1152), 6912),
    "17-rows": linear((17, 1152), 6912),
    "static-quantize-behind": linear(
        (2, 64, 128), 256, wrap=lambda y, x: torch.clamp(torch.round(y.float() * 9), -127, 127).to(torch.int8)
    ),
}


@pytest.mark.parametrize("case", SHAPES)
def test_one_kernel_whatever_the_shape(case):
    code, log = generate(SHAPES[case])
    (name,) = kernel_sources(code)
    assert "_tem_" in name
    (entry,) = log.values()
    assert entry.kernel.startswith("triton:linear_w8a8")
    assert entry.reason == "estimated best tile"


def test_log_names_the_module():
    class Projection(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("q", torch.empty(64, 64, dtype=torch.int8, device="cuda"))
            self.register_buffer("scale", torch.empty(64, device="cuda"))

        def forward(self, x):
            q, s = torch.ops.viditq.quantize_per_token(x, 8)
            return torch.ops.viditq.linear_w8a8(q, s, self.q, self.scale, None, BF16)

    def make():
        model = torch.nn.Sequential(torch.nn.Sequential(Projection(), Projection()))
        return model, torch.empty(4, 64, device="cuda", dtype=BF16)

    _, log = generate(make)
    assert [entry.fqn for entry in log.values()] == ["0.0", "0.1"]


def test_no_rows():
    code, log = generate(linear((0, 64), 32))
    assert not any("_tem_" in name for name in kernel_sources(code))
    assert [entry.reason for entry in log.values()] == ["the input has no rows"]


def test_non_contiguous_input_is_copied():
    def make():
        function, x, *rest = linear((64, 128), 256)()
        return (lambda x, *args: function(x.t(), *args)), x.t().contiguous(), *rest

    code, _ = generate(make)
    assert [("_tem_" in name) for name in kernel_sources(code)] == [False, True]


def test_declined_problem_runs_extern(monkeypatch):
    from viditq_fx.lowering.linear import ROUTES

    def declines(problem):
        return "declined for the test"

    for template in ROUTES[torch.ops.viditq.linear_w8a8.default].templates:
        monkeypatch.setitem(template.__dict__, "supports", declines)
    code, log = generate(linear((40, 96), 33, wrap=lambda y, x: y * 2))
    assert "extern_kernels.viditq_int_mm_linear(" in code
    assert "out_dtype=torch.bfloat16" in code
    assert [(e.kernel, e.reason) for e in log.values()] == [("extern:int_mm", "declined for the test")]


def test_cpu_runs_the_eager_reference():
    install()
    model = FeedForward(dim=32, hidden=64, dtype=torch.float32, device="cpu")
    inputs = feed_forward_inputs(model, tokens=8, device="cpu")

    def backend(gm, example_inputs):
        compile_fx(gm, example_inputs)
        return gm

    settings = {"force_disable_caches": True, "cpp.simdlen": 1}  # 1: do not probe the compiler's SIMD
    with kernel_log() as log, torch.no_grad(), inductor_config.patch(settings):
        (code, *_) = get_code(torch.compile(model, backend=backend), *inputs)
    assert code.count("torch.ops.viditq.linear_w8a8.default(") == 2
    assert [entry.kernel for entry in log.values()] == ["eager reference"] * 2


def fill(model):
    torch.manual_seed(0)
    for name in ("up", "down"):
        width, depth = getattr(model, f"{name}_q").shape
        q_NK, scale_N = quantize_per_channel(torch.randn(width, depth) * depth**-0.5, 8)
        for part, value in {"q": q_NK, "scale": scale_N, "bias": torch.randn(width)}.items():
            getattr(model, f"{name}_{part}").copy_(value)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (BF16, 2e-2)], ids=["fp32", "bf16"])
def test_generated_code_computes_the_reference(dtype, tolerance, tmp_path):
    """The whole wrapper, all four kernels, in Triton's interpreter: ragged M, N and K."""
    sizes = {"dim": 72, "hidden": 200, "dtype": dtype}

    def make():
        model = FeedForward(**sizes)
        return model, *feed_forward_inputs(model, tokens=37)

    install()
    with wide_persistent_reductions():
        code, names = cuda_code(make)
    model = FeedForward(**sizes, device="cpu")
    fill(model)
    inputs = feed_forward_inputs(model, tokens=37, device="cpu")
    values = dict(zip(("l_x_", "l_shift_", "l_scale_", "l_gate_"), inputs, strict=True))
    values |= {f"l_self_buffers_{name}_": buffer for name, buffer in model.named_buffers()}
    args = [values[name] for name in names]
    ((got,),) = run_interpreted("nogpu.run_generated", [(code, args)], tmp_path)
    want = model(*inputs)
    assert (got.float() - want.float()).norm() / want.float().norm() < tolerance


@pytest.mark.parametrize("winner", ["first", "last"])
def test_autotuning_times_every_config_and_cublas(monkeypatch, winner):
    """With timings made up: the fastest is taken, and the log says which it was."""
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    from viditq_fx.lowering import inductor_compat

    offered = []

    def timings(self, name, input_nodes, layout, input_gen_fns, inputs_key, choices, *args, **kwargs):
        offered.extend(choices)
        order = choices if winner == "first" else list(reversed(choices))
        return {choice: float(rank) for rank, choice in enumerate(order)}

    monkeypatch.setattr(inductor_compat, "wants_autotuning", lambda: True)
    monkeypatch.setattr(AlgorithmSelectorCache, "do_autotuning", timings)
    monkeypatch.setattr(AlgorithmSelectorCache, "make_precompile_fn", lambda self, *args, **kwargs: None)
    code, log = generate(linear((2048, 1152), 1152))
    (entry,) = log.values()
    assert entry.reason == f"fastest of {len(offered)} timed"
    assert entry.kernel.startswith("triton:" if winner == "first" else "extern:int_mm")
    assert ("extern_kernels.viditq_int_mm_linear(" in code) == (winner == "last")


@pytest.mark.parametrize("depth", [1152, 13824, 15360])
def test_quantize_of_wide_rows_is_one_pass_without_spills(depth):
    """GELU and quantize over FLUX's and Wan's widest rows: read once, held in registers."""

    def make():
        def function(x):
            return torch.ops.viditq.quantize_per_token(F.gelu(x, approximate="tanh"), 8)

        return function, torch.empty(2, 512, depth, device="cuda", dtype=BF16)

    code, _ = generate(make)
    ((name, source),) = kernel_sources(code).items()
    assert "_per_" in name
    result = assemble_generated(name, source, 90)
    assert (result.spills, result.stack_bytes) == (0, 0), result
