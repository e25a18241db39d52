"""Set-up of the tests on whole models: no network, and a cheap inner compiler."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("diffusers")


@pytest.fixture
def eager_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Execute what the backend hands to Inductor as it is: for all that is not about generated code.

    The rest of backend="viditq" stays: passes, kernel choice, packed weights, reports.
    """
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
