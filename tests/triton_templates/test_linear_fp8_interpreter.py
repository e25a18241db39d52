"""The linear_w8a8_fp8 kernel, run by Triton's interpreter, equals the op's reference."""

import pytest
import torch

from viditq_fx.ops import LINEAR_W8A8_FP8
from viditq_fx.ops.fp8 import E4M3, linear_w8a8_fp8

pytest.importorskip("triton", reason="the kernel is a Triton kernel and Triton is not installed")

from nogpu.interpreter import run_interpreted

from viditq_fx.triton_templates.base import GemmConfig

pytestmark = pytest.mark.slow  # a subprocess imports torch and Triton anew for each file


def tile(m, n, k, group_m=8, swap=False):
    return GemmConfig(block_m=m, block_n=n, block_k=k, num_stages=2, num_warps=4, group_m=group_m, swap=swap)


EXACT = {
    # (M, K, N)
    "even": ((64, 256, 64), tile(64, 64, 128)),
    "even-swapped": ((64, 256, 64), tile(64, 64, 128, swap=True)),
    "all-ragged": ((77, 333, 131), tile(32, 64, 128)),
    "all-ragged-swapped": ((77, 333, 131), tile(32, 64, 128, swap=True)),
    "17-rows": ((17, 40, 8), tile(16, 64, 32, swap=True)),
    "swizzled": ((200, 64, 90), tile(32, 32, 64, group_m=3)),
}


def exact_args(shape):
    """Small integers, which e4m3 holds, and sums that fp32 does: any difference is an error."""
    rows, depth, width = shape
    gen = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (rows, depth), generator=gen).to(torch.float32).to(E4M3)
    w = torch.randint(-8, 9, (width, depth), generator=gen).to(torch.float32).to(E4M3)
    return x, torch.ones(rows, 1), w, torch.ones(width), None, torch.float32


SAMPLES = {sample.label: sample.args for sample in LINEAR_W8A8_FP8.samples(torch.device("cpu"))}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    cases = {label: (exact_args(shape), config) for label, (shape, config) in EXACT.items()}
    cases |= {
        label: (args, tile(16, 32, 64, swap=i % 2 == 0)) for i, (label, args) in enumerate(SAMPLES.items())
    }
    cases["empty"] = (exact_args((0, 32, 8)), tile(16, 32, 64))
    payload = [("linear_fp8", *case) for case in cases.values()]
    out = run_interpreted("nogpu.interpret_linear", payload, tmp_path_factory.mktemp("interpret"))
    return dict(zip(cases, out, strict=True))


@pytest.mark.parametrize("label", EXACT)
def test_exact_where_nothing_rounds(results, label):
    assert torch.equal(results[label], linear_w8a8_fp8(*exact_args(EXACT[label][0])))


@pytest.mark.parametrize("label", SAMPLES)
def test_op_samples(results, label):
    want = LINEAR_W8A8_FP8.reference(*SAMPLES[label])
    tolerance = LINEAR_W8A8_FP8.tolerances[want.dtype]
    assert results[label].shape == want.shape
    torch.testing.assert_close(results[label], want, rtol=tolerance.rtol, atol=tolerance.atol)


def test_no_rows(results):
    assert results["empty"].shape == (0, 8)
