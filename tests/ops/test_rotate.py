"""A rotation changes no product and no norm, spreads what is large, and survives every tracer."""

import pytest
import torch
import torch._inductor.config as inductor_config
from hypothesis import given, settings
from hypothesis import strategies as st

from viditq_fx.ops.rotate import (
    fake_rotate_quantize,
    fake_rotated,
    hadamard,
    rotate,
    rotate_quantize,
    rotation_block,
    transform_weight,
)

BLOCKS = (1, 4, 16, 64, 256)


def test_block_of_a_width():
    widths = {
        1: 1,
        33: 1,
        40: 4,
        66: 1,
        72: 4,
        1152: 64,
        1920: 64,
        2240: 64,
        3072: 256,
        4096: 256,
        13824: 256,
    }
    assert {width: rotation_block(width) for width in widths} == widths
    with pytest.raises(ValueError, match="at least 1"):
        rotation_block(0)


@pytest.mark.parametrize("block", BLOCKS)
def test_hadamard_is_orthonormal_symmetric_and_regular(block):
    h = hadamard(block, "cpu")
    assert torch.equal(h, h.t())
    assert torch.equal(h @ h, torch.eye(block))
    assert torch.equal(h.abs(), torch.full((block, block), block**-0.5))
    assert torch.equal(h.sum(0), torch.ones(block))


@st.composite
def products(draw):
    block = draw(st.sampled_from(BLOCKS))
    width, rows, out = block * draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    multiplier = None
    if draw(st.booleans()):
        multiplier = torch.rand(width, generator=gen) + 0.25
        multiplier *= torch.randint(0, 2, (width,), generator=gen) * 2 - 1
    x, w = torch.randn(rows, width, generator=gen), torch.randn(out, width, generator=gen)
    x[:, draw(st.integers(0, width - 1))] *= draw(st.sampled_from([1.0, 100.0]))
    return x, w, multiplier, block


@settings(max_examples=60, deadline=None)
@given(products())
def test_product_and_norm_are_unchanged(case):
    x, w, multiplier, block = case
    got = rotate(x, multiplier, block) @ transform_weight(w, multiplier, block).t()
    bound = 1e-5 * x.norm(dim=1, keepdim=True) * w.norm(dim=1)
    assert ((got - x @ w.t()).abs() <= bound).all()
    norm = rotate(x, None, block).norm(dim=1)
    assert torch.allclose(norm, x.norm(dim=1), rtol=1e-5)


def test_nan_stays_in_its_row():
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    clean = rotate(x, None, 16)
    q_clean, s_clean = rotate_quantize(x, None, 16, 8, 0)
    x[1, 20] = float("nan")
    got = rotate(x, None, 16)
    assert got[1, 16:].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    q, s = rotate_quantize(x, None, 16, 8, 0)
    assert s[1].isnan().all()
    assert torch.equal(q[[0, 2]], q_clean[[0, 2]])
    assert torch.equal(s[[0, 2]], s_clean[[0, 2]])
    assert rotate_quantize(x, None, 16, 8, 16)[1].isnan().tolist() == [
        [False] * 2,
        [False, True],
        [False] * 2,
    ]


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_autocast_does_not_reach_the_rotation(backend):
    x, multiplier = torch.randn(8, 128), torch.rand(128) + 0.5

    def turned(x):
        return torch.ops.viditq.rotate(x, multiplier, 64)

    run = turned if backend is None else torch.compile(turned, backend=backend, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, turned(x), rtol=1e-5, atol=1e-5)


def test_a_common_offset_is_spread_not_gathered():
    """What Sylvester's matrix does wrong: after a GELU all channels share an offset."""
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) + 3
    assert rotate(x, None, 256).abs().amax() < 1.2 * x.abs().amax()


def test_an_outlier_channel_costs_less():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 100
    errors = []
    for block in (1, 256):
        q, s = rotate_quantize(x, None, block, 8, 0)
        errors.append((q * s - rotate(x, None, block)).norm())
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize(("width", "group"), [(48, 16), (48, 32), (40, 128)])
def test_groups_are_rows_of_their_own(width, group):
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
    q, s = rotate_quantize(x, None, 4, 8, group)
    assert s.shape == (2, 3, -(-width // group))
    rotated = rotate(x, None, 4)
    for index, part in enumerate(rotated.split(group, dim=-1)):
        want_q, want_s = torch.ops.viditq.quantize_per_token(part, 8)
        assert torch.equal(q[..., index * group :][..., : part.shape[-1]], want_q)
        assert torch.equal(s[..., index : index + 1], want_s)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: rotate(torch.ones(2, 8), None, 8), "power of 4"),
        (lambda: rotate(torch.ones(2, 8), None, 0), "power of 4"),
        (lambda: rotate(torch.ones(2, 8), None, 16), "do not divide K=8"),
        (lambda: rotate(torch.ones(2, 8), torch.ones(4), 4), r"\(4,\)"),
        (lambda: rotate(torch.ones(2, 8), torch.ones(1, 8), 4), r"\(1, 8\)"),
        (lambda: rotate(torch.tensor(1.0), None, 1), "0-d"),
        (lambda: transform_weight(torch.ones(2, 8), torch.ones(9), 4), r"\(9,\)"),
        (lambda: transform_weight(torch.ones(2, 2, 8), None, 4), r"\[N, K\]"),
        (lambda: rotate_quantize(torch.ones(2, 8), None, 4, 8, -1), "group"),
        (lambda: rotate_quantize(torch.ones(2, 8), None, 4, 9, 0), "2 to 8 bits"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_fakes_have_the_shapes_and_strides_of_the_ops():
    cases = [(torch.randn(2, 3, 40).to(torch.bfloat16), 4, 0), (torch.randn(16, 6).t(), 1, 0)]
    for x, block, group in [*cases, (torch.randn(3, 48), 16, 32), (torch.randn(8), 4, 8)]:
        real = (rotate(x, None, block), *rotate_quantize(x, None, block, 8, group))
        fake = (fake_rotated(x), *fake_rotate_quantize(x, None, block, 8, group))
        for got, want in zip(fake, real, strict=True):
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


class Rotated(torch.nn.Module):
    def forward(self, x, w, multiplier):
        rotated = torch.ops.viditq.rotate(x, multiplier, 16)
        q, s = torch.ops.viditq.rotate_quantize(x, multiplier, 16, 8, 0)
        return rotated @ torch.ops.viditq.transform_weight(w, multiplier, 16).t(), q * s


def _inputs(rows):
    gen = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, 48, generator=gen), torch.randn(5, 48, generator=gen)
    return x, w, torch.rand(48, generator=gen) + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("route", ["aot_eager", "export"])
def test_tracers_see_no_constant(route):
    model, inputs = Rotated(), _inputs(3)
    if route == "export":
        program = torch.export.export(
            model, inputs, dynamic_shapes=({0: torch.export.Dim("rows")}, None, None)
        )
        program = program.run_decompositions()
        assert not program.constants
        run = program.module()
    else:
        run = torch.compile(model, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for rows in (3, 7):
            for got, want in zip(run(*_inputs(rows)), model(*_inputs(rows)), strict=True):
                assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.slow
def test_inductor_computes_and_caches_it():
    from torch._dynamo.utils import counters

    model, inputs = Rotated(), _inputs(3)
    with torch.no_grad(), inductor_config.patch({"fx_graph_cache": True, "cpp.simdlen": 1}):
        results = []
        for _ in range(2):
            torch.compiler.reset()
            counters.clear()
            results.append(torch.compile(model, backend="inductor")(*inputs))
        assert counters["inductor"]["fxgraph_cache_bypass"] == 0
        assert counters["inductor"]["fxgraph_cache_hit"] == 1
    for got, again, want in zip(*results, model(*inputs), strict=True):
        assert torch.equal(got, again)
        assert torch.allclose(got, want, atol=2e-5)
