"""What the tests of mixed precision share: one measured table, and a trace that is not made again."""

from dataclasses import replace

import pytest

from tests.calibration.film import measured
from viditq_fx.calibration import sensitivity, units
from viditq_fx.calibration.units import survey


@pytest.fixture(scope="session")
def table():
    return measured()


@pytest.fixture
def traced_once(monkeypatch):
    """Trace the model once for all measurements of a test: for those that fail afterwards."""
    known = []

    def again(model, draw, recipe, groups):
        known[:] = known or [survey(model, draw, recipe, {})[0]]
        return replace(known[0], units=units.in_groups(known[0].units, groups)), draw(model)

    monkeypatch.setattr(sensitivity, "survey", again)
