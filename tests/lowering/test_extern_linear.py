"""The cuBLAS fall-back pads to the limits of `torch._int_mm` and gives the op's reference."""

import pytest
import torch

from viditq_fx.lowering.extern_linear import (
    MIN_ROWS,
    MULTIPLE,
    padded_int_mm,
    viditq_int_mm_linear,
    viditq_scaled_mm_linear,
    why_no_scaled_mm,
)
from viditq_fx.ops import LINEAR_W8A8, LINEAR_W8A8_FP8
from viditq_fx.ops.base import EPILOGUE_TOLERANCES
from viditq_fx.ops.linear import exact_int_matmul
from viditq_fx.triton_templates.base import LinearProblem

SAMPLES = {sample.label: sample.args for sample in LINEAR_W8A8.samples(torch.device("cpu"))}


@pytest.mark.parametrize("rows", [0, *range(1, 19)])
def test_exact_for_few_rows(rows):
    gen = torch.Generator().manual_seed(rows)
    x_MK = torch.randint(-127, 128, (rows, 33), generator=gen, dtype=torch.int8)
    w_NK = torch.randint(-127, 128, (7, 33), generator=gen, dtype=torch.int8)
    assert torch.equal(padded_int_mm(x_MK, w_NK), exact_int_matmul(x_MK, w_NK))


@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 33, 7), (16, 40, 24), (17, 1, 8)])
def test_keeps_to_the_limits(monkeypatch, rows, depth, width):
    """What cuBLAS refuses never reaches it: M <= 16, K or N not a multiple of 8."""
    seen = []

    def int_mm(x_MK, w_KN):
        seen.append((*x_MK.shape, w_KN.shape[1]))
        return x_MK.int() @ w_KN.int()

    monkeypatch.setattr(torch.ops.aten, "_int_mm", int_mm)
    x_MK, w_NK = torch.ones(rows, depth, dtype=torch.int8), torch.ones(width, depth, dtype=torch.int8)
    assert torch.equal(padded_int_mm(x_MK, w_NK), torch.full((rows, width), depth, dtype=torch.int32))
    ((m, k, n),) = seen
    assert m >= MIN_ROWS
    assert k % MULTIPLE == n % MULTIPLE == 0


@pytest.mark.parametrize("label", SAMPLES)
def test_op_samples(label):
    *args, bias, dtype = SAMPLES[label]
    got = viditq_int_mm_linear(*args, *([] if bias is None else [bias]), out_dtype=dtype)
    want = LINEAR_W8A8.reference(*args, bias, dtype)
    tolerance = EPILOGUE_TOLERANCES[dtype]
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=tolerance.rtol, atol=tolerance.atol)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"capability": (8, 9)}, "need sm_90"),
        ({"out_dtype": torch.float16}, "give bf16"),
        ({"depth": 72}, "multiples of 16"),
        ({"width": 8}, "multiples of 16"),
    ],
)
def test_what_row_wise_scaled_mm_computes(change, reason):
    fields = {"rows": 64, "width": 64, "depth": 64, "out_dtype": torch.bfloat16, "capability": (9, 0)}
    problem = LinearProblem(**{**fields, **change}, processors=132)
    told = why_no_scaled_mm(problem, None)
    assert told is None if reason is None else reason in told
    assert "bias in bf16" in (why_no_scaled_mm(LinearProblem(**fields, processors=132), torch.float32) or "")


def test_scaled_mm_is_given_what_it_wants(monkeypatch):
    """cuBLASLt is not here: the call's operands by a stand-in that multiplies them."""

    def scaled_mm(x_MK, w_KN, scale_M, scale_N, *, bias, out_dtype, use_fast_accum):
        assert (w_KN.stride(0), use_fast_accum) == (1, False), "w is column-major, sums are whole"
        y = (x_MK.float() @ w_KN.float()) * scale_M * scale_N
        return (y if bias is None else y + bias.float()).to(out_dtype)

    monkeypatch.setattr(torch.ops.aten, "_scaled_mm", scaled_mm)
    for sample in LINEAR_W8A8_FP8.samples(torch.device("cpu")):
        *args, bias, dtype = sample.args
        got = viditq_scaled_mm_linear(*args, *([] if bias is None else [bias]), out_dtype=dtype)
        tolerance = LINEAR_W8A8_FP8.tolerances[dtype]
        want = LINEAR_W8A8_FP8.reference(*sample.args)
        torch.testing.assert_close(got, want, rtol=tolerance.rtol, atol=tolerance.atol)
