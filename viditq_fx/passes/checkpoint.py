"""What a pass from outside may be undone to, and what it must leave as it found it."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

from torch import fx

from viditq_fx.errors import VerifyError
from viditq_fx.graph_edit import copy_graph_module, example
from viditq_fx.passes.base import PassContext
from viditq_fx.passes.place_weights import SLOT_KEY


class Checkpoint:
    """A graph and its context as they are now."""

    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self._gm, self._ctx = gm, ctx
        self._graph = copy_graph_module(gm).graph
        self._collections = [(held, copy.copy(held)) for held in _collections(ctx)]
        self._entries = [(entry, dict(vars(entry))) for entry in ctx.sites.values()]
        self._inputs, self._outputs = _inputs(gm), _outputs(gm)

    def restore(self) -> None:
        """Undo everything since: the graph becomes the copy, with nodes of the same names."""
        self._gm.graph = self._graph
        for held, saved in self._collections:
            held.clear()
            held.update(saved) if isinstance(held, dict) else held.extend(saved)
        for entry, saved in self._entries:
            vars(entry).update(saved)

    def check_interface(self, name: str) -> None:
        """Raise VerifyError if pass `name` added an input, or changed the kind of an output."""
        added = _inputs(self._gm) - self._inputs
        if added:
            raise VerifyError(
                f"after pass {name!r}: placeholders {sorted(added)} are new: nothing would be passed for them"
            )
        outputs = _outputs(self._gm)
        if len(outputs) != len(self._outputs):
            raise VerifyError(
                f"after pass {name!r}: the graph returns {len(outputs)} values, not {len(self._outputs)}"
            )
        for (node, got), (_, want) in zip(outputs, self._outputs, strict=True):
            if None not in (got, want) and got != want:
                raise VerifyError(f"after pass {name!r}: output {node} became {got}, it was {want}")


def _collections(ctx: PassContext) -> list[Any]:
    values = [getattr(owner, f.name) for owner in (ctx, ctx.report) for f in fields(owner)]
    return [value for value in values if isinstance(value, list | dict)]


def _inputs(gm: fx.GraphModule) -> set[str]:
    return {n.name for n in gm.graph.nodes if n.op == "placeholder" and SLOT_KEY not in n.meta}


def _outputs(gm: fx.GraphModule) -> list[tuple[str, str | None]]:
    """(name, dtype and shape) of each value that the graph returns."""
    found, returned = [], []
    fx.map_arg(gm.graph.output_node().args, returned.append)
    for node in returned:
        value = example(node)
        known = hasattr(value, "dtype") and hasattr(value, "shape")
        found.append((node.name, f"{value.dtype} {list(value.shape)}" if known else None))
    return found
