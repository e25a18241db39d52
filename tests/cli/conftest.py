"""Set-up of the tests of the command line: a call of it, and a folder with models to name."""

import sys

import pytest
import torch

pytest.importorskip("typer")

from typer.testing import CliRunner

from viditq_fx.cli.app import app

TARGETS = """
import torch
from torch import nn

class Wrong:
    pass

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(torch.nn.functional.layer_norm(x, (64,)))))

def three():
    return nn.Sequential(nn.Linear(8, 64), Block(), nn.Linear(64, 8)), (torch.ones(40, 8),), {}

def samples():
    model, args, kwargs = three()
    return model, [(args, kwargs)] * 3

def two():
    return Block(), {"x": torch.ones(40, 64)}

def one():
    return Block()

def uncallable():
    return Wrong(), {}

class Attends(nn.Module):
    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

def attends():
    return Attends(), {"x": torch.ones(2, 4, 40, 32)}

def swapped():
    return Block(), {"x": 1}, ()

number = 3
"""


@pytest.fixture
def run(monkeypatch):
    """Run the command line; returns (exit code, stdout, stderr)."""

    def invoke(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, result.stdout, result.stderr

    return invoke


@pytest.fixture
def targets(tmp_path, monkeypatch):
    """A folder with a module of targets, made the current one."""
    (tmp_path / "viditq_targets.py").write_text(TARGETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("viditq_targets", None)


@pytest.fixture
def eager_inductor(monkeypatch):
    """Run what would go to Inductor as it is: it is about files, not about generated code."""
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
