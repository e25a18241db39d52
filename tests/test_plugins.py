"""Entry points: an installed package's passes run by themselves, and its mistakes leave models compiling."""

import sys

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from viditq_fx.errors import StrictError
from viditq_fx.passes.pipeline import default_passes
from viditq_fx.runtime import executions

NAMES = [step.name for step in default_passes()]
MODULE = """
from viditq_fx.passes.base import Pass
from viditq_fx.passes.pipeline import after

class Plain(Pass):
    name = "from_plugin"
    changes_numerics = False

    def run(self, gm, ctx):
        return ()

class Other(Plain):
    name = "other"

class Sour(Plain):
    name = "sour"

    def run(self, gm, ctx):
        raise ZeroDivisionError("sour")

def make():
    return after("insert_qdq", Plain())

def explode():
    raise OSError("no disk")

instance, anchored, number = Plain(), after("insert_qdq", Plain()), 3
lost = after("insert_qdc", Plain())
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install("a = module:thing", ...) makes a distribution with these entry points importable."""

    def write(*points):
        (tmp_path / "plugged_module.py").write_text(MODULE)
        info = tmp_path / "plugged-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[viditq_fx.passes]\n" + "\n".join(points) + "\n")

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "plugged_module", raising=False)
    return write


def compile_one(**options):
    """The report of a compiled linear."""
    model = nn.Linear(64, 64).requires_grad_(False)
    with executions() as ran:
        torch.compile(model, backend="viditq", options=options)(torch.randn(40, 64))
    return ran[0].report


def passes(report):
    return [trace.name for trace in report.passes]


@pytest.mark.parametrize("thing", ["make", "anchored"])
def test_a_plugin_runs_at_its_anchor(install, thing):
    install(f"a = plugged_module:{thing}")
    at = NAMES.index("insert_qdq") + 1
    report = compile_one()
    assert passes(report) == [*NAMES[:at], "from_plugin", *NAMES[at:]]
    assert report.rejects == []


@pytest.mark.parametrize("thing", ["Plain", "instance"])
def test_a_plugin_without_an_anchor(install, thing):
    install(f"a = plugged_module:{thing}")
    at = NAMES.index("place_weights")
    assert passes(compile_one()) == [*NAMES[:at], "from_plugin", *NAMES[at:]]


def test_plugins_can_be_turned_off(install):
    install("a = plugged_module:make", "b = plugged_module:explode")
    report = compile_one(plugins=False)
    assert passes(report) == NAMES
    assert report.rejects == []


WRONG = {
    "explode": "OSError: no disk",
    "missing": "AttributeError",
    "number": "an extra pass is an instance of",
    "lost": "did you mean 'insert_qdq'",
    "Sour": "extra pass 'sour' raised ZeroDivisionError: sour; compiled without it",
}


@pytest.mark.parametrize("thing", WRONG)
def test_a_wrong_plugin_is_left_out_with_a_reason(install, thing):
    install(f"wrong = plugged_module:{thing}", "right = plugged_module:Other")
    with pytest.warns(UserWarning, match="viditq: "):
        report = compile_one()
    (reason,) = report.rejects
    assert WRONG[thing] in reason
    assert thing == "Sour" or reason.startswith("plugin 'wrong' of plugged 1.0 was left out: ")
    assert "other" in passes(report)
    assert report.sites[0].done == "w8a8"


@pytest.mark.parametrize("thing", WRONG)
def test_strict_refuses_a_wrong_plugin(install, thing):
    install(f"wrong = plugged_module:{thing}")
    with pytest.raises(BackendCompilerFailed, match=r"'(wrong|sour)'") as caught:
        compile_one(strict=True)
    assert isinstance(caught.value.inner_exception, StrictError)


def test_a_users_pass_goes_before_a_plugin_of_the_same_name(install):
    install("a = plugged_module:Plain")
    import plugged_module

    with pytest.warns(UserWarning, match="has the name of another"):
        report = compile_one(extra_passes=[plugged_module.make()])
    assert passes(report).count("from_plugin") == 1
    assert "plugin 'a' of plugged 1.0 was left out" in report.rejects[0]
