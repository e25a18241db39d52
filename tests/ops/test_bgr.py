"""BGR against a plain loop over rows, its promise never to be worse than min-max, and the dossier's figures."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from viditq_fx.ops.bgr import Refinement
from viditq_fx.ops.grid import dequantize_weight_grid, fit_weight_grid


def squared_error(w, bits, refinement, group=0):
    """Of each row, fp64 [N]."""
    q, scale, zero = fit_weight_grid(w, bits, group, refinement)
    near = dequantize_weight_grid(q, scale, zero, group, torch.float32)
    return (w.double() - near.double()).square().sum(dim=1)


def drawn(kind, width=256, depth=3072, seed=0):
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(width, depth, generator=gen)
    if kind == "outliers":
        return torch.where(torch.rand(width, depth, generator=gen) < 0.003, w * 6, w)
    if kind == "student":
        return w / (torch.randn(4, width, depth, generator=gen).square().mean(dim=0)).sqrt()
    return w


def bgr_of_one_row(row, bits, config):
    """(step, zero point of 0..2^bits - 1) by the paper's formulas, one value after the other in fp64."""
    top, count = 2**bits - 1, len(row)
    farthest = 112 if bits <= 4 else 2**16

    def error_and_q(step, zero):
        q = [min(max(round(v / step) + zero, 0), top) for v in row]
        return sum((v - step * (k - zero)) ** 2 for v, k in zip(row, q, strict=True)), q

    def between(low, high):
        step = max((high - low) / top, max(abs(low), abs(high)) / farthest, max(abs(v) for v in row) / 2**16)
        return step, -round(low / step)

    first = between(min(row), max(row))
    best, least = first, error_and_q(*first)[0]
    starts = [i / config.bounds * (max(row) - min(row)) for i in range(math.ceil(config.bounds / 2))]
    for start in [*starts, *["up", "down"] * config.neighbours]:
        if isinstance(start, str):
            step, zero = best[0], best[1] + (1 if start == "up" else -1)
        else:
            step, zero = between(min(row) + start, max(row) - start)
        error, q = error_and_q(step, zero)
        if error < least * (1 - 1e-6):
            best, least = (step, zero), error
        for _ in range(config.steps):
            step = sum((k - zero) * v for k, v in zip(q, row, strict=True)) / sum((k - zero) ** 2 for k in q)
            step = max(step, abs(sum(row)) / count / farthest)
            zero = round(sum(q) / count - sum(row) / count / step)
            before, (error, q) = error, error_and_q(step, zero)
            if error < least * (1 - 1e-6):
                best, least = (step, zero), error
            change = error - before if config.stop == "printed" else before - error
            if change <= config.epsilon * before:
                break
    return best


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("stop", ["corrected", "printed"])
def test_all_rows_at_once_is_one_row_after_the_other(bits, stop):
    gen = np.random.default_rng(0)
    rows = gen.standard_normal((12, 90))
    rows[3:6] = gen.standard_t(3, (3, 90))
    rows[6:9] += [[0.5], [3.0], [-40.0]]
    rows[9] = np.abs(rows[9])
    rows[10] **= 5
    config = Refinement(bounds=7, steps=9, stop=stop)
    q, scale, zero = fit_weight_grid(torch.from_numpy(rows), bits, 0, config)
    for n, row in enumerate(rows.tolist()):
        step, want_zero = bgr_of_one_row(row, bits, config)
        assert float(scale[n]) == pytest.approx(step, rel=1e-6), n
        assert float(zero[n]) == want_zero - 2 ** (bits - 1), n
        want_q = np.clip(np.round(np.array(row) / float(scale[n])) + want_zero, 0, 2**bits - 1)
        assert (q[n].numpy().astype(int) + 2 ** (bits - 1) == want_q).all(), n


def test_fp32_is_as_good_as_fp64():
    w = drawn("outliers", 64, 512)
    for bits in (4, 8):
        both = [squared_error(each, bits, Refinement()).sum() for each in (w, w.double())]
        assert both[0] == pytest.approx(float(both[1]), rel=2e-3)


@st.composite
def odd_weights(draw):
    width, depth = draw(st.integers(1, 6)), draw(st.integers(1, 200))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(width, depth, generator=gen) * draw(st.sampled_from([1e-20, 1e-3, 1.0, 1e4]))
    if draw(st.booleans()):
        w = torch.where(torch.rand(width, depth, generator=gen) < 0.05, w * 40, w)
    if draw(st.booleans()):
        w[0] = w[0, 0]
    if draw(st.booleans()):
        w = (w * 2).round() / 2  # ties, and rows of few values
    w += draw(st.sampled_from([0.0, 0.0, 3.0, -200.0]))
    return w.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


@settings(max_examples=80, deadline=None)
@given(
    odd_weights(),
    st.integers(2, 8),
    st.sampled_from([0, 0, 16, 50]),
    st.sampled_from(["corrected", "printed"]),
    st.integers(1, 12),
)
def test_never_worse_than_minmax(w, bits, group, stop, bounds):
    for columns in w.split(group or w.shape[1], dim=1):
        refined = squared_error(columns, bits, Refinement(bounds=bounds, stop=stop))
        assert (refined <= squared_error(columns, bits, None)).all()
    grouped = squared_error(w, bits, Refinement(bounds=bounds, stop=stop), group)
    assert (grouped <= squared_error(w, bits, None, group) * (1 + 1e-12)).all()


@pytest.mark.parametrize(
    ("kind", "figure", "spread"),
    # Heavy tails move their figure by 0.01 from one sample to the next.
    [("gaussian", 0.62, 0.003), ("outliers", 0.39, 0.005), ("student", 0.446, 0.005)],
)
def test_the_errors_of_four_bits_relative_to_minmax(kind, figure, spread):
    w = drawn(kind)
    minmax = squared_error(w, 4, None).sum()
    corrected = squared_error(w, 4, Refinement()).sum() / minmax
    printed = squared_error(w, 4, Refinement(stop="printed", neighbours=0)).sum() / minmax
    bounds = squared_error(w, 4, Refinement(steps=0, neighbours=0)).sum() / minmax
    paper = squared_error(w, 4, Refinement(neighbours=0)).sum() / minmax
    assert corrected <= figure + spread
    assert corrected <= 0.995 * paper, "Eq. 5 keeps z where rounding holds it"
    assert corrected < printed - 0.03, "the printed stop leaves the loop after one step"
    assert printed < bounds


def test_eight_bits_gain_nothing_worth_having():
    w = drawn("gaussian", 32)
    ratio = squared_error(w, 8, Refinement()).sum() / squared_error(w, 8, None).sum()
    assert 0.97 < ratio <= 1


def test_rows_do_not_depend_on_their_neighbours():
    """Rows that converge drop out: what is left must still be told apart."""
    w = torch.cat([drawn(kind, 3, 400) for kind in ("gaussian", "outliers", "student")])
    w[4] = 1.0
    together = fit_weight_grid(w, 4, 0, Refinement())
    for n in range(w.shape[0]):
        alone = fit_weight_grid(w[n : n + 1], 4, 0, Refinement())
        for got, want in zip(
            (together[0][n : n + 1], *(t[n : n + 1] for t in together[1:])), alone, strict=True
        ):
            assert torch.equal(got, want), n


@pytest.mark.parametrize(
    "wrong",
    [
        {"bounds": 0},
        {"steps": -1},
        {"neighbours": -1},
        {"epsilon": 1.0},
        {"epsilon": -0.1},
        {"stop": "never"},
    ],
)
def test_settings_that_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Refinement(**wrong)
