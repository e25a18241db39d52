"""What runs in place of a compiled graph: it swaps each full-precision weight for its packed form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from viditq_fx.errors import ReleasedWeightError
from viditq_fx.ops.packed_weights import is_released, packed_weight
from viditq_fx.ops.release import find_owners, release, why_not_release
from viditq_fx.report import CompileReport
from viditq_fx.site import fqn_of_source


@dataclass(frozen=True, kw_only=True)
class WeightArgument:
    """One packed weight of a graph: which argument it stands for."""

    index: int
    """Position of the full-precision weight among the arguments that Dynamo passes."""
    name: str
    """Where Dynamo got that weight from, for messages."""
    bits: int
    frees_source: bool
    """The graph itself reads the weight nowhere else."""


@dataclass(kw_only=True)
class Execution:
    """One call of one compiled graph, as seen by `executions`."""

    report: CompileReport
    weights: dict[str, Tensor]
    """Source name -> the parameter that this call was made with."""


_EXECUTIONS: ContextVar[list[Execution] | None] = ContextVar("viditq_executions", default=None)


@contextmanager
def executions() -> Iterator[list[Execution]]:
    """Collect every viditq graph that runs inside the block, in order."""
    token = _EXECUTIONS.set([])
    try:
        collected = _EXECUTIONS.get()
        assert collected is not None
        yield collected
    finally:
        _EXECUTIONS.reset(token)


class CompiledGraph:
    """Calls Inductor's code with packed weights; called by Dynamo with the graph's own arguments."""

    def __init__(
        self,
        *,
        compiled: Callable[..., Any],
        passed_through: Sequence[int],
        weights: Sequence[WeightArgument],
        full_weights: Sequence[tuple[int, str]],
        report: CompileReport,
        release_weights: bool,
    ) -> None:
        self._compiled = compiled
        self._passed_through = tuple(passed_through)
        self._weights = tuple(weights)
        self._full_weights = tuple(full_weights)
        self._release = release_weights
        self._refusals: dict[str, str] = {}
        self.report = report

    def __call__(self, *args: Any) -> Any:
        """Arguments and result are those of the graph that Dynamo captured."""
        for index, name in self._full_weights:
            if is_released(args[index]):
                raise ReleasedWeightError(
                    f"{fqn_of_source(name)} runs in full precision in this graph, but another graph, in which it is "
                    "quantized, released its memory (weights='release'); use weights='keep' for inputs of such "
                    "different sizes"
                )
        inputs = [args[index] for index in self._passed_through]
        for slot in self._weights:
            inputs.extend(packed_weight(args[slot.index], slot.bits, fqn_of_source(slot.name)))
        collected = _EXECUTIONS.get()
        if collected is not None:
            weights = {slot.name: args[slot.index] for slot in self._weights}
            weights |= {name: args[index] for index, name in self._full_weights}
            collected.append(Execution(report=self.report, weights=weights))
        result = self._compiled(*inputs)
        if self._release:
            self._release_sources(args)
        return result

    def _release_sources(self, args: Sequence[Any]) -> None:
        pending = [
            s for s in self._weights if s.name not in self._refusals and not is_released(args[s.index])
        ]
        owners = find_owners(args[slot.index] for slot in pending) if pending else {}
        for slot in pending:
            weight = args[slot.index]
            reason = "the graph also reads it in full precision"
            if slot.frees_source:
                reason = why_not_release(weight, owners[id(weight)])
            if reason is None:
                release(weight, owners[id(weight)])
                continue
            self._refusals[slot.name] = reason
            for entry in self.report.sites:
                if entry.weight == slot.name:
                    entry.reason = f"full-precision weight kept in memory: {reason}"


def wants_gradients(example_inputs: Sequence[Any]) -> bool:
    """Whether a graph compiled now has to be differentiable."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(value, Tensor) and value.requires_grad for value in example_inputs)
