"""A small video transformer to measure mixed precision on, and tables of losses made by hand."""

import torch
from torch import nn
from torch.nn import functional as F

import viditq_fx as vq
from viditq_fx.calibration.sensitivity import relative_square
from viditq_fx.calibration.units import Unit
from viditq_fx.quality import Judge

WIDTH = 32
RECIPE = vq.Recipe(scheme=vq.QuantScheme.parse("w8a8"))


class Attention(nn.Module):
    """Multi-head attention of x [B, S, C] to y [B, L, C]."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, y):
        q, k, v = (f(t)[:, None] for f, t in ((self.q, x), (self.k, y), (self.v, y)))
        return self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])


class Film(nn.Module):
    """x [B, F, S, 8], text [B, L, C]: attention over places, to text and over frames, then a feed-forward."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(8, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8)
        self.a, self.b, self.c = (Attention() for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, text):
        x, frames = self.stem(x).flatten(0, 1), x.shape[1]
        h = self.norm(x)
        x = x + self.a(h, h)
        x = x + self.b(self.norm(x), text.repeat_interleave(frames, 0))
        x = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)
        h = self.norm(x)
        x = x + self.c(h, h)
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


SENSITIVE = "a.out"
FRAMES = {"temporal": "c.*"}


def film():
    torch.manual_seed(0)
    model = Film().eval().requires_grad_(False)
    with torch.no_grad():  # one channel so large that 4 bits leave nothing of the others
        model.a.out.weight[:, 0] *= 30.0
    return model


def run(model):
    return model(torch.randn(1, 4, 20, 8), torch.randn(1, 18, WIDTH))


def largest(reference, test):
    return float((reference - test).abs().max())


JUDGE = Judge(
    visual=relative_square, alignment=largest, temporal=lambda r, t: float((r - t).diff(dim=1).abs().mean())
)


def measured(model=None, draw=run, recipe=RECIPE, **asked):
    asked = {"metrics": JUDGE, "groups": FRAMES} | asked
    return vq.measure_sensitivity(film() if model is None else model, draw, recipe, **asked)


def made(losses, weights, schemes=("w4a8", "w8a8"), groups=None):
    """A table of units with these losses [unit][scheme] and numbers of weights."""
    groups = groups or ["visual"] * len(losses)
    units = tuple(
        Unit(sites=(f"{i:02}",), shapes=((n, 1),), group=g)
        for i, (n, g) in enumerate(zip(weights, groups, strict=True))
    )
    return vq.SensitivityTable(
        schemes=schemes,
        metrics=("visual",),
        units=units,
        losses={
            unit.name: {s: {unit.group: loss} for s, loss in zip(schemes, row, strict=True)}
            for unit, row in zip(units, losses, strict=True)
        },
        errors=dict.fromkeys(groups, 0.5),
    )
