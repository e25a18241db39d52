"""Which linear_w8a8 kernel and tile the estimate takes, by shape."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the templates import Triton")

from viditq_fx.lowering.linear import ROUTES
from viditq_fx.triton_templates import (
    linear_fp8,
    linear_w8a8,
    linear_w8a8_persistent,
    linear_w8a8_split_k,
    linear_w8a8_tma,
)
from viditq_fx.triton_templates.base import LinearProblem, estimated_cost, shape_class, slice_depth

PROCESSORS = {80: 108, 89: 128, 90: 132, 100: 148}
W8A8 = torch.ops.viditq.linear_w8a8.default


def problem(rows, depth, width, arch=90):
    return LinearProblem(
        rows=rows,
        width=width,
        depth=depth,
        out_dtype=torch.bfloat16,
        capability=divmod(arch, 10),
        processors=PROCESSORS[arch],
    )


def chosen(given):
    """(template, config) with the least cost of all that accept."""
    firsts = [(t, t.candidates(given)[0]) for t in ROUTES[W8A8].templates if t.supports(given) is None]
    return min(firsts, key=lambda pair: pair[0].cost(pair[1], given))


def test_shape_classes():
    assert [shape_class(m, n) for m, n in ((1, 64), (32, 9216), (33, 4), (511, 64))] == [
        "skinny",
        "skinny",
        "tall",
        "wide",
    ]
    assert [shape_class(m, n) for m, n in ((512, 64), (4096, 512), (4095, 512), (65536, 513))] == [
        "tall",
        "tall",
        "wide",
        "wide",
    ]


@pytest.mark.parametrize("arch", PROCESSORS)
def test_tall_tiles_are_no_wider_than_needed(arch):
    """A tile twice as wide as N would compute as much again for nothing."""
    for rows, width in ((32768, 64), (16384, 128), (8192, 384)):
        config = linear_w8a8.TEMPLATE.candidates(problem(rows, 3072, width, arch))[0]
        assert config.group_m == 1
        assert config.block_n <= max(width, 128)
        assert config.block_m >= config.block_n


def test_templates_without_a_tall_list_take_the_wide_one():
    tall, wide = (linear_fp8.TEMPLATE.candidates(problem(8192, 3072, width)) for width in (128, 4096))
    assert set(map(str, tall)) == set(map(str, wide))


@pytest.mark.parametrize("arch", PROCESSORS)
def test_k_is_split_where_tiles_leave_processors_idle(arch):
    assert chosen(problem(64, 10240, 1536, arch))[0] is linear_w8a8_split_k.TEMPLATE
    assert chosen(problem(77, 12288, 3072, arch))[0] is linear_w8a8_split_k.TEMPLATE
    # Enough tiles; a K so shallow that a second kernel costs more; too many rows.
    for rows, depth, width in ((77, 3072, 12288), (17, 1152, 1152), (512, 12288, 3072)):
        assert chosen(problem(rows, depth, width, arch))[0] is linear_w8a8.TEMPLATE


def test_split_takes_fewer_waves_for_its_share_of_k():
    given = problem(64, 10240, 1536)
    template, config = chosen(given)
    plain = linear_w8a8.TEMPLATE.candidates(given)[0]
    assert config.split_k * slice_depth(config, given.depth) >= given.depth
    assert (config.split_k - 1) * slice_depth(config, given.depth) < given.depth
    assert estimated_cost(config, given) < template.cost(config, given) < estimated_cost(plain, given)


@pytest.mark.parametrize("depth", [32, 128, 129, 384, 1152, 5120])
def test_every_program_of_a_split_has_some_of_k_where_there_is_enough(depth):
    for rows in (17, 100):
        for config in linear_w8a8_split_k.TEMPLATE.candidates(problem(rows, depth, 1152)):
            parts = -(-depth // slice_depth(config, depth))
            assert parts == config.split_k or depth <= config.block_k


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("template", [linear_w8a8_persistent.TEMPLATE, linear_w8a8_tma.TEMPLATE])
def test_walking_over_tiles_is_offered_and_not_chosen_unmeasured(arch, template):
    for rows, depth, width in (
        (4608, 3072, 3072),
        (32760, 5120, 13824),
        (129, 1152, 1152),
        (8192, 1152, 128),
    ):
        given = problem(rows, depth, width, arch)
        assert template.supports(given) is None
        assert template.cost(template.candidates(given)[0], given) > chosen(given)[0].cost(
            chosen(given)[1], given
        )


def test_why_not_persistent_or_descriptors():
    supports = linear_w8a8_tma.TEMPLATE.supports
    assert "sm_90 and sm_100" in supports(problem(4096, 1152, 1152, arch=89))
    assert "more than 128 rows" in supports(problem(128, 1152, 1152))
    assert supports(problem(4096, 1000, 1152)) == (
        "a descriptor's rows begin at multiples of 16 bytes; got K=1000"
    )
    assert supports(replace(problem(4096, 1152, 1152), why_no_descriptors="no")) == "no"
    assert linear_w8a8_persistent.TEMPLATE.supports(problem(4096, 1000, 1152)) is None


def test_why_not():
    supports = linear_w8a8_split_k.TEMPLATE.supports
    assert supports(problem(129, 4096, 1152)) == "splitting K is for 128 rows or fewer; got 129"
    assert "sm_75" in supports(replace(problem(17, 4096, 64), capability=(7, 5)))
