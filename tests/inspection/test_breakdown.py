"""Totals by role, reason, kernel and pass add up; the answers say them in sentences."""

import pytest
import torch
from torch import nn

import viditq_fx as vq
from tests.small_models import tiny_dit, tiny_inputs
from viditq_fx.inspection.answers import answers, count_of, lines, percent
from viditq_fx.inspection.breakdown import (
    ROOT,
    block_of,
    by_kernel,
    by_pass,
    by_reason,
    by_role,
    everything,
    total,
)
from viditq_fx.passes.pipeline import default_passes

LAYERS = 2


@pytest.fixture(scope="module")
def eager():
    """Run what would go to Inductor as it is: nothing here is about generated code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
        yield


@pytest.fixture(scope="module")
def report(eager):
    return vq.explain(tiny_dit(LAYERS), *tiny_inputs(), options={"keep": ["blocks.1.down"]})


def test_roles_add_up(report):
    rows = {row.role: row for row in by_role(report)}
    assert rows["attn.q"].sites == rows["attn.q"].quantized == LAYERS
    assert (rows["ffn.down"].quantized, rows["ffn.down"].kept) == (LAYERS - 1, 1)
    assert rows["attention"].sites == LAYERS
    assert rows["ffn.down"].flops_share == (LAYERS - 1) / LAYERS
    whole = total(rows.values())
    assert whole.sites == len(everything(report)) == whole.quantized + whole.kept + whole.refused
    assert whole.flops == sum(site.flops for site in everything(report))
    assert whole.weight_bytes_quantized == report.totals()["quantized_weight_bytes_before"]
    assert whole.weight_bytes_packed == report.totals()["quantized_weight_bytes_packed"]
    assert whole.weight_bytes == sum(4 * m.weight.numel() for m in linears(tiny_dit(LAYERS)))


def linears(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def test_reasons_cover_all_that_is_not_quantized(report):
    rows = by_reason(report)
    assert sum(len(row.sites) for row in rows) == sum(site.done is None for site in everything(report))
    assert {tuple(row.sites) for row in rows if "pattern" in row.reason} == {("blocks.1.down",)}
    assert all(row.reason for row in rows)


def test_kernels_and_passes(report):
    kernels = by_kernel(report)
    assert sum(row.sites for row in kernels) == len(everything(report))
    passes = by_pass(report)
    assert [row.name for row in passes] == [step.name for step in default_passes()]
    assert all(row.graphs == 1 and row.seconds > 0 for row in passes)


def test_answers_name_what_why_and_how_much(report):
    found = answers(report)
    assert f"{report.count('quantized')} of {len(report.sites)} linears" in found.quantized[0]
    assert any("kept by pattern 'blocks.1.down'" in text for text in found.not_quantized)
    assert any("attention" in text for text in found.not_quantized)
    assert "release" in " ".join(found.saves)
    assert len(lines(report)) == sum(
        len(part) for part in (found.quantized, found.not_quantized, found.saves, found.notes)
    )
    for text in lines(report):
        assert text in str(report)


def test_json_holds_the_breakdown(report):
    data = report.to_dict()
    assert sum(row["flops"] for row in data["by_role"]) == sum(site.flops for site in everything(report))
    assert {"by_role", "by_reason", "by_kernel", "by_pass", "attention"} <= set(data)


def test_regional_attention_gets_its_full_path_and_counts_every_call(eager):
    model = tiny_dit(3)
    for block in model.blocks:
        block.compile(backend="viditq")
    report = vq.explain(model, *tiny_inputs())
    assert [site.fqn for site in report.attention] == [f"blocks.{i}" for i in range(3)]
    assert len({site.flops for site in report.attention}) == 1
    assert any("ran 3 times" in note for note in answers(report).notes)


def test_dynamic_shapes_are_told(eager):
    compiled = torch.compile(tiny_dit(1), backend="viditq", dynamic=True)
    report = vq.explain(compiled, *tiny_inputs())
    assert any("dynamic" in note for note in answers(report).notes)
    assert all(site.flops for site in everything(report))


def test_nothing_quantized(eager):
    report = vq.explain(nn.Linear(8, 8), torch.ones(40, 8))
    found = answers(report)
    assert found.quantized[0].startswith("Nothing")
    assert found.saves[0].startswith("Nothing")
    assert "fewer than 32 channels" in found.not_quantized[0]


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("transformer_blocks.0.attn.to_q", "transformer_blocks.0"),
        ("a.blocks.12.ff.net.0.proj", "a.blocks.12"),
        ("3", "3"),
        ("proj_out", ROOT),
        ("", ROOT),
    ],
)
def test_a_block_ends_at_the_first_number(path, block):
    assert block_of(path) == block


def test_numbers_as_text():
    assert [count_of(n) for n in (0, 999, 12_340, 99_960_000, 3 * 10**15)] == [
        "0 ",
        "999 ",
        "12.3 k",
        "100 M",
        "3.00 P",
    ]
    assert [percent(*pair) for pair in ((0, 0), (1, 3), (3, 3), (9999, 10000))] == [
        "0%",
        "33.3%",
        "100%",
        "over 99.9%",
    ]
