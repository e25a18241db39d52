"""Statistics of rows: our kernel and torch's ops against their definitions, in any shape, split and dtype."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from viditq_fx.calibration.ledger import InputKey, Ledger
from viditq_fx.calibration.statistics import BINS, BINS_PER_OCTAVE, LOWEST_EXPONENT, Statistics
from viditq_fx.calibration.timesteps import Buckets
from viditq_fx.cpu_kernels import reduce_rows

KERNELS = ("ours", "torch")


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(reduce_rows, "unavailable", lambda: "not here")
    elif reduce_rows.unavailable():
        pytest.skip(str(reduce_rows.unavailable()))
    return request.param


def _check(found: Statistics, x_MK: Tensor) -> None:
    exact = x_MK.double()
    amax_M = exact.abs().amax(1)
    assert found.count == len(exact)
    assert torch.equal(found.low.double(), exact.amin(0))
    assert torch.equal(found.high.double(), exact.amax(0))
    cancelled = float(exact.abs().sum(0).max())  # fp32 sums of what may cancel
    torch.testing.assert_close(found.total, exact.sum(0), rtol=0.0, atol=1e-5 * cancelled)
    torch.testing.assert_close(found.square, exact.square().sum(0), rtol=1e-5, atol=1e-6)
    assert float(found.token_low) == float(amax_M.min())
    bins = ((amax_M.float().log2() - LOWEST_EXPONENT) * BINS_PER_OCTAVE).clamp(0, BINS - 1).long()
    assert torch.equal(found.histogram, torch.bincount(bins, minlength=BINS))


@given(
    rows=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    depth=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("which", KERNELS)
def test_any_rows(
    which: str, rows: list[int], depth: int, dtype: torch.dtype, strided: bool, seed: int
) -> None:
    if which == "ours" and reduce_rows.unavailable():
        pytest.skip(str(reduce_rows.unavailable()))
    gen = torch.Generator().manual_seed(seed)
    found, given_rows = Statistics.empty(depth), []
    for count in rows:
        wide = torch.randn(count, depth * (2 if strided else 1), generator=gen) * 10 ** torch.randn(
            (), generator=gen
        )
        given_rows.append(wide[:, :depth].to(dtype) if not strided else wide.to(dtype)[:, ::2])
        with pytest.MonkeyPatch.context() as patch:
            if which == "torch":
                patch.setattr(reduce_rows, "unavailable", lambda: "not here")
            found.add(given_rows[-1])
    _check(found, torch.cat(given_rows))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_split_the_rows(threads: int, kernel: str) -> None:
    x_MK = torch.randn(1000, 33, generator=torch.Generator().manual_seed(0))
    found, before = Statistics.empty(33), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found.add(x_MK)
    finally:
        torch.set_num_threads(before)
    _check(found, x_MK)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad: float, kernel: str) -> None:
    x_MK = torch.ones(200, 16)
    x_MK[150, 3] = bad
    found = Statistics.empty(16)
    found.add(x_MK)
    assert not torch.isfinite(found.square[3])
    assert torch.isfinite(found.square[[0, 15]]).all()


def test_rows_of_zeros_and_signed_zeros(kernel: str) -> None:
    x_MK = torch.zeros(5, 8)
    x_MK[1] = -0.0
    found = Statistics.empty(8)
    found.add(x_MK)
    assert found.token_ranges() == (0.0, 0.0, 0.0)
    assert int(found.histogram[0]) == 5


def test_what_was_counted_moves_to_the_device_of_the_rows():
    """Of a run that goes on, or of a model that moved; meta stands for a device that is not here."""
    ledger, key = Ledger(rows=0, seed=0, branches=1, buckets=Buckets(limit=4)), InputKey(("fc",), 8)
    ledger.begin_call(None)
    ledger.see(key, torch.ones(3, 8))
    ledger.begin_call(None)
    ledger.see(key, torch.ones(3, 8, device="meta"))
    (part,) = ledger.inputs[key].parts.values()
    assert part.low.device.type == "meta"
    assert part.count == 6


def test_the_rows_are_left_alone(kernel: str) -> None:
    x_MK = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    before = x_MK.clone()
    Statistics.empty(8).add(x_MK)
    assert torch.equal(x_MK, before)
