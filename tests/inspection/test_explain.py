"""explain tells what ran: outcomes, full paths, bytes, and that nothing did."""

import json

import pytest
import torch
from torch import nn

import viditq_fx as vq
from tests.small_models import KEPT_OUTSIDE_LAYERS, QUANTIZED_PER_LAYER, tiny_dit, tiny_inputs
from viditq_fx.errors import ViditqError

LAYERS = 2


@pytest.fixture(scope="module")
def report():
    return vq.explain(tiny_dit(LAYERS), *tiny_inputs(), options={"keep": ["blocks.1.down"]})


def test_counts(report):
    assert report.count("quantized") == LAYERS * QUANTIZED_PER_LAYER - 1
    assert report.count("kept") == KEPT_OUTSIDE_LAYERS + LAYERS + 1
    assert report.count("refused") == 0
    assert len(report.sites) == sum(isinstance(m, nn.Linear) for m in tiny_dit(LAYERS).modules())


def test_bytes_are_true(report):
    totals = report.totals()
    elements = sum(s.depth * s.width for s in report.sites if s.done)
    assert totals["quantized_weight_bytes_before"] == 4 * elements
    assert totals["quantized_weight_bytes_full_resident"] == 4 * elements  # weights="keep"
    assert elements < totals["quantized_weight_bytes_packed"] < 1.3 * elements
    model = tiny_dit(LAYERS)
    assert report.model_bytes_before == sum(4 * p.numel() for p in model.parameters())
    assert report.model_bytes == report.model_bytes_before + totals["quantized_weight_bytes_packed"]


def test_json_and_text(report):
    data = json.loads(report.to_json())
    assert data["totals"]["quantized"] == report.count("quantized")
    assert {"fqn", "role", "planned", "done", "kernel", "reason", "bytes_full", "outcome"} <= set(
        data["sites"][0]
    )
    text = str(report)
    for site in report.sites:
        assert site.fqn in text
    assert "kept by pattern 'blocks.1.down'" in text


@pytest.mark.slow
def test_regional_graphs_get_full_paths():
    model = tiny_dit(3)
    for block in model.blocks:
        block.compile(backend="viditq")
    report = vq.explain(model, *tiny_inputs())
    assert (report.graphs, report.graph_runs) == (1, 3)
    assert {f"blocks.{i}.q" for i in range(3)} <= {s.fqn for s in report.sites if s.done}
    assert report.count("quantized") == 3 * QUANTIZED_PER_LAYER


@pytest.mark.slow
def test_release_shows_in_the_bytes():
    model = tiny_dit(1)
    compiled = torch.compile(model, backend="viditq", options={"weights": "release"})
    with torch.no_grad():
        compiled(*tiny_inputs())
    totals = vq.explain(compiled, *tiny_inputs()).totals()
    assert totals["quantized_weight_bytes_full_resident"] == 0
    assert totals["model_bytes"] < totals["model_bytes_before"]


def test_gradients_show_as_a_refusal():
    layer = nn.Linear(64, 64)
    compiled = torch.compile(layer, backend="viditq")
    report = vq.explain(compiled, torch.randn(40, 64))
    assert not report.rejects, "explain itself runs without gradients"


def test_nothing_ran():
    with pytest.raises(ViditqError, match="no viditq graph ran"):
        vq.explain(torch.compile(nn.Linear(64, 64), backend="eager"), torch.randn(40, 64))


def test_options_belong_to_the_compilation():
    compiled = torch.compile(nn.Linear(64, 64), backend="viditq")
    with pytest.raises(ViditqError, match="compiled already"):
        vq.explain(compiled, torch.randn(40, 64), options={"scheme": "w8a7"})


@pytest.mark.slow
def test_a_report_of_a_model_that_wants_gradients_says_what_it_shows():
    """The user's own call outside no_grad runs plain Inductor: the report is not of that call, and says so."""
    model = tiny_dit(1).requires_grad_(True)
    report = vq.explain(model, *tiny_inputs())
    assert report.count("quantized")
    assert "left to plain Inductor" in str(report)
    with torch.no_grad():
        assert "left to plain Inductor" not in str(vq.explain(model, *tiny_inputs()))
