"""A layer of `quantize_` says its scheme as it was asked for: in reports, when printed, in explain and when saved."""

import pytest
import torch

import viditq_fx as vq
from tests.small_models import tiny_dit, tiny_inputs
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.runtime import executions
from viditq_fx.scheme import QuantScheme

NAMES = ["w6a6", "w4a8-bgr", "w4a4-bgr-svd16", "dvd-w4a4"]
"""What no op of a graph tells from another scheme: stored as w8 is, a grid as another, and both at once."""


@pytest.fixture
def uncompiled(monkeypatch):
    """Passes, kernels and reports as they are; the graph that they leave runs as it stands."""
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)


@pytest.mark.parametrize("name", NAMES)
def test_reports_prints_and_explain_say_what_was_asked(name, uncompiled):
    model, inputs = tiny_dit(1), tiny_inputs()
    report = vq.quantize_(model, inputs, scheme=name)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {site.fqn: site.done for site in report.sites if site.done} == dict.fromkeys(layers, name)
    assert all(f"scheme={name}" in repr(layer) for layer in layers.values())
    with torch.no_grad(), executions() as ran:
        compiled = torch.compile(model, backend="viditq")
        compiled(*inputs)
    done = {site.fqn: (site.planned, site.done) for one in ran for site in one.report.sites if site.done}
    assert done == dict.fromkeys(layers, (name, name))
    assert {site.done for site in vq.explain(compiled, *inputs).sites if site.done} == {name}


def layer(name, seed=0):
    torch.manual_seed(seed)
    return QuantLinear.from_linear(torch.nn.Linear(128, 32), QuantScheme.parse(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_says_its_scheme_and_is_loaded_by_its_like_alone(name):
    state = layer(name).state_dict()
    assert bytes(state["scheme"].tolist()).decode() == name
    same = layer(name, seed=1)
    same.load_state_dict(state)
    assert torch.equal(same.weight_q, state["weight_q"])
    of_ops = {"w6a6": "w8a6", "w4a8-bgr": "w4a8-asym", "w4a4-bgr-svd16": "w4a4-asym-svd16"}
    other = layer(of_ops.get(name, "w4a4-asym-rot-block"), seed=1)
    before = other.weight_q.clone()
    with pytest.raises(RuntimeError, match=f"the saved weight is of {name}, this layer of {other.scheme}"):
        other.load_state_dict(state)
    assert torch.equal(other.weight_q, before)


def test_the_input_may_have_other_bits_than_the_saved_one_had():
    state = layer("w8a8").state_dict()
    other = layer("w8a7", seed=1)
    other.load_state_dict(state)
    assert torch.equal(other.weight_q, state["weight_q"])
    assert bytes(other.state_dict()["scheme"].tolist()) == b"w8a7"


def test_states_without_a_name_are_loaded_and_damaged_names_are_not():
    state = layer("w6a6").state_dict()
    state.pop("scheme")
    layer("w8a8").load_state_dict(state)
    for wrong, message in (
        (torch.tensor(list(b"w5a5"), dtype=torch.uint8), "scheme 'w5a5' is not available"),
        (torch.zeros(4), "a name in uint8 expected, got torch.float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer("w6a6").load_state_dict({**state, "scheme": wrong})
