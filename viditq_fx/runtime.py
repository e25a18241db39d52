"""What runs in place of a compiled graph: it swaps each full-precision weight for its packed form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from viditq_fx.errors import ReleasedWeightError
from viditq_fx.ops.packed_weights import is_released, joined_bias, packed_group, packed_weight
from viditq_fx.ops.release import find_owners, release, why_not_release
from viditq_fx.options import CompileOptions
from viditq_fx.report import CompileReport
from viditq_fx.scheme import WeightForm
from viditq_fx.site import fqn_of_source


@dataclass(frozen=True, kw_only=True)
class WeightArgument:
    """One packed weight of a graph: which argument it stands for, or which ones, joined."""

    indices: tuple[int, ...]
    """Positions of the full-precision weights among the arguments that Dynamo passes."""
    names: tuple[str, ...]
    """Where Dynamo got those weights from, for messages."""
    form: WeightForm
    frees_source: tuple[bool, ...]
    """For each weight: the graph itself reads it nowhere else."""

    def packed(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """The integers, scales and zero points that the graph takes, for a call with these arguments."""
        names = [fqn_of_source(name) for name in self.names]
        if len(self.indices) == 1:
            return packed_weight(args[self.indices[0]], self.form, names[0])
        return packed_group([args[index] for index in self.indices], self.form, names)


@dataclass(kw_only=True)
class Execution:
    """One call of one compiled graph, as seen by `executions`."""

    report: CompileReport
    weights: dict[str, Tensor]
    """Source name -> the parameter that this call was made with."""
    options: CompileOptions
    """What the graph was compiled with."""


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
        constants: Sequence[Tensor] = (),
        biases: Sequence[tuple[int, ...]] = (),
        full_weights: Sequence[tuple[int, str]],
        report: CompileReport,
        options: CompileOptions,
    ) -> None:
        self._compiled = compiled
        self._passed_through = tuple(passed_through)
        self._weights = tuple(weights)
        self._constants = tuple(constants)
        self._biases = tuple(biases)
        self._full_weights = tuple(full_weights)
        self._release = options.weights == "release"
        self._options = options
        self._refusals: dict[str, str] = {}
        self.report = report

    @property
    def passed_through(self) -> tuple[int, ...]:
        """Positions of the arguments that the graph takes as they are."""
        return self._passed_through

    @property
    def weight_positions(self) -> tuple[int, ...]:
        """Positions of the weights that packed ones stand for."""
        return tuple(index for slot in self._weights for index in slot.indices)

    def packed_forms(self) -> set[tuple[tuple[int, ...], WeightForm]]:
        """Which weights, joined or alone, the graph takes in which form."""
        return {(slot.indices, slot.form) for slot in self._weights}

    def pack(self, args: Sequence[Any]) -> None:
        """Pack what a call with these arguments needs, ahead of it."""
        for slot in self._weights:
            slot.packed(args)

    def keep_sources(self, positions: Collection[int]) -> None:
        """Never release these full-precision weights: another graph of the model reads them."""
        self._weights = tuple(
            replace(
                slot,
                frees_source=tuple(
                    frees and index not in positions
                    for index, frees in zip(slot.indices, slot.frees_source, strict=True)
                ),
            )
            for slot in self._weights
        )

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
        inputs.extend(self._constants)
        for slot in self._weights:
            inputs.extend(slot.packed(args))
        inputs.extend(joined_bias([args[index] for index in indices]) for indices in self._biases)
        collected = _EXECUTIONS.get()
        if collected is not None:
            weights = {
                name: args[i] for s in self._weights for i, name in zip(s.indices, s.names, strict=True)
            }
            weights |= {name: args[index] for index, name in self._full_weights}
            collected.append(Execution(report=self.report, weights=weights, options=self._options))
        result = self._compiled(*inputs)
        if self._release:
            self._release_sources(args)
        return result

    def _release_sources(self, args: Sequence[Any]) -> None:
        sources = [x for s in self._weights for x in zip(s.indices, s.names, s.frees_source, strict=True)]
        pending = [
            (args[index], name, frees)
            for index, name, frees in sources
            if name not in self._refusals and not is_released(args[index])
        ]
        owners = find_owners(weight for weight, _, _ in pending) if pending else {}
        for weight, name, frees in pending:
            reason = "the graph also reads it in full precision"
            if frees:
                reason = why_not_release(weight, owners[id(weight)])
            if reason is None:
                release(weight, owners[id(weight)])
                continue
            self._refusals[name] = reason
            for entry in self.report.sites:
                if entry.weight == name:
                    entry.reason = f"full-precision weight kept in memory: {reason}"


def wants_gradients(example_inputs: Sequence[Any]) -> bool:
    """Whether a graph compiled now has to be differentiable."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(value, Tensor) and value.requires_grad for value in example_inputs)
