"""The linear_w4_block kernel, run by Triton's interpreter, equals the references of both ops."""

import pytest
import torch

from viditq_fx.ops import LINEAR_W4A4, LINEAR_W4A8_BLOCK
from viditq_fx.ops.pack import pack_int4

pytest.importorskip("triton", reason="the kernel is a Triton kernel and Triton is not installed")

from nogpu.interpreter import run_interpreted

from viditq_fx.triton_templates.base import GemmConfig
from viditq_fx.triton_templates.linear_w4_block import TEMPLATES

pytestmark = pytest.mark.slow  # a subprocess imports torch and Triton anew for each file

CPU = torch.device("cpu")
OPS = {"w4a8_block": LINEAR_W4A8_BLOCK, "w4a4": LINEAR_W4A4}


def tile(m, n, k=64, group_m=8, swap=False):
    return GemmConfig(block_m=m, block_n=n, block_k=k, num_stages=2, num_warps=4, group_m=group_m, swap=swap)


EXACT = {
    # (M, K, N): even, one ragged side at a time, all ragged, one row, several groups of M, the largest integers.
    "even": ((128, 256, 128), tile(64, 64, 128)),
    "even-swapped": ((128, 256, 128), tile(64, 64, 128, swap=True)),
    "ragged-k": ((64, 200, 64), tile(64, 64)),
    "less-than-half-of-k": ((16, 33, 16), tile(16, 16)),
    "all-ragged": ((77, 333, 131), tile(32, 64)),
    "all-ragged-swapped": ((77, 333, 131), tile(32, 64, swap=True)),
    "one-row": ((1, 96, 48), tile(16, 64)),
    "17-rows": ((17, 1152, 8), tile(16, 64, swap=True)),
    "swizzled": ((300, 64, 90), tile(64, 32, group_m=3)),
    "extremes": ((16, 512, 16), tile(16, 16, 128)),
    "negative-extremes": ((16, 512, 16), tile(16, 16, 64, swap=True)),
}


def of_two(*shape):
    """Powers of two: sums of blocks scaled by them are exact in fp32 too, so that any difference is an error."""
    return torch.exp2(torch.randint(-2, 2, shape, generator=torch.Generator().manual_seed(1)).float())


def exact_args(kind, shape, label, group=None):
    (rows, depth, width), largest = shape, 7 if kind == "w4a4" else 127
    gen = torch.Generator().manual_seed(0)
    x = torch.randint(-largest, largest + 1, (rows, depth), generator=gen, dtype=torch.int8)
    w = torch.randint(-8, 8, (width, depth), generator=gen, dtype=torch.int8)
    if "extremes" in label:
        x, w = torch.full_like(x, largest if "negative" in label else -largest), torch.full_like(w, -8)
    scale = of_two(-(-depth // group), width) if group else of_two(width)
    rest = (of_two(rows, -(-depth // 128)), pack_int4(w), scale, None, torch.float32)
    return (pack_int4(x), *rest, depth) if kind == "w4a4" else (x, *rest)


EXACT_CASES = {
    f"{kind}-{label}{'-groups' if i % 2 else ''}": (
        exact_args(kind, shape, label, 128 if i % 2 else None),
        config,
    )
    for j, kind in enumerate(OPS)
    for i, (label, (shape, config)) in enumerate(EXACT.items(), j)  # each op takes the other form of scales
}
EXACT_CASES |= {
    f"{kind}-{label}-g64": (exact_args(kind, EXACT[label][0], label, 64), EXACT[label][1])
    for kind, labels in {
        "w4a8_block": ("ragged-k", "17-rows"),
        "w4a4": ("all-ragged-swapped", "negative-extremes"),
    }.items()
    for label in labels
}
SAMPLES = {f"{kind}-{sample.label}": sample.args for kind, op in OPS.items() for sample in op.samples(CPU)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    cases = dict(EXACT_CASES)
    cases |= {label: (args, tile(16, 32, swap=i % 2 == 0)) for i, (label, args) in enumerate(SAMPLES.items())}
    nan = list(exact_args("w4a8_block", (3, 300, 8), ""))
    nan[1][1, 2] = float("nan")
    cases["nan"] = (tuple(nan), tile(16, 16))
    cases["empty"] = (exact_args("w4a4", (0, 32, 8), ""), tile(16, 32))
    payload = [("linear_w4_block", *case) for case in cases.values()]
    out = run_interpreted("nogpu.interpret_linear", payload, tmp_path_factory.mktemp("interpret"))
    return dict(zip(cases, out, strict=True))


@pytest.mark.parametrize("label", EXACT_CASES)
def test_exact_integers(results, label):
    reference = OPS["w4a4" if label.startswith("w4a4") else "w4a8_block"].reference
    assert torch.equal(results[label], reference(*EXACT_CASES[label][0]))


@pytest.mark.parametrize("label", SAMPLES)
def test_op_samples(results, label):
    op = OPS["w4a4" if label.startswith("w4a4") else "w4a8_block"]
    want = op.reference(*SAMPLES[label])
    tolerance = op.tolerances[want.dtype]
    assert results[label].shape == want.shape
    torch.testing.assert_close(results[label], want, rtol=tolerance.rtol, atol=tolerance.atol)


def test_a_nan_scale_spoils_its_row_and_no_other(results):
    assert torch.isnan(results["nan"][1]).all()
    assert torch.isfinite(results["nan"][[0, 2]]).all()


def test_no_rows(results):
    assert results["empty"].shape == (0, 8)


def test_all_templates_are_one_kernel():
    assert len({template.body for template in TEMPLATES}) == 1
    assert TEMPLATES[0].body.count("tl.dot(") == 4  # low and high, plain and swapped
    assert "tl.store" not in TEMPLATES[0].body
