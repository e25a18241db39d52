"""Graphs before and after each pass: what is recorded, which blocks are alike, and what pictures say."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

import viditq_fx as vq
from tests.small_models import QUANTIZED_PER_LAYER, tiny_dit, tiny_inputs
from viditq_fx.errors import ViditqError
from viditq_fx.inspection import page
from viditq_fx.inspection.blocks import choose_block, find_blocks
from viditq_fx.inspection.breakdown import ROOT
from viditq_fx.inspection.drawing import to_dot, to_svg
from viditq_fx.inspection.flow_graph import KINDS, TRIVIAL, flow_graph
from viditq_fx.inspection.snapshots import CAPTURED
from viditq_fx.passes.base import Pass
from viditq_fx.passes.pipeline import default_passes

LAYERS = 3
STAGES = [CAPTURED, *(step.name for step in default_passes())]


@pytest.fixture(scope="module", autouse=True)
def eager():
    """Run what would go to Inductor as it is: nothing here is about generated code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
        yield


@pytest.fixture(scope="module")
def report(eager):
    return vq.explain(tiny_dit(LAYERS), *tiny_inputs(), graphs=True)


@pytest.fixture(scope="module")
def blocks(report):
    return find_blocks(report.snapshots)


def test_one_snapshot_a_pass_and_none_unless_asked(report):
    assert [(s.graph, s.after) for s in report.snapshots] == [(0, after) for after in STAGES]
    assert not vq.explain(tiny_dit(1), *tiny_inputs()).snapshots


def test_a_site_keeps_path_role_and_outcome_through_all_stages(report):
    told = {site.fqn: (site.role, site.outcome) for site in report.sites}
    for snapshot in report.snapshots:
        sites = [n for n in snapshot.nodes if n.site is not None and n.part is None and n.role != "attention"]
        assert {n.site: (n.role, n.outcome) for n in sites} == told
        assert len(sites) == len(told)
    fused = next(s for s in report.snapshots if s.after == "fuse_linear").nodes
    assert sum(n.target == "linear_w8a8" for n in fused) == LAYERS * QUANTIZED_PER_LAYER
    assert all(n.inputs for n in fused if n.target == "linear_w8a8")


def test_blocks_that_are_alike_are_one(blocks):
    assert [(b.name, b.alike) for b in blocks] == [(ROOT, []), ("blocks.0", ["blocks.1", "blocks.2"])]
    inner = choose_block(blocks)
    assert inner is choose_block(blocks, "blocks.2") is blocks[1]
    assert choose_block(blocks, "blocks.9") is None
    assert (inner.sites, inner.quantized) == (QUANTIZED_PER_LAYER + 2, QUANTIZED_PER_LAYER)


def test_the_typical_block_is_shown_first():
    """The first block differs (it has a linear more): the kind that the others are is the typical one."""
    model = tiny_dit(4)
    first = model.blocks[0]
    first.down = nn.Sequential(first.down, nn.Linear(64, 64)).eval().requires_grad_(False)
    report = vq.explain(model, *tiny_inputs(), graphs=True)
    blocks = find_blocks(report.snapshots)
    assert [(b.name, len(b.alike), b.quantized) for b in blocks if b.name != ROOT] == [
        ("blocks.0", 0, QUANTIZED_PER_LAYER + 1),
        ("blocks.1", 2, QUANTIZED_PER_LAYER),
    ]
    assert choose_block(blocks).name == "blocks.1"
    shown = {item.block.name: item.shown for item in page._graphs(report)}
    assert shown == {ROOT: False, "blocks.0": False, "blocks.1": True}
    for seen in (report, replace(report, snapshots=[])):
        assert [group.name for group in page._groups(seen) if group.open] == ["blocks.1"]


def test_a_diff_shows_what_a_pass_did(blocks):
    inner = choose_block(blocks)
    diffs = {diff.name: diff for diff in inner.diffs}
    assert list(diffs) == STAGES[1:]
    fused = [line for line in diffs["fuse_linear"].text.splitlines() if line.startswith("+linear_w8a8")]
    assert len(fused) == QUANTIZED_PER_LAYER
    assert "# q attn.q quantized" in diffs["fuse_linear"].text
    assert "+up.weight.int8: i8[256x64] = input  # up (weight)" in diffs["place_weights"].text
    assert "# one GEMM for q attn.q, k attn.k, v attn.v" in diffs["fuse_shared_input"].text
    assert min(diffs["place_weights"].added, diffs["place_weights"].removed) > 0
    assert diffs["annotate_sites"].added == diffs["annotate_sites"].removed == QUANTIZED_PER_LAYER + 1
    assert "# modulation cond kept" in diffs["annotate_sites"].text


def test_a_picture_hides_views_and_parameters_and_colours_sites(blocks):
    inner = choose_block(blocks)
    graph = flow_graph(inner, inner.stages[-1])
    kinds = {kind: [n for n in graph.nodes if n.kind == kind] for kind in KINDS}
    drawn = {path for n in kinds["quantized"] for path in n.lines[1:-1]}
    assert drawn >= {
        "q · attn.q",
        "k · attn.k",
        "v · attn.v",
        "out · attn.out",
        "up · ffn.up",
        "down · ffn.down",
    }
    assert len(drawn) == QUANTIZED_PER_LAYER
    assert {n.lines[1] for n in kinds["kept"]} == {"modulation · cond", "(block) · attention"}
    assert kinds["step"]
    assert not kinds["refused"]
    assert not [n for n in graph.nodes if n.lines[0] in TRIVIAL or "weight" in n.lines[0]]
    keys = {n.key for n in graph.nodes}
    assert {end for edge in graph.edges for end in edge} <= keys
    assert {n.lines[0] for n in kinds["port"]} >= {"output"}
    read = {target for _, target in graph.edges}
    assert all(n.key in read for n in graph.nodes if n.kind in {"quantized", "step", "kept"})


def test_json_holds_each_kind_of_block_once(report):
    data = json.loads(report.to_json())
    assert [(b["name"], b["alike"]) for b in data["blocks"]][1] == ("blocks.0", ["blocks.1", "blocks.2"])
    assert [diff["name"] for diff in data["blocks"][1]["diffs"]] == STAGES[1:]
    assert any(node["target"] == "linear_w8a8" for node in data["blocks"][1]["nodes"])


def test_svg_is_well_formed_stand_alone_and_has_a_legend(blocks):
    inner = choose_block(blocks)
    graph = flow_graph(inner, inner.stages[-1])
    text = to_svg(graph)
    assert text == to_svg(graph)
    root = ElementTree.fromstring(text)
    words = "".join(root.itertext())
    for part in (*KINDS.values(), "linear_w8a8", "q · attn.q", "f32 2x40x64", "blocks.0 and 2 alike"):
        assert part in words
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    for meaning in KINDS.values():
        assert meaning in to_dot(graph)
    assert to_dot(graph).count("->") == len(graph.edges)


def test_files_and_the_block_and_pass_that_are_asked_for(report, tmp_path):
    report.to_svg(tmp_path / "a.svg", block="blocks.1", after=CAPTURED)
    text = (tmp_path / "a.svg").read_text()
    assert "as captured" in text
    assert "linear_w8a8" not in text
    report.to_dot(tmp_path / "a.dot")
    assert (tmp_path / "a.dot").read_text().startswith("digraph")
    with pytest.raises(ViditqError, match=r"no block 'blocks\.7'.*'blocks\.1'"):
        report.to_svg(tmp_path / "b.svg", block="blocks.7")
    with pytest.raises(ViditqError, match=r"no pass 'fuse'.*fuse_linear"):
        report.to_svg(tmp_path / "b.svg", after="fuse")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.dot", "a.svg"]


def test_kept_and_refused_sites_show(eager):
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.ones(64))
            self.second = nn.Linear(64, 64)

        def forward(self, x):
            return self.second(nn.functional.linear(x, self.weight * self.scale))

    model = Computed().requires_grad_(False)
    report = vq.explain(model, torch.randn(40, 64), options={"keep": ["second"]}, graphs=True)
    (block,) = find_blocks(report.snapshots)
    kinds = [node.kind for node in flow_graph(block, block.stages[-1]).nodes]
    assert (kinds.count("refused"), kinds.count("kept")) == (1, 1)


class Broken(nn.Module):
    """Two graphs."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x):
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.blocks[1](x.relu())


def test_a_graph_break_gives_two_graphs():
    report = vq.explain(Broken().requires_grad_(False), torch.randn(40, 64), graphs=True)
    assert {s.graph for s in report.snapshots} == {0, 1}
    blocks = find_blocks(report.snapshots)
    assert {(b.name, b.graph) for b in blocks if b.sites} == {("blocks.0", 0), ("blocks.1", 1)}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "in place", "blocks", "wrapped blocks"])
def test_a_compiled_model_shows_the_graphs_of_the_whole(how):
    model = tiny_dit(2)
    options = {"keep": ["*down"]}
    if how == "whole":
        compiled = torch.compile(model, backend="viditq", options=options)
    else:
        compiled = model
    if how == "in place":
        model.compile(backend="viditq", options=options)
    for index, block in enumerate(model.blocks):
        if how == "blocks":
            block.compile(backend="viditq", options=options)
        if how == "wrapped blocks":
            model.blocks[index] = torch.compile(block, backend="viditq", options=options)
    report = vq.explain(compiled, *tiny_inputs(), graphs=True)
    assert {s.graph for s in report.snapshots} == {0}
    last = report.snapshots[-1].nodes
    outcomes = {n.site: n.outcome for n in last if n.site and n.part is None}
    assert list(outcomes.values()).count("quantized") == 2 * (QUANTIZED_PER_LAYER - 1)
    assert {path: outcomes[path] for path in ("blocks.0.down", "blocks.1.q")} == {
        "blocks.0.down": "kept",
        "blocks.1.q": "quantized",
    }
    blocks = find_blocks(report.snapshots)
    assert choose_block(blocks).name == "blocks.0"
    if how != "whole":  # compiled forms are put back
        assert vq.explain(compiled, *tiny_inputs()).count("quantized") == report.count("quantized")


def test_released_weights_cannot_be_traced_again_but_a_plain_model_can_first():
    model = tiny_dit(1)
    options = {"weights": "release"}
    report = vq.explain(model, *tiny_inputs(), options=options, graphs=True)
    assert report.snapshots
    assert report.totals()["quantized_weight_bytes_full_resident"] == 0
    with pytest.raises(ViditqError, match="released"):
        vq.explain(model, *tiny_inputs(), graphs=True)


@dataclass(frozen=True, kw_only=True)
class Idle(Pass):
    """A user's pass that does nothing."""

    name: ClassVar[str] = "idle"
    changes_numerics: ClassVar[bool] = False

    def run(self, gm, ctx):
        return ()


def test_extra_passes_have_their_snapshot():
    report = vq.explain(tiny_dit(1), *tiny_inputs(), options={"extra_passes": [Idle()]}, graphs=True)
    assert {s.after for s in report.snapshots} - set(STAGES) == {"idle"}


def test_a_function_has_no_graphs():
    compiled = torch.compile(torch.nn.functional.linear, backend="viditq")
    with pytest.raises(ViditqError, match=r"needs a torch\.nn\.Module"):
        vq.explain(compiled, torch.ones(40, 64), torch.ones(64, 64), graphs=True)


def test_without_graphs_pictures_say_what_to_do(tmp_path):
    report = vq.explain(nn.Linear(64, 64).requires_grad_(False), torch.ones(40, 64))
    with pytest.raises(ViditqError, match="graphs=True"):
        report.to_svg(tmp_path / "a.svg")
