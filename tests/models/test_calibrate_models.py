"""Calibration sees, at the sites of `quantize_`, what plain hooks see: convolutions and several sizes included."""

import pytest
import torch

pytest.importorskip("diffusers")

import viditq_fx as vq
from tests.calibration.test_calibrate import hooked
from tests.models.tiny_dits import TINY_DITS
from viditq_fx.calibration.run import collect


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sana", "pixart_sigma"])
def test_sites_and_ranges_are_those_of_the_model(name):
    dit = TINY_DITS[name]
    model = dit.build(layers=1)
    inputs = [dit.make_inputs(size=size, batch=1) for size in (2, 3)]

    def run():
        for kwargs in inputs:
            dit.run(model, kwargs)

    found, read = collect(model, run), hooked(model, run)
    sites = {site for group in found.groups for site in group.sites}
    for site in sites & read.keys():
        rows = torch.cat([x.flatten(0, -2) for x in read[site]])
        torch.testing.assert_close(found.group(site).whole().amax, rows.abs().amax(0))
    if name == "sana":
        assert {"transformer_blocks.0.ff.conv_inverted", "transformer_blocks.0.ff.conv_point"} <= sites
    swapped = vq.quantize_(model, (), inputs[0])
    assert sites == {site.fqn for site in swapped.sites if site.done}
