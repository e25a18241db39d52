"""Let these tests import `nogpu`, which stands beside their folder, and leave out what this machine has timed."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(autouse=True)
def _no_timings_of_this_machine(monkeypatch, tmp_path):
    from viditq_fx.lowering import tuned_configs

    monkeypatch.setattr(tuned_configs, "cache_folder", lambda: tmp_path / "cache")
