"""What an author of a rewrite is told when an example does not hold."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional as F

from viditq_fx.graph_edit import call
from viditq_fx.passes.pattern import Example, Pattern, Rewrite
from viditq_fx.passes.pattern import call as op
from viditq_fx.passes.pipeline import after, before
from viditq_fx.site import Site
from viditq_fx.testing import check_rewrite

DOUBLED = Example(
    label="relu twice",
    program=lambda x, w: F.linear(torch.relu(torch.relu(x)).sin(), w),
    inputs=lambda: (torch.randn(2, 20, 64), torch.randn(64, 64)),
    matches=1,
)


def relu_twice(x):
    return op("relu", op("relu", x))


@dataclass(frozen=True, kw_only=True)
class OneRelu(Rewrite):
    """relu(relu(x)) -> relu(x)"""

    name: ClassVar[str] = "one_relu"
    changes_numerics: ClassVar[bool] = False
    patterns: ClassVar[tuple[Pattern, ...]] = (Pattern.of(relu_twice),)
    examples: ClassVar[tuple[Example, ...]] = (DOUBLED,)
    target: ClassVar[Any] = torch.relu

    def roots(self, gm, ctx):
        yield from (n for n in gm.graph.nodes if n.target is torch.relu)

    def accept(self, found, ctx):
        return None

    def replace(self, gm, found, ctx):
        with gm.graph.inserting_before(found.root):
            node = call(gm.graph, self.target, (found.values["x"],), found.root)
        found.root.replace_all_uses_with(node)
        return "one relu"

    def site(self, root):
        return Site("")


def variant(**members):
    return type("Variant", (OneRelu,), members)()


def example(**changes):
    return (Example(**{**vars(DOUBLED), **changes}),)


def test_a_rewrite_that_holds():
    check_rewrite(OneRelu())
    check_rewrite(before("insert_qdq", OneRelu()))
    for _ in range(12):  # Dynamo gives up on code that it has compiled eight times
        check_rewrite(after("normalize", OneRelu()))


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        (variant(examples=()), "one_relu has no examples"),
        (variant(examples=example(matches=0)), "no example of one_relu matches"),
        (
            variant(examples=example(matches=2)),
            "one_relu: relu twice: 1 matches, the example says 2; rejects:",
        ),
        (variant(examples=example(reason="too hot")), "no reject says 'too hot'"),
        (variant(target=torch.sigmoid), "the result is off by"),
        (
            variant(accept=lambda self, found, ctx: "never"),
            r"0 matches.*rejects: \['never'\]; the graph was \[",
        ),
    ],
)
def test_a_rewrite_that_does_not_hold(rewrite, message):
    with pytest.raises(AssertionError, match=message):
        check_rewrite(rewrite)


def test_a_rewrite_that_never_ends():
    def replace(self, gm, found, ctx):
        with gm.graph.inserting_before(found.root):
            first = call(gm.graph, torch.relu, (found.values["x"],), found.root)
            second = call(gm.graph, torch.relu, (first,), found.root)
        found.root.replace_all_uses_with(second)
        return "the same again"

    with pytest.raises(AssertionError, match="a second run matches again"):
        check_rewrite(variant(replace=replace))
