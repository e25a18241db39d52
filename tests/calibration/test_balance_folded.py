"""A calibrated recipe's balance, compiled: folded wherever a norm makes what is balanced, to the same numbers."""

import pytest
import torch

import viditq_fx as vq
from tests.small_models import compiled, relative_error, tiny_dit, tiny_inputs
from viditq_fx.passes.fold_balance import FoldBalance
from viditq_fx.runtime import executions

LAYERS = 2
NORMS = ("q", "k", "v", "up")
"""What reads a norm: the first three one that adaLN modulates, the last a plain one."""


def recipe_of(model, scheme, rotation):
    steps = [((tiny_inputs(seed=seed)[0], torch.full((2,), 300.0 * seed)), {}) for seed in (1, 2, 3)]
    return vq.calibrate(model, steps, scheme=scheme, balance=0.5, rotation=rotation, random_signs=True)


def ran(model, inputs, dynamic=False, **options):
    """(output, report) of a compiled call."""
    torch._dynamo.reset()
    with torch.no_grad(), executions() as calls:
        result = compiled(model, options=options, fullgraph=True, dynamic=dynamic)(*inputs)
    return result, calls[0].report


def check(scheme, rotation, matches, monkeypatch, layers=LAYERS, dynamic=False):
    model, inputs = tiny_dit(layers), tiny_inputs()
    followed = recipe_of(model, scheme, rotation)
    got, report = ran(model, inputs, dynamic, recipe=followed, strict=True)
    with monkeypatch.context() as patch:
        patch.setattr(FoldBalance, "run", lambda self, gm, ctx: ())
        want, before = ran(model, inputs, dynamic, recipe=followed, strict=True)
    assert relative_error(got, want) < 10 ** (-45 / 20)
    with torch.no_grad():
        assert relative_error(got, model(*inputs)) < 0.15
    (trace,) = [step for step in report.passes if step.name == "fold_balance"]
    assert (trace.matches, trace.rejects) == (matches, 0)
    return report, before


@pytest.fixture
def without_inductor(monkeypatch):
    """Inductor's code is tested below: graphs, passes, kernels and reports are the real ones."""
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)


@pytest.mark.parametrize(
    ("scheme", "rotation", "groups"),
    [
        # A plain norm's product with m is taken into its quantize as it stands: adaLN's are folded.
        ("w8a8", "off", 1),
        ("w8a8", "on", 2),
        ("w4a8-static", "off", 2),
        ("w4a8-static", "on", 2),
    ],
)
@pytest.mark.usefixtures("without_inductor")
def test_every_group_that_a_norm_feeds_is_folded(scheme, rotation, groups, monkeypatch):
    report, before = check(scheme, rotation, groups * LAYERS, monkeypatch)
    if (scheme, rotation) == ("w8a8", "off"):
        for told, prologues in (
            (report, {"layer_norm+modulate"}),
            (before, {"layer_norm+modulate", None}),  # adaLN was not
        ):
            sites = [site for site in told.sites if site.fqn.rpartition(".")[2] in NORMS]
            assert {site.prologue for site in sites} == prologues
            assert all((site.prologue is None) == (site.unfused is not None) for site in sites)


@pytest.mark.slow
def test_so_it_is_in_what_inductor_makes(monkeypatch):
    check("w8a8", "on", 2, monkeypatch, layers=1)


@pytest.mark.usefixtures("without_inductor")
def test_sizes_that_differ_from_call_to_call_are_no_obstacle(monkeypatch):
    check("w8a8", "on", 2, monkeypatch, layers=1, dynamic=True)


@pytest.mark.usefixtures("without_inductor")
def test_explain_shows_it():
    model, inputs = tiny_dit(1), tiny_inputs()
    torch._dynamo.reset()
    options = {"recipe": recipe_of(model, "w8a8", "off")}
    told = vq.explain(compiled(model, options=options, fullgraph=True), *inputs)
    text = str(told)
    assert "fold_balance" in text
    assert "layer_norm+modulate" in text
    assert "layer_norm" not in "".join(line for line in text.splitlines() if "not fused" in line)
