"""The linear_w4a8 kernel, run by Triton's interpreter, equals the op's reference."""

import pytest
import torch

from viditq_fx.ops import LINEAR_W4A8
from viditq_fx.ops.linear_w4a8 import linear_w4a8
from viditq_fx.ops.pack import pack_int4

pytest.importorskip("triton", reason="the kernel is a Triton kernel and Triton is not installed")

from nogpu.interpreter import run_interpreted

from viditq_fx.triton_templates.base import GemmConfig
from viditq_fx.triton_templates.linear_w4a8 import TEMPLATES

pytestmark = pytest.mark.slow  # a subprocess imports torch and Triton anew for each file

CPU = torch.device("cpu")


def tile(m, n, k=64, group_m=8, swap=False):
    return GemmConfig(block_m=m, block_n=n, block_k=k, num_stages=2, num_warps=4, group_m=group_m, swap=swap)


EXACT = {
    # (M, K, N): even, one ragged side at a time, all ragged, odd K and N, one row, several groups of M.
    "even": ((128, 256, 128), tile(64, 64, 128)),
    "even-swapped": ((128, 256, 128), tile(64, 64, 128, swap=True)),
    "ragged-m": ((100, 128, 64), tile(64, 64)),
    "ragged-n": ((64, 128, 50), tile(64, 64, swap=True)),
    "ragged-k": ((64, 200, 64), tile(64, 64)),
    "less-than-half-of-k": ((16, 33, 16), tile(16, 16)),
    "all-ragged": ((77, 333, 131), tile(32, 64)),
    "all-ragged-swapped": ((77, 333, 131), tile(32, 64, swap=True)),
    "one-row": ((1, 96, 48), tile(16, 64)),
    "17-rows": ((17, 40, 8), tile(16, 64, swap=True)),
    "swizzled": ((300, 64, 90), tile(32, 32, group_m=3)),
    "extremes": ((16, 512, 16), tile(16, 16, 128)),
}


def exact_args(shape, label):
    """Scales of 1 and K small enough that fp32 holds every sum: any difference is an error."""
    rows, depth, width = shape
    gen = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (rows, depth), generator=gen, dtype=torch.int8)
    w = torch.randint(-8, 8, (width, depth), generator=gen, dtype=torch.int8)
    if label == "extremes":
        x, w = torch.full_like(x, -127), torch.full_like(w, -8)
    return x, torch.ones(rows, 1), pack_int4(w), torch.ones(width), None, torch.float32


def groups_of_two(args, size):
    """The same operands with scales of groups that are powers of two: fp32 adds them without rounding."""
    x, s, w, ones, *rest = args
    groups = -(-x.shape[1] // size)
    return x, s, w, torch.stack([ones * 2.0 ** -(g % 4) for g in range(groups)]), *rest


def cases_of_tests():
    cases = {}
    for label, (shape, config) in EXACT.items():
        args = exact_args(shape, label)
        cases[label], cases[f"{label}-g128"] = (args, config), (groups_of_two(args, 128), config)
        if config.block_k <= 64 and "swizzled" not in label:
            cases[f"{label}-g64"] = (groups_of_two(args, 64), config)
    return cases


EXACT_CASES = cases_of_tests()
SAMPLES = {sample.label: sample.args for sample in LINEAR_W4A8.samples(CPU)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    cases = dict(EXACT_CASES)
    cases |= {label: (args, tile(16, 32, swap=i % 2 == 0)) for i, (label, args) in enumerate(SAMPLES.items())}
    cases["empty"] = (exact_args((0, 32, 8), "empty"), tile(16, 32))
    payload = [("linear_w4a8", *case) for case in cases.values()]
    out = run_interpreted("nogpu.interpret_linear", payload, tmp_path_factory.mktemp("interpret"))
    return dict(zip(cases, out, strict=True))


@pytest.mark.parametrize("label", EXACT_CASES)
def test_exact_integers(results, label):
    assert torch.equal(results[label], linear_w4a8(*EXACT_CASES[label][0]))


@pytest.mark.parametrize("label", SAMPLES)
def test_op_samples(results, label):
    want = LINEAR_W4A8.reference(*SAMPLES[label])
    tolerance = LINEAR_W4A8.tolerances[want.dtype]
    assert results[label].shape == want.shape
    torch.testing.assert_close(results[label], want, rtol=tolerance.rtol, atol=tolerance.atol)


def test_no_rows(results):
    assert results["empty"].shape == (0, 8)


def test_a_tile_in_two_groups_is_refused():
    deep = next(c for *_, configs in TEMPLATES[1].configs for c in configs if c.block_k == 128)
    with pytest.raises(AssertionError, match="tiles in two groups of 64"):
        TEMPLATES[2].constants(deep, None, 64, 256)


def test_all_templates_are_one_kernel():
    assert len({template.body for template in TEMPLATES}) == 1
    assert TEMPLATES[0].body.count("tl.dot(") == 8  # low and high, plain and swapped, with groups and without
    assert "tl.store" not in TEMPLATES[0].body
