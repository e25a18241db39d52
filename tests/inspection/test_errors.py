"""explain shows where errors come from and the bits of steps: numbers by hand, words, pictures, JSON."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("jinja2")

import viditq_fx as vq
from tests.inspection.test_page import Balance
from tests.made_findings import loud_channel, made_findings
from tests.small_models import tiny_dit, tiny_inputs
from viditq_fx.calibration.weight_errors import weight_errors
from viditq_fx.errors import ViditqError
from viditq_fx.inspection.error_chart import MOST_ROWS, chosen
from viditq_fx.inspection.errors import error_report
from viditq_fx.inspection.page import render_page
from viditq_fx.inspection.steps import StepHistory
from viditq_fx.ops.rotate import hadamard
from viditq_fx.switching import StepRecord, SwitchRule

EVEN_SITES = tuple(f"blocks.1.{name}" for name in "kqv")


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return {site: torch.randn(6, 64) for site in ("blocks.0.down", *EVEN_SITES)}


@pytest.fixture(scope="module")
def findings(weights):
    """One site with a loud channel at timestep 900, and three that read ones."""
    return made_findings(
        {
            ("blocks.0.down",): (torch.ones(4, 64), loud_channel(64, 7, 40.0)),
            EVEN_SITES: (torch.ones(4, 64), torch.ones(4, 64)),
        },
        weights,
    )


@pytest.fixture(scope="module")
def report(findings):
    """A real report of a tiny model with the errors of the made findings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
        yield vq.explain(tiny_dit(2), *tiny_inputs(), errors=findings)


def test_the_numbers_are_those_of_the_input(report):
    loud, *even = report.errors.sites
    assert (loud.site, loud.group, loud.worst_channel) == ("blocks.0.down", ("blocks.0.down",), 7)
    assert (loud.token, loud.timestep) == pytest.approx((1, 40))
    assert loud.channel == pytest.approx(40 / (103 / 64))
    square = 4 * 64 + 4 * (63 + 1600)
    assert loud.incoherence == pytest.approx(40 * (8 * 64) ** 0.5 / square**0.5)
    assert loud.by_range == (pytest.approx((10, 20, 1, 1)), pytest.approx((900, 900, 40, loud.channel)))
    assert loud.advice == ("balance + rotate", "a dynamic or timestep-wise scale")
    assert [(e.site, e.group, e.advice) for e in even] == [(site, EVEN_SITES, ()) for site in EVEN_SITES]


def by_hand(w_NK):
    """Relative squared error of 4-bit weights between the least and the largest of each row."""
    low, high = w_NK.amin(1, keepdim=True), w_NK.amax(1, keepdim=True)
    scale = (high - low) / 15
    zero = torch.round(-low / scale)
    near = (torch.clamp(torch.round(w_NK / scale + zero), 0, 15) - zero) * scale
    return float((near - w_NK).square().sum() / w_NK.square().sum())


def test_weight_errors_before_and_after_bgr_and_rotation(report, weights):
    for site, w_NK in weights.items():
        found = report.errors.weight(site)
        assert (found.bits, found.rotation) == (4, 64)
        assert found.minmax == pytest.approx(by_hand(w_NK), rel=1e-3)
        assert found.rotated_minmax == pytest.approx(by_hand(w_NK @ hadamard(64, "cpu")), rel=1e-3)
        assert 0 < found.bgr < found.minmax
        assert 0 < found.rotated_bgr < found.rotated_minmax


def test_weights_that_cannot_be_rotated_and_zeros_and_some_rows():
    torch.manual_seed(0)
    wide, inputs = torch.randn(600, 6), (torch.ones(2, 6), torch.ones(2, 6))
    found = made_findings({("odd",): inputs, ("zero",): inputs}, {"odd": wide, "zero": torch.zeros(3, 6)})
    (odd, zero), (whole, _) = weight_errors(found), weight_errors(found, rows=None)
    assert (odd.rotation, odd.rotated_minmax, odd.rotated_bgr) == (1, odd.minmax, odd.bgr)
    assert whole.minmax == pytest.approx(by_hand(wide), rel=1e-3)
    assert odd.minmax != whole.minmax
    assert odd.minmax == pytest.approx(whole.minmax, rel=0.2)
    assert (zero.minmax, zero.bgr) == (0, 0)


def test_the_page_holds_a_table_a_picture_and_the_advice(report, findings):
    text = render_page(report)
    page = Balance()
    page.feed(text)
    assert not page.open
    section = text[text.index('id="errors"') : text.index("</section>", text.index('id="errors"'))]
    assert "channel 7 carries 40x the median at timestep 900" in section
    assert "<b>3 of 4 sites</b>: even over tokens" in section
    assert section.count("<tr>") == 1 + 4
    # Two inputs in two ranges: 1 is the palest colour, 24.9 the darkest; the legend has one of each.
    assert section.count('class="heat0"') == 1 + 3
    assert section.count('class="heat7"') == 1 + 1
    assert section.count('class="track"') == 2 * 3  # not of "condition": there was one branch
    assert "blocks.1.k +2" in section
    assert set(re.findall(r"https?://[^\"' <]+", text)) == {"http://www.w3.org/2000/svg"}
    without = render_page(replace(report, errors=None))
    assert 'id="errors"' not in without


def test_names_are_escaped(report):
    evil = "<script>alert(1)</script>"
    (first, *rest) = report.errors.sites
    changed = replace(first, site=evil, group=(evil,), recommendation=evil)
    text = render_page(replace(report, errors=replace(report.errors, sites=(changed, *rest))))
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;") >= 5  # its row, its advice, its label, its tooltips


def test_the_text_has_ten_inputs_and_what_they_ask_for(findings):
    many = tuple(f"blocks.{index}.down" for index in range(12))
    inputs = {(site,): (torch.ones(2, 8), loud_channel(8, 1, 2.0 + i)) for i, site in enumerate(many)}
    found = error_report(made_findings(inputs, dict.fromkeys(many, torch.eye(8))), None)
    text = str(vq.ExplainReport(model="M", schemes=(), device="cpu", graphs=0, graph_runs=0, errors=found))
    assert "errors: the 10 most incoherent of 12 inputs" in text
    assert [site in text for site in many] == [False, False] + [True] * 10
    assert "Errors: 8 of 12 sites: " in text


def test_of_many_inputs_the_loudest_are_drawn_in_order(findings):
    sites = [f"blocks.{index}.down" for index in range(MOST_ROWS + 6)]
    inputs = {(site,): (torch.ones(2, 8), loud_channel(8, 1, 1.0 + i)) for i, site in enumerate(sites)}
    found = error_report(made_findings(inputs, dict.fromkeys(sites, torch.eye(8))), None)
    assert [entry.site for entry in chosen(found.inputs, sites)] == sites[6:]


def test_json_is_json_also_where_a_ratio_is_infinite(report):
    first, *rest = report.errors.sites
    silent = replace(
        report, errors=replace(report.errors, sites=(replace(first, timestep=float("inf")), *rest))
    )

    def refuse(name):
        raise AssertionError(name)

    data = json.loads(silent.to_json(), parse_constant=refuse)["errors"]
    assert data["sites"][0]["timestep"] == "inf"
    assert data["sites"][0]["advice"] == ["balance + rotate", "a dynamic or timestep-wise scale"]
    assert data["weights"][0]["minmax"] == report.errors.weights[0].minmax
    assert "timestep: inf" in render_page(silent)


def test_wrong_findings_are_told(findings):
    with pytest.raises(ViditqError, match=r"errors=dict: give the findings of viditq_fx\.collect"):
        vq.explain(tiny_dit(1), *tiny_inputs(), errors={})
    with pytest.raises(ViditqError, match=r"another model: Linear has no module 'blocks\.0\.down'"):
        vq.explain(nn.Linear(8, 8), torch.ones(2, 8), errors=findings)


def test_collected_before_its_weights_are_released():
    model, (x, t) = tiny_dit(1), tiny_inputs()
    found = vq.collect(model, [((x, t), {})], rows=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
        run = torch.compile(model, backend="viditq", options={"weights": "release"})
        report = vq.explain(run, x, t, errors=found)
        after = vq.explain(run, x, t, errors=found)
    assert {w.site for w in report.errors.weights} == {s.fqn for s in report.sites if s.done}
    assert not any("released" in note for note in report.notes)
    assert after.errors.weights == weight_errors(found) == ()
    assert any("weights of 6 sites, e.g. blocks.0." in note for note in after.notes)
    assert after.errors.sites[0].site in str(after)


def record(generation, step, bits, since_high):
    return StepRecord(
        generation=generation,
        step=step,
        timestep=1000.0 - step,
        bits=bits,
        change=None,
        since_high=since_high,
    )


def test_bits_over_steps_are_drawn_and_averaged(report):
    bits = ["high", "high", "low", "low"]
    sums = [0.0, 0.0, 0.04, float("inf")]
    records = [record(g, i, b, s) for g in range(2) for i, (b, s) in enumerate(zip(bits, sums, strict=True))]
    history = StepHistory(rule=SwitchRule(delta=0.05), low_bits=4, high_bits=8, records=tuple(records))
    assert history.average_bits == 6
    assert [len(steps) for steps in history.generations] == [4, 4]
    shown = replace(report, errors=None, steps=[history])
    assert "Steps: 6.00 bits of an input on average: 4 of 8 steps at 4, 4 at 8 (delta 0.05" in str(shown)
    text = render_page(shown)
    section = text[text.index('id="steps"') :]
    assert section.count('rect class="low"') == 4 + 1  # and the legend's
    assert section.count('circle class="low"') == 2  # of the latest generation
    assert "nan" not in section.split("</section>")[0]
    floor, top = 190.0, 1.12 * 0.05
    assert f" {floor - 150.0 * 0.05 / top:.1f} L" in section  # delta's line
    (data,) = json.loads(shown.to_json())["steps"]
    assert (data["average_bits"], data["rule"]["delta"]) == (6, 0.05)
    assert data["records"][3]["since_high"] == "inf"


def test_the_steps_of_a_model_that_switches_are_those_before_the_call():
    model, (x, _) = tiny_dit(1), tiny_inputs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
        run = torch.compile(model, backend="viditq", options={"scheme": "dvd-w4a6", "delta": 1e9})
        with torch.no_grad():
            for t in (900.0, 700.0, 500.0, 300.0):
                run(x, torch.full((2,), t))
            (history,) = vq.explain(run, x, torch.full((2,), 100.0)).steps
    assert (history.low_bits, history.high_bits) == (4, 8)
    assert [r.bits for r in history.records] == ["high", "high", "low", "low"]
    assert (history.rule.delta, history.average_bits) == (1e9, 6)
