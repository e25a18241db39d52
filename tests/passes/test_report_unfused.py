"""A quantize with a norm or an activation above it is fused, or the report says what kept it from that."""

import pytest
import torch
from torch.nn import functional as F

from viditq_fx.inspection.render import why
from viditq_fx.passes.base import Reject
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.passes.report_unfused import ReportUnfused
from viditq_fx.testing import prepared, targets

K = 64
NAMES = [step.name for step in default_passes()]
FUSES = default_passes()[NAMES.index("hoist_quantize") : NAMES.index("report_unfused")]


def drawn(*shapes):
    gen = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=gen) for shape in shapes)


def reported(program):
    """(what the pass says, the linear's entry in the report)."""
    graph = prepared(program, *drawn((2, 20, K), (K, K)), upto="hoist_quantize")
    PassPipeline(passes=FUSES).run(graph.gm, graph.ctx)
    nodes = targets(graph.gm)
    results = ReportUnfused().run(graph.gm, graph.ctx)
    assert targets(graph.gm) == nodes
    assert ReportUnfused().run(graph.gm, graph.ctx) == ()  # says it once
    return results, graph.ctx.report.sites[0]


def norm(x):
    return F.layer_norm(x, (K,))


MISSED = {
    "joined with other channels": (
        lambda x, w: F.linear(torch.cat([F.gelu(x[..., :32]), x[..., 32:]], -1), w),
        ["gelu (gelu)", "is joined with other channels by", "a row has one scale"],
    ),
    "a residual between": (
        lambda x, w: F.linear((norm(x) + x + w[0]).contiguous(), w),
        ["layer_norm", "(add), "],
    ),
    "an unknown op of the pattern's": (lambda x, w: F.linear(norm(x).tanh(), w), ["layer_norm", "(tanh)"]),
    "modulated per frame": (
        lambda x, w: F.linear((norm(x).unflatten(1, (4, 5)) * (1 + w[:4, None])).flatten(1, 2), w),
        ["layer_norm", "(mul)"],
    ),
}


@pytest.mark.parametrize("name", MISSED)
def test_what_no_pattern_matches_is_named(name):
    program, words = MISSED[name]
    (result,), entry = reported(program)
    assert isinstance(result, Reject)
    assert result.reason.startswith("norm or activation upstream, not fused: ")
    assert all(word in result.reason for word in words), result.reason
    assert (entry.prologue, entry.unfused) == (None, result.reason)


SAID_ALREADY = {
    "by the rewrite": lambda x, w: (lambda h: F.linear(h, w) + h)(norm(x)),
    "by the hoist": lambda x, w: (lambda h: F.linear(h, w) + h)(torch.cat([norm(x), x], 1)),
}


@pytest.mark.parametrize("name", SAID_ALREADY)
def test_what_was_said_is_not_said_twice(name):
    results, entry = reported(SAID_ALREADY[name])
    assert results == ()
    assert entry.unfused is not None
    assert entry.unfused.startswith("norm or activation upstream, not fused: ")
    assert "also read by" in entry.unfused


NOTHING_TO_SAY = {
    "fused": lambda x, w: F.linear(norm(x), w),
    "fused above a cat": lambda x, w: F.linear(torch.cat([norm(x), x], 1), w),
    "no norm": lambda x, w: F.linear(x + 1, w),
    "the norm lends its type alone": lambda x, w: F.linear((x + 1).type_as(norm(x)), w) + norm(x),
    "behind another linear": lambda x, w: F.linear(x * F.linear(norm(x), w), w).flip(0),
}


@pytest.mark.parametrize("name", NOTHING_TO_SAY)
def test_silence(name):
    results, entry = reported(NOTHING_TO_SAY[name])
    assert results == ()
    assert entry.unfused is None


def test_explain_shows_it():
    _, entry = reported(MISSED["joined with other channels"][0])
    entry.joined = None
    assert why(entry) == entry.unfused
