"""4-bit linears with an input scale for each token and block, against fp64, and what computes them on a CPU."""

import pytest
import torch
import torch._inductor.config as inductor_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.compile_fx import compile_fx

from viditq_fx.cpu_kernels import int4_gemm
from viditq_fx.lowering import select_cpu
from viditq_fx.lowering.select_cpu import quantized_linears, select_cpu_kernels
from viditq_fx.ops import LINEAR_W4A4, LINEAR_W4A8_BLOCK, PACK_INT4, QUANTIZE_PER_BLOCK, int4
from viditq_fx.ops.int4 import int4_unavailable, matmul_s8s4
from viditq_fx.ops.linear_w4_block import linear_w4a4, linear_w4a8_block
from viditq_fx.ops.linear_w4a8 import matmul_int4
from viditq_fx.ops.pack import pack_int4
from viditq_fx.ops.quantize import quantize_per_block
from viditq_fx.scheme import BLOCK, GROUPS

needs_kernel = pytest.mark.skipif(int4_unavailable() is not None, reason=str(int4_unavailable()))
DEPTHS = [1, 33, 127, 128, 129, 192, 300, 1152, 2081]
FORMS = {"groups": (True, False), "blocks": (False, True), "both": (True, True)}
"""Scales of w's groups, scales of x's blocks."""


def blocks_of(depth):
    return -(-depth // BLOCK)


def widened(scale, depth):
    """A scale for each block or group along the last axis -> one for each of K, in fp64."""
    size = next(size for size in GROUPS if -(-depth // size) == scale.shape[-1])
    return scale.double().repeat_interleave(size, dim=-1)[..., :depth]


@st.composite
def operands(draw, largest=127):
    """(x int8 [M, K], s_MG, w int8 [N, K], s_GN): any integers, or the largest there are; groups of either size."""
    rows, width, depth = draw(st.integers(1, 9)), draw(st.integers(1, 13)), draw(st.sampled_from(DEPTHS))
    gen, extreme = (
        torch.Generator().manual_seed(draw(st.integers(0, 2**31))),
        draw(st.sampled_from([0, -1, 1])),
    )
    x = torch.randint(-largest, largest + 1, (rows, depth), generator=gen, dtype=torch.int8)
    w = torch.randint(-8, 8, (width, depth), generator=gen, dtype=torch.int8)
    if extreme:
        x, w = torch.full_like(x, extreme * largest), torch.full_like(w, -8)
    scale_MG = torch.rand(rows, blocks_of(depth), generator=gen) + 0.1
    groups = -(-depth // draw(st.sampled_from(GROUPS)))
    return x, scale_MG, w, torch.rand(groups, width, generator=gen) + 0.1


def exact(x, scale_MG, w, scale_GN):
    """(the scaled sum, that of its magnitudes) in fp64; a scale may be None."""
    x_f64 = x.double() if scale_MG is None else x.double() * widened(scale_MG, x.shape[1])
    w_f64 = w.double() if scale_GN is None else w.double() * widened(scale_GN.t(), w.shape[1])
    return x_f64 @ w_f64.t(), x_f64.abs() @ w_f64.abs().t()


def of_two(scale):
    """Powers of two: sums of blocks scaled by them are exact in fp32 too, so that any difference is an error."""
    return torch.exp2(torch.randint(-2, 2, scale.shape, generator=torch.Generator().manual_seed(1)).float())


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(operands())
def test_the_reference_holds_to_fp64(form, given_operands):
    x, scale_MG, w, scale_GN = given_operands
    groups, blocks = FORMS[form]
    scales = scale_GN if groups else None, scale_MG if blocks else None
    got, (want, size) = matmul_int4(x, pack_int4(w), *scales), exact(x, scales[1], w, scales[0])
    assert ((got.double() - want).abs() <= 1e-6 * size).all()


@needs_kernel
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(operands())
def test_our_kernel_adds_blocks_exactly(form, given_operands):
    x, scale_MG, w, scale_GN = given_operands
    groups, blocks = FORMS[form]
    scales = of_two(scale_GN) if groups else None, of_two(scale_MG) if blocks else None
    want, size = exact(x, scales[1], w, scales[0])
    got = int4_gemm.multiply(x, pack_int4(w), *scales)
    if size.max() < 2**22:  # quarters: fp32 holds every partial sum
        assert torch.equal(got.double(), want)
    assert ((got.double() - want).abs() <= 2e-6 * size).all()


@needs_kernel
@pytest.mark.parametrize("rows", [1, 17, 130])
def test_our_kernel_on_many_tiles(rows):
    gen = torch.Generator().manual_seed(rows)
    x = torch.randint(-127, 128, (rows, 1000), generator=gen, dtype=torch.int8)
    w = torch.randint(-8, 8, (259, 1000), generator=gen, dtype=torch.int8)
    scale_MG, scale_GN = of_two(torch.ones(rows, 8)), of_two(torch.ones(8, 259))
    got = int4_gemm.multiply(x, pack_int4(w), scale_GN, scale_MG)
    assert torch.equal(got.double(), exact(x, scale_MG, w, scale_GN)[0])


def test_without_a_compiler_it_is_the_same(monkeypatch):
    gen = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (3, 5, 300), generator=gen, dtype=torch.int8)
    w = torch.randint(-8, 8, (37, 300), generator=gen, dtype=torch.int8)
    scale_MG, scale_GN = of_two(torch.ones(15, 3)), of_two(torch.ones(3, 37))
    want = exact(x.reshape(15, 300), scale_MG, w, scale_GN)[0].reshape(3, 5, 37)
    for missing in (int4_unavailable(), "no compiler"):
        monkeypatch.setattr(int4, "int4_unavailable", lambda missing=missing: missing)
        monkeypatch.setattr(int4, "BLOCK_BYTES", 4 * 300 * 10)  # ten channels at a time
        got = matmul_s8s4(x, pack_int4(w), scale_GN, scale_MG.reshape(3, 5, 3))
        assert torch.equal(got.double(), want)


@settings(max_examples=60, deadline=None)
@given(operands(largest=7), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans())
def test_both_linears_hold_to_fp64(given_operands, dtype, grouped):
    x, scale_MG, w, scale_GN = given_operands
    bias = torch.linspace(-1, 1, w.shape[0]).to(dtype)
    scale_GN = scale_GN / 256  # fp16 holds every result
    scale = scale_GN if grouped else scale_GN[0].contiguous()
    wide = scale_GN if grouped else scale.expand_as(scale_GN)
    want, size = exact(x, scale_MG, w, wide)
    rest = (scale_MG, pack_int4(w), scale, bias, dtype)
    int8, packed = linear_w4a8_block(x, *rest), linear_w4a4(pack_int4(x), *rest, x.shape[1])
    assert int8.dtype == dtype
    assert torch.equal(int8, packed)
    tolerance = LINEAR_W4A4.tolerances[dtype]
    bound = tolerance.atol + tolerance.rtol * (size + bias.double().abs())
    assert ((int8.double() - want - bias.double()).abs() <= bound).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_nan_stays_in_its_row(bits):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(4, 300, generator=gen)
    x[2, 3], x[1] = float("nan"), 0
    w, scale = quantize_per_block(torch.randn(8, 300, generator=gen), 4, 300)
    x_q, x_scale = quantize_per_block(x, bits, BLOCK)
    for acc in (matmul_s8s4(x_q, pack_int4(w), None, x_scale), matmul_int4(x_q, pack_int4(w), None, x_scale)):
        got = acc * scale[:, 0]
        assert torch.isnan(got[2]).all()
        assert torch.isfinite(got[[0, 1, 3]]).all()
        assert not got[1].any()


class Layer(torch.nn.Module):
    """Quantize per block, then the linear of that many bits; `packed_input` leaves packing to the caller."""

    def __init__(self, bits, grouped, depth=300, width=40):
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        self.bits, self.depth = bits, depth
        w = torch.randint(-8, 8, (width, depth), generator=gen, dtype=torch.int8)
        groups = (blocks_of(depth),) if grouped else ()
        self.register_buffer("w", pack_int4(w))
        self.register_buffer("scale", torch.rand(*groups, width, generator=gen))
        self.register_buffer("bias", torch.randn(width, generator=gen))

    def linear(self, x_q, x_scale, dtype):
        rest = (x_scale, self.w, self.scale, self.bias, dtype)
        if self.bits == 8:
            return LINEAR_W4A8_BLOCK.overload(x_q, *rest)
        return LINEAR_W4A4.overload(x_q, *rest, self.depth)

    def forward(self, x):
        q, scale = QUANTIZE_PER_BLOCK.overload(x, self.bits, BLOCK)
        return self.linear(PACK_INT4.overload(q) if self.bits == 4 else q, scale, x.dtype)


def compiled(function, *args, inductor=False):
    """(result, targets of the rewritten graph, choices of kernels); the graph runs as it stands, or by Inductor."""
    seen, choices = [], {}

    def backend(gm, inputs):
        assert len(quantized_linears(gm)) == 1
        choices.update(select_cpu_kernels(gm))
        gm.graph.lint()
        seen.extend(str(node.target) for node in gm.graph.nodes)
        return compile_fx(gm, inputs) if inductor else gm

    torch._dynamo.reset()
    with torch.no_grad():
        with inductor_config.patch(
            force_disable_caches=True
        ):  # its key knows nothing of what our ops are made of
            result = torch.compile(function, backend=backend)(*args)
    return result, seen, [choice.kernel for choice in choices.values()]


@pytest.mark.parametrize("missing", [None, "no compiler"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_on_a_cpu_it_is_one_matmul_of_the_integers(monkeypatch, bits, grouped, missing):
    missing = missing or int4_unavailable()
    for module in (select_cpu, int4):
        monkeypatch.setattr(module, "int4_unavailable", lambda: missing)
    layer = Layer(bits, grouped)
    x = torch.randn(2, 9, 300, generator=torch.Generator().manual_seed(1))
    got, targets, kernels = compiled(layer, x)
    name = "fp32-exact-s8s4" if missing else int4_gemm.kernel_name()
    assert kernels == [f"{name}-blocks"]
    assert targets.count("viditq.matmul_s8s4.default") == 1
    assert not any("pack_int4" in target or "linear_w4" in target for target in targets)
    torch.testing.assert_close(got, layer(x), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_inductor_compiles_it_for_a_cpu():
    layer = Layer(4, False)
    x = torch.randn(2, 9, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    got, *_ = compiled(layer, x, inductor=True)
    torch.testing.assert_close(got, layer(x), rtol=1e-2, atol=1e-3)


def test_a_packed_input_is_unpacked_on_a_cpu():
    layer = Layer(4, True)
    q, scale = quantize_per_block(torch.randn(7, 300, generator=torch.Generator().manual_seed(1)), 4, BLOCK)
    args = (pack_int4(q), scale, torch.float32)
    got, targets, _ = compiled(layer.linear, *args)
    assert targets.count("viditq.unpack_int4.default") == 1
    torch.testing.assert_close(got, layer.linear(*args), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(0, a[0].float()), "x of K=200 is uint8"),
        (lambda a: a.__setitem__(6, 300), "x of K=300 is uint8"),
        (lambda a: a.__setitem__(2, a[2][:, :-1]), r"weight of K=200 is uint8 \[N, 128\]"),
        (
            lambda a: a.__setitem__(1, a[1][:, :1]),
            r"scales must be \[..., 2\] and \(4,\) or \(2, 4\) or \(4, 4\)",
        ),
        (lambda a: a.__setitem__(1, a[1].half()), "scales are fp32"),
        (lambda a: a.__setitem__(3, a[3].expand(3, 4)), "scales must be"),
        (lambda a: a.__setitem__(4, torch.zeros(3)), "bias must be"),
    ],
)
def test_operands_that_do_not_fit(change, message):
    x_q, x_scale = quantize_per_block(torch.ones(2, 200), 4, BLOCK)
    w = pack_int4(torch.ones(4, 200, dtype=torch.int8))
    args = [pack_int4(x_q), x_scale, w, torch.ones(4), None, torch.float32, 200]
    change(args)
    with pytest.raises(ValueError, match=message):
        linear_w4a4(*args)


def test_int8_operands_that_do_not_fit():
    x_q, x_scale = quantize_per_block(torch.ones(2, 200), 8, BLOCK)
    w = pack_int4(torch.ones(4, 200, dtype=torch.int8))
    with pytest.raises(ValueError, match="x is int8"):
        linear_w4a8_block(pack_int4(x_q.clamp(max=7)), x_scale, w, torch.ones(4), None, torch.float32)
    for scales in ((None, x_scale[:, :1]), (None, x_scale.double()), (torch.ones(3, 4), None)):
        with pytest.raises(ValueError, match="scales of K=200"):
            matmul_s8s4(x_q, w, *scales)
