"""Variants of the linear_w8a8 kernel, run by Triton's interpreter, give its sums bit for bit."""

import pytest
import torch

from viditq_fx.ops import LINEAR_W8A8
from viditq_fx.ops.base import EPILOGUE_TOLERANCES
from viditq_fx.ops.linear import linear_w8a8

pytest.importorskip("triton", reason="the kernels are Triton kernels and Triton is not installed")

from nogpu.interpreter import run_interpreted

from viditq_fx.triton_templates.base import GemmConfig

pytestmark = pytest.mark.slow  # a subprocess imports torch and Triton anew for each file


def tile(m, n, k, split=1, group_m=8):
    return GemmConfig(
        block_m=m, block_n=n, block_k=k, num_stages=2, num_warps=4, split_k=split, group_m=group_m
    )


SPLIT, PERSISTENT, TMA = "linear_w8a8_split_k", "linear_w8a8_persistent", "linear_w8a8_tma"
PROGRAMS = {SPLIT: {}, PERSISTENT: {"programs": 3}, TMA: {"programs": 3}}
"""Three programs for more tiles: each walks over several, and the last ones over fewer."""
WALKS = {
    "one-row": ((1, 96, 48), tile(16, 16, 32)),
    "17-rows": ((17, 80, 24), tile(16, 16, 32)),
    "33-rows-ragged-n": ((33, 256, 50), tile(32, 32, 64)),
    "all-ragged": ((77, 336, 131), tile(32, 32, 128)),
    "groups": ((100, 192, 90), tile(32, 32, 64, group_m=2)),
    "fewer-tiles-than-programs": ((16, 64, 16), tile(16, 16, 32)),
}
"""(M, K, N), config. K is a multiple of 16, as descriptors want it."""
EXACT = {
    # label: (module, (M, K, N), config); K of 333 is three tiles of 128, of which the last has 77.
    "one-row": (SPLIT, (1, 512, 48), tile(16, 32, 64, split=4)),
    "17-rows": (SPLIT, (17, 333, 24), tile(16, 32, 128, split=2)),
    "33-rows-ragged-n": (SPLIT, (33, 256, 50), tile(32, 32, 32, split=8)),
    "short-last-part": (SPLIT, (77, 320, 40), tile(64, 64, 64, split=2)),
    "odd-k": (SPLIT, (31, 77, 33), tile(32, 32, 32, split=2)),
    "empty-last-part": (SPLIT, (16, 96, 16), tile(16, 16, 32, split=4)),
    "parts-and-groups": (SPLIT, (100, 192, 90), tile(32, 32, 64, split=3, group_m=2)),
    **{f"{name}-{label}": (name, *walk) for name in (PERSISTENT, TMA) for label, walk in WALKS.items()},
    f"{PERSISTENT}-odd-k": (PERSISTENT, (31, 77, 33), tile(32, 32, 32)),
}


def exact_args(shape):
    """Scales of 1 and K small enough that fp32 holds every sum: any difference is an error."""
    rows, depth, width = shape
    gen = torch.Generator().manual_seed(rows + depth + width)
    x = torch.randint(-127, 128, (rows, depth), generator=gen, dtype=torch.int8)
    w = torch.randint(-127, 128, (width, depth), generator=gen, dtype=torch.int8)
    return x, torch.ones(rows, 1), w, torch.ones(width), None, torch.float32


SAMPLES = {
    f"{name}-{s.label}": (name, s.args)
    for name in PROGRAMS
    for s in LINEAR_W8A8.samples(torch.device("cpu"))
    if name != TMA or s.args[0].shape[-1] % 16 == 0
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    cases = {label: (module, exact_args(shape), config) for label, (module, shape, config) in EXACT.items()}
    for label, (module, args) in SAMPLES.items():
        cases[label] = (module, args, tile(16, 32, 32, split=2 if module == SPLIT else 1))
    payload = [(*case, PROGRAMS[case[0]]) for case in cases.values()]
    out = run_interpreted("nogpu.interpret_linear", payload, tmp_path_factory.mktemp("run"))
    return dict(zip(cases, out, strict=True))


@pytest.mark.parametrize("label", EXACT)
def test_exact_integers(results, label):
    _, shape, _ = EXACT[label]
    assert torch.equal(results[label], linear_w8a8(*exact_args(shape)))


@pytest.mark.parametrize("label", SAMPLES)
def test_op_samples(results, label):
    _, args = SAMPLES[label]
    want = LINEAR_W8A8.reference(*args)
    tolerance = EPILOGUE_TOLERANCES[want.dtype]
    assert results[label].shape == want.shape
    torch.testing.assert_close(results[label], want, rtol=tolerance.rtol, atol=tolerance.atol)
