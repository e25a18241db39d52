"""The printed form of ARQ, simulated: by hand, what holds for it whatever is drawn, and that nothing runs it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from viditq_fx import ops
from viditq_fx.ops.arq_simulation import simulate_printed_arq, simulate_printed_input
from viditq_fx.ops.grid import dequantize_weight_grid, quantize_weight_grid
from viditq_fx.ops.rotate import rotate, transform_weight

LEVELS = ("fixed", "token")


def by_hand(x, bits, levels):
    """Q(X L^-1) L of an unrotated x, number by number in fp64."""
    top = 2 ** (bits - 1) - 1
    s = [max(abs(row[j]) for row in x) for j in range(len(x[0]))]
    result = []
    for row in x:
        even = [v / each for v, each in zip(row, s, strict=True)]
        step = (max(abs(v) for v in even) if levels == "token" else 1.0) / top
        result.append([round(v / step) * step * each for v, each in zip(even, s, strict=True)])
    return result


@pytest.mark.parametrize("levels", LEVELS)
def test_equation_10_by_hand(levels):
    gen = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 16, generator=gen, dtype=torch.float64) for n in (5, 3))
    x[:, 2] *= 40
    stored = quantize_weight_grid(transform_weight(w, None, 4), 4, 0, "bgr")
    w_hat = dequantize_weight_grid(*stored, 0, torch.float32).double()
    rotated = rotate(x, None, 4).double()
    want = torch.tensor(by_hand(rotated.tolist(), 4, levels), dtype=torch.float64) @ w_hat.t()
    got = simulate_printed_arq(x.float(), w.float(), torch.ones(3), block=4, levels=levels)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), want + 1, rtol=1e-5, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 9),
    bits=st.integers(2, 8),
    block=st.sampled_from([1, 4, 16]),
    levels=st.sampled_from(LEVELS),
)
def test_whatever_is_drawn(seed, tokens, bits, block, levels):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 32, generator=gen) * torch.exp(torch.randn(32, generator=gen) * 2)
    got, rotated = simulate_printed_input(x, block=block, bits=bits, levels=levels), rotate(x, None, block)
    s_K = rotated.abs().amax(0)
    assert ((got - rotated).abs() <= s_K * (0.5001 / (2 ** (bits - 1) - 1))).all(), (
        "half a step of its channel"
    )
    order = torch.randperm(tokens, generator=gen)
    moved = simulate_printed_input(x[order], block=block, bits=bits, levels=levels)
    assert torch.allclose(moved, got[order], rtol=1e-5, atol=1e-6 * float(s_K.max())), "tokens have no order"
    if tokens == 1:
        assert torch.allclose(got, rotated, rtol=1e-5), "a token alone is its own scale"
    if block == 1 and levels == "fixed":
        factor = 2.0 ** torch.randint(-6, 7, (32,), generator=gen)
        assert torch.equal(simulate_printed_input(x * factor, block=1, bits=bits), got * factor)


@pytest.mark.parametrize("levels", LEVELS)
def test_odd_inputs(levels):
    zero = torch.zeros(2, 3, 8)
    assert torch.equal(simulate_printed_input(zero, block=4, bits=4, levels=levels), zero)
    assert simulate_printed_input(torch.empty(0, 8), block=4, bits=4, levels=levels).shape == (0, 8)
    for bad in (math.nan, math.inf):
        x = torch.ones(3, 8)
        x[1, 2] = bad
        assert torch.isnan(simulate_printed_arq(x, torch.ones(2, 8), block=1, levels=levels)).all()
    for wrong, said in (
        ({"levels": "both"}, "choose one of"),
        ({"bits": 9}, "bits=9"),
        ({"block": 3}, "power of 4"),
    ):
        with pytest.raises(ValueError, match=said):
            simulate_printed_arq(zero, torch.ones(2, 8), **{"block": 1, "levels": levels} | wrong)


def test_nothing_runs_it():
    """No op and no scheme: there is no integer GEMM for a scale inside the sum over K."""
    registered = {name for name in dir(torch.ops.viditq) if not name.startswith("_")}
    assert "linear_w4a4" in registered
    assert not [name for name in registered | set(vars(ops)) if "simulate" in name or "printed" in name]
