"""The linear_w8a8 kernel, run by Triton's interpreter, equals the op's reference."""

import pytest
import torch

from viditq_fx.ops import LINEAR_W8A7, LINEAR_W8A8
from viditq_fx.ops.base import EPILOGUE_TOLERANCES
from viditq_fx.ops.linear import linear_w8a8

pytest.importorskip("triton", reason="the kernel is a Triton kernel and Triton is not installed")

from nogpu.interpreter import run_interpreted

from viditq_fx.lowering.template_text import template_source
from viditq_fx.triton_templates.base import GemmConfig, helpers_of
from viditq_fx.triton_templates.linear_w8a8 import TEMPLATE

pytestmark = pytest.mark.slow  # a subprocess imports torch and Triton anew for each file

CPU = torch.device("cpu")


def tile(m, n, k, group_m=8):
    return GemmConfig(block_m=m, block_n=n, block_k=k, num_stages=2, num_warps=4, group_m=group_m)


EXACT = {
    # (M, K, N): even, one ragged side at a time, all ragged, odd K and N, one row, several groups of M.
    "even": ((128, 256, 128), tile(64, 64, 128)),
    "ragged-m": ((100, 128, 64), tile(64, 64, 128)),
    "ragged-n": ((64, 128, 50), tile(64, 64, 128)),
    "ragged-k": ((64, 200, 64), tile(64, 64, 128)),
    "all-ragged": ((77, 333, 131), tile(32, 64, 128)),
    "one-row": ((1, 96, 48), tile(16, 64, 32)),
    "17-rows": ((17, 40, 24), tile(16, 64, 32)),
    "swizzled": ((300, 64, 90), tile(32, 32, 64, group_m=3)),
    "extremes": ((16, 512, 16), tile(16, 16, 128)),
}


def exact_args(shape, label):
    """Scales of 1 and K small enough that fp32 holds every sum: any difference is an error."""
    rows, depth, width = shape
    gen = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (rows, depth), generator=gen, dtype=torch.int8)
    w = torch.randint(-127, 128, (width, depth), generator=gen, dtype=torch.int8)
    if label == "extremes":
        x, w = torch.full_like(x, -127), torch.full_like(w, 127)
    return x, torch.ones(rows, 1), w, torch.ones(width), None, torch.float32


SAMPLES = {
    f"{op.name}-{sample.label}": (op, sample.args)
    for op in (LINEAR_W8A8, LINEAR_W8A7)
    for sample in op.samples(CPU)
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    cases = {label: (exact_args(shape, label), config) for label, (shape, config) in EXACT.items()}
    cases |= {label: (args, tile(16, 32, 64)) for label, (_, args) in SAMPLES.items()}
    cases["empty"] = (exact_args((0, 32, 8), "empty"), tile(16, 32, 64))
    payload = [("linear_w8a8", *case) for case in cases.values()]
    out = run_interpreted("nogpu.interpret_linear", payload, tmp_path_factory.mktemp("interpret"))
    return dict(zip(cases, out, strict=True))


@pytest.mark.parametrize("label", EXACT)
def test_exact_integers(results, label):
    want = linear_w8a8(*exact_args(EXACT[label][0], label))
    assert torch.equal(results[label], want)


@pytest.mark.parametrize("label", SAMPLES)
def test_op_samples(results, label):
    op, args = SAMPLES[label]
    want = op.reference(*args)
    tolerance = EPILOGUE_TOLERANCES[want.dtype]
    assert results[label].shape == want.shape
    torch.testing.assert_close(results[label], want, rtol=tolerance.rtol, atol=tolerance.atol)


def test_no_rows(results):
    assert results["empty"].shape == (0, 8)


def test_body_ends_before_the_store():
    assert TEMPLATE.body.startswith("    tile_m, tile_n = grouped_tile(")
    assert TEMPLATE.body.rstrip().endswith("mask = (idx_m < M) & (idx_n < N)")
    assert "tl.store" not in TEMPLATE.body


def test_functions_that_a_kernel_calls_go_along_with_its_text():
    own = """
@triton.jit
def kernel(x):
    return plain(outer(x))


@triton.jit
def outer(x):
    return inner(x)


def plain(x):
    return x
"""
    shared = """
@triton.jit
def inner(x):
    return x


@triton.jit
def outer(x):
    return "the kernel's own file comes first"
"""
    outer, inner = (
        f"@triton.jit\ndef {name}(x):\n    return {of}"
        for name, of in (("outer", "inner(x)"), ("inner", "x"))
    )
    assert helpers_of((own, shared), "kernel") == f"{outer}\n\n\n{inner}"
    assert helpers_of((own, shared), "inner") == ""
    assert [line for line in TEMPLATE.helpers.splitlines() if line.startswith("def ")] == [
        "def grouped_tile(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):",
        "def readable(tile, size, BLOCK: tl.constexpr, EVEN: tl.constexpr):",
    ]
    assert template_source(TEMPLATE, 3, has_bias=True).endswith(TEMPLATE.helpers + "\n")
