"""Ops without an entry in `spelling` are kinds by their own name; those with one keep to it."""

import pytest
import torch
from torch.nn import functional as F

from tests.small_models import capture
from viditq_fx.passes.pattern import Pattern, call, find, number


def power(x):
    return call("pow", x, number("n"))


def squared(x):
    return call("square", x)


def softplus(x):
    return call("softplus", x)


def total(x, y):
    return x + y


def ratio(x, y):
    return x / y


def difference(x, y):
    return x - y


@pytest.mark.parametrize(
    ("pattern", "program", "matches"),
    [
        (power, lambda x: torch.pow(x, 3.0), True),
        (power, lambda x: x**3, True),
        (power, lambda x: x.pow(exponent=3), True),
        (power, lambda x: x**2, False),
        (squared, lambda x: x.pow(2), True),
        (softplus, lambda x: F.softplus(x), True),
        (softplus, lambda x: F.softplus(x, 2), False),
        (ratio, lambda x: x / 3, True),
        (ratio, lambda x: x.div(x), True),
        (ratio, lambda x: torch.div(x, x, rounding_mode="floor"), False),
        (difference, lambda x: torch.sub(x, x), True),
        (total, lambda x: torch.add(x, x), True),
        (total, lambda x: torch.add(x, x, alpha=2), False),
        (total, lambda x: x.clone().add_(x), False),
    ],
)
def test_kinds(pattern, program, matches):
    gm = capture(program, torch.randn(2, 4))
    (root,) = gm.graph.output_node().all_input_nodes
    assert (find(Pattern.of(pattern), root) is not None) == matches
