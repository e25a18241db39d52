"""The error analysis names what was put in."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from viditq_fx.calibration.analysis import analyse
from viditq_fx.calibration.run import collect


class Varied(nn.Module):
    """The input of `body` is +-1, but for what is asked: a loud channel, token, timestep or branch."""

    def __init__(self, loud):
        super().__init__()
        self.loud = loud
        self.stem, self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x, timestep):
        h = self.stem(F.scaled_dot_product_attention(x, x, x))
        h = torch.where(h > 0, 1.0, -1.0) * self.loud(timestep)
        return self.head(F.gelu(self.body(h)))


def entry(loud, **asked):
    torch.manual_seed(0)
    model, x = Varied(loud).eval(), torch.randn(2, 40, 64)
    found = collect(model, [((x, torch.tensor([t, t])), {}) for t in (900.0, 10.0)], **asked)
    return next(e for e in analyse(found) if e.site == "body")


def channel(gain):
    """[1, 1, 64], ones but for channel 7."""
    return torch.where(torch.arange(64) == 7, gain, 1.0)


def test_an_even_input_has_nothing_to_name():
    even = entry(lambda t: torch.ones(()))
    numbers = (even.token, even.timestep, even.channel, even.incoherence)
    assert numbers == pytest.approx((1, 1, 1, 1), rel=0.1)
    assert even.drift == pytest.approx(0)
    assert even.condition is None
    assert "min-max does" in even.recommendation


def test_a_loud_channel_at_one_end_of_the_timesteps():
    found = entry(lambda t: channel(torch.where(t.max() > 500, 40.0, 1.0)))
    assert (found.worst_channel, found.worst_range) == (7, (900.0, 900.0))
    assert found.channel == pytest.approx(40 / ((63 + 40) / 64))
    assert found.timestep == pytest.approx(40)
    assert found.drift == pytest.approx(0.5 * (40 / 103 - 1 / 64) / 2 + 63 * (1 / 64 - 1 / 103) / 4)
    rows = 80 * 64
    assert found.incoherence == pytest.approx(40 * (2 * rows) ** 0.5 / (rows + 80 * (63 + 1600)) ** 0.5)
    assert found.recommendation.startswith("channel 7 carries 40x the median at timestep 900")
    assert "balance + rotate" in found.recommendation
    assert [r[:2] for r in found.by_range] == [(10.0, 10.0), (900.0, 900.0)]


def test_a_loud_token_and_a_loud_branch():
    token = entry(lambda t: torch.where(torch.arange(40)[None, :, None] == 3, 20.0, 1.0))
    assert token.token == pytest.approx(20, rel=0.1)
    assert "a scale for each token" in token.recommendation
    branch = entry(lambda t: torch.tensor([1.0, 2.0])[:, None, None], branches=2)
    assert branch.condition == pytest.approx(2)
    assert "the branches' ranges differ 2x" in branch.recommendation
