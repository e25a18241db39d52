"""What passes from outside did and declined reaches the reader: report, text, tables, page, JSON, graphs."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import viditq_fx as vq
from tests.small_models import tiny_dit, tiny_inputs
from viditq_fx import ops
from viditq_fx.cli.tables import total_tables
from viditq_fx.errors import ViditqError
from viditq_fx.inspection.answers import answers
from viditq_fx.inspection.breakdown import by_declined
from viditq_fx.inspection.page import render_page
from viditq_fx.passes.base import Match, Pass, Reject
from viditq_fx.passes.pipeline import after
from viditq_fx.report import Declined
from viditq_fx.runtime import executions

LAYERS = 2
REASON = "its output is 256 wide: too wide for the kernel of this test"


@pytest.fixture(scope="module", autouse=True)
def eager():
    """Run what would go to Inductor as it is: nothing here is about generated code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
        yield


@dataclass(frozen=True, kw_only=True)
class Negate(Pass):
    """Negates integer linears twice, but for wide ones."""

    name: ClassVar[str] = "negate"
    changes_numerics: ClassVar[bool] = False
    limit: int = 256

    def run(self, gm, ctx):
        results = []
        for node in [n for n in gm.graph.nodes if n.target is ops.LINEAR_W8A8.overload]:
            site, value = node.meta["viditq_site"], node.meta["example_value"]
            if value.shape[-1] >= self.limit:
                results.append(Reject(site=site, reason=REASON))
                continue
            with gm.graph.inserting_after(node):
                once = gm.graph.call_function(torch.neg, (node,))
            with gm.graph.inserting_after(once):
                twice = gm.graph.call_function(torch.neg, (once,))
            for made in (once, twice):
                made.meta["example_value"] = value
            node.replace_all_uses_with(twice, lambda user, once=once: user is not once)
            results.append(Match(site=site))
        return tuple(results)


PLACED = after("fuse_activation_quantize", Negate())
OPTIONS = {"extra_passes": [PLACED], "plugins": False}
UPS = [f"blocks.{index}.up" for index in range(LAYERS)]


def compiled_in(how, model, options):
    if how == "whole":
        return torch.compile(model, backend="viditq", options=options)
    for block in model.blocks:
        block.compile(backend="viditq", options=options)
    return model


@pytest.fixture(scope="module", params=["plain", "whole", "blocks"])
def report(request, eager):
    torch._dynamo.reset()
    if request.param == "plain":
        return vq.explain(tiny_dit(LAYERS), *tiny_inputs(), options=OPTIONS, graphs=True)
    return vq.explain(compiled_in(request.param, tiny_dit(LAYERS), OPTIONS), *tiny_inputs(), graphs=True)


def test_a_reject_is_in_the_report_of_the_compilation():
    with executions() as ran, torch.no_grad():
        compiled_in("whole", tiny_dit(LAYERS), OPTIONS)(*tiny_inputs())
    told = [item for item in ran[0].report.declined if item.extra]
    assert told == [Declined(step="negate", fqn=path, reason=REASON, extra=True) for path in UPS]
    ours = [item for item in ran[0].report.declined if not item.extra]
    assert {item.step for item in ours} >= {"annotate_sites", "annotate_attention"}
    assert len(ours) == sum(t.rejects for t in ran[0].report.passes if t.name != "negate")


def test_explain_tells_it_with_full_paths(report):
    (row,) = by_declined(report)
    assert (row.step, row.reason, row.extra, row.sites) == ("negate", REASON, True, UPS)
    note = f"Extra pass 'negate' declined {LAYERS} places: {REASON}. Where: blocks.*.up ({LAYERS})."
    assert note in answers(report).notes
    assert note in str(report)
    assert "negate (extra)" in str(report)
    assert report.to_dict()["by_declined"][0]["sites"] == UPS


def test_the_terminal_and_the_page_show_it(report):
    cells = [list(column.cells) for table in total_tables(report) for column in table.columns]
    assert any(REASON in map(str, column) for column in cells)
    page = render_page(report)
    assert page.count(REASON) == 2  # among the notes, and in the table of what passes declined
    assert "What passes declined" in page


def test_without_it_nothing_is_told():
    report = vq.explain(tiny_dit(1), *tiny_inputs())
    assert not by_declined(report)
    assert "what passes declined" not in str(report)
    assert not any("Extra pass" in note for note in answers(report).notes)


def test_its_graphs_are_shown_however_the_model_was_compiled(report):
    stages = [snapshot.after for snapshot in report.snapshots]
    assert stages[stages.index("negate") - 1] == "fuse_activation_quantize"
    by_stage = {s.after: [n.target for n in s.nodes] for s in report.snapshots}
    linears = by_stage["negate"].count("linear_w8a8")
    added = by_stage["negate"].count("neg") - by_stage["fuse_activation_quantize"].count("neg")
    assert added == 2 * (linears - LAYERS)


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_graphs_are_those_of_the_options_that_it_was_compiled_with(how):
    options = {"scheme": "w8a7", "attention": "int8", "plugins": False}
    report = vq.explain(compiled_in(how, tiny_dit(1), options), *tiny_inputs(), graphs=True)
    targets = [node.target for node in report.snapshots[-1].nodes]
    assert targets.count("attention_int8") == 1
    assert targets.count("linear_w8a7") == 4
    assert "linear_w8a8" not in targets


@pytest.mark.parametrize(
    "other", [{"scheme": "w8a7"}, {"extra_passes": [after("fuse_activation_quantize", Negate(limit=1))]}]
)
def test_blocks_compiled_with_different_passes_cannot_be_shown_as_one(other):
    model = tiny_dit(2)
    model.blocks[0].compile(backend="viditq", options=OPTIONS)
    model.blocks[1].compile(backend="viditq", options={**OPTIONS, **other})
    with pytest.raises(ViditqError, match=r"compiled with 2: .*(w8a7|limit=1)"):
        vq.explain(model, *tiny_inputs(), graphs=True)
    assert vq.explain(model, *tiny_inputs()).count("quantized")


def test_blocks_compiled_alike_are_alike_though_their_passes_are_others():
    model = tiny_dit(2)
    for block in model.blocks:
        fresh = {"extra_passes": [after("fuse_activation_quantize", Negate())], "plugins": False}
        block.compile(backend="viditq", options=fresh)
    assert vq.explain(model, *tiny_inputs(), graphs=True).snapshots


class Fails(Negate):
    name = "fails"

    def run(self, gm, ctx):
        raise KeyError("no such thing")


def test_a_pass_that_raises_leaves_graphs_without_it():
    options = {"extra_passes": [Fails()], "plugins": False}
    compiled = compiled_in("whole", tiny_dit(1), options)
    with pytest.warns(UserWarning, match="compiled without it"):
        report = vq.explain(compiled, *tiny_inputs(), graphs=True)
    assert report.snapshots
    assert "fails" not in {s.after for s in report.snapshots}
    assert any("extra pass 'fails' raised KeyError" in text for text in answers(report).not_quantized)
