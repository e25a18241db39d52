"""Write a squared ReLU as a square, so that viditq_fx folds it into the quantization behind it.

As it stands, viditq_fx takes it for a gated ReLU, which reads x twice.

relu(x) * relu(x)  ->  square(relu(x))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from viditq_fx.graph_edit import call as insert_call
from viditq_fx.passes.base import PassContext
from viditq_fx.passes.pattern import Example, Expression, Found, Pattern, Rewrite, call
from viditq_fx.passes.pipeline import before


def relu_by_itself(x: Expression) -> Expression:
    return call("relu", x) * call("relu", x)


def called_twice(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.relu(x) * torch.relu(x), w)


def called_once(x: Tensor, w: Tensor) -> Tensor:
    h = F.relu(x)
    return F.linear(h * h, w)


def of_two_values(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.relu(x) * F.relu(x + 1), w)


def read_elsewhere(x: Tensor, w: Tensor) -> Tensor:
    h = F.relu(x)
    return F.linear(h * h, w) + h


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 20, 64, generator=generator), torch.randn(64, 64, generator=generator)


@dataclass(frozen=True, kw_only=True)
class NameSquaredRelu(Rewrite):
    """One ReLU and one square."""

    name: ClassVar[str] = "name_squared_relu"
    changes_numerics: ClassVar[bool] = False
    patterns: ClassVar[tuple[Pattern, ...]] = (Pattern.of(relu_by_itself),)
    examples: ClassVar[tuple[Example, ...]] = (
        Example(label="called twice", program=called_twice, inputs=inputs, matches=1),
        Example(label="called once", program=called_once, inputs=inputs, matches=1),
        Example(label="of two values", program=of_two_values, inputs=inputs, matches=0),
        Example(
            label="read elsewhere", program=read_elsewhere, inputs=inputs, matches=0, reason="also read by"
        ),
    )

    def accept(self, found: Found, ctx: PassContext) -> str | None:
        return None if isinstance(found.values["x"], fx.Node) else "the ReLU of a number"

    def replace(self, gm: fx.GraphModule, found: Found, ctx: PassContext) -> str:
        with gm.graph.inserting_before(found.root):
            relu = insert_call(gm.graph, F.relu, (found.values["x"],), found.root)
            square = insert_call(gm.graph, torch.square, (relu,), found.root)
        found.root.replace_all_uses_with(square)
        return "squared ReLU"


anchored = before("insert_qdq", NameSquaredRelu())
