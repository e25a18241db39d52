"""Bring Dynamo's graph to the form that later passes match.

dropout(x, p, training=False) -> x        F.dropout(x, 0) -> x
linear(input=x, weight=w, bias=b) -> linear(x, w, b), and conv1d, conv2d and conv3d alike
dead pure nodes -> nothing
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from viditq_fx.passes.base import Match, Pass, PassContext, Reject
from viditq_fx.passes.convolution import CONVOLUTIONS
from viditq_fx.passes.effects import is_removable, op_name

_OPERANDS = ("input", "weight", "bias")
_DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout"})


@dataclass(frozen=True, kw_only=True)
class Normalize(Pass):
    """Remove what does nothing and give each linear one spelling; values do not change."""

    name: ClassVar[str] = "normalize"
    changes_numerics: ClassVar[bool] = False

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> tuple[Match | Reject, ...]:
        for node in list(gm.graph.nodes):
            if _is_idle_dropout(node):
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
            elif node.op == "call_function" and (
                node.target is torch.nn.functional.linear or op_name(node) in CONVOLUTIONS
            ):
                _positional(node)
        gm.graph.eliminate_dead_code(is_impure_node=lambda node: not is_removable(node))
        return ()


def _positional(node: fx.Node) -> None:
    named = [key for key in _OPERANDS[len(node.args) :] if key in node.kwargs]
    if named:
        missing = [node.kwargs.get(key) for key in _OPERANDS[len(node.args) :]]
        rest = {key: value for key, value in node.kwargs.items() if key not in _OPERANDS}
        node.args, node.kwargs = (*node.args, *missing), rest


def _is_idle_dropout(node: fx.Node) -> bool:
    if node.op != "call_function" or op_name(node) not in _DROPOUTS:
        return False
    bound = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | dict(node.kwargs)
    idle = bound.get("training", True) is False or bound.get("p", 0.5) == 0
    return bool(idle) and bool(node.args) and isinstance(node.args[0], fx.Node)
