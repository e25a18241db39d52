"""A pair of compiled graphs with the same weights, of which each call runs one: see switching.py."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from viditq_fx.errors import ViditqError
from viditq_fx.report import CompileReport
from viditq_fx.switching import HIGH, LOW, BitSwitch, StepRecord, SwitchRule
from viditq_fx.timestep import timestep_name, timestep_value

_DECIDED: ContextVar[str | None] = ContextVar("viditq_bits", default=None)
"""The bits of the running call of a model that `switch_bits` follows."""
_GRAPHS: weakref.WeakSet[SwitchingGraph] = weakref.WeakSet()


class SwitchingGraph:
    """Called by Dynamo with a graph's own arguments; runs it at low or at high bits."""

    def __init__(
        self,
        *,
        low: Callable[..., Any],
        high: Callable[..., Any],
        rule: SwitchRule,
        timestep: int | None,
        weights: Sequence[int],
        report: CompileReport,
    ) -> None:
        self._runs = {LOW: low, HIGH: high}
        self.switch = BitSwitch(rule)
        self._timestep = timestep
        self._weights = tuple(weights)
        self.report = report
        self._seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        _GRAPHS.add(self)

    def __call__(self, *args: Any) -> Any:
        """Arguments and result are those of the graph that Dynamo captured."""
        for index in self._weights[:1]:
            self._seen[args[index]] = True
        decided = _DECIDED.get()
        if decided is not None or self._timestep is None:
            return self._runs[decided or HIGH](*args)
        timestep = args[self._timestep]
        shapes = tuple(
            tuple(a.shape) for a in args if isinstance(a, Tensor) and not isinstance(a, nn.Parameter)
        )
        bits, generation = self.switch.begin(timestep, shapes)
        result = self._runs[bits](*args)
        self.switch.end(generation, _tensors(result))
        return result

    def runs_weights_of(self, model: nn.Module) -> bool:
        """Whether it was called with a parameter of this model."""
        return any(parameter in self._seen for parameter in model.parameters())


def _tensors(result: Any) -> list[Tensor]:
    """The floating-point tensors of a call's result: a tensor, or tensors in tuples, dicts and dataclasses."""
    found: list[Tensor] = []
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            found += [leaf] if leaf.is_floating_point() else []
        elif is_dataclass(leaf):
            found += _tensors([getattr(leaf, field.name) for field in fields(leaf)])
    return found


class _Follower:
    """Decides for all graphs of a model, which one graph alone does not show, from hooks on its forward.

    A model that is copied or pickled takes its rule along, and none of the generations it was in.
    """

    def __init__(self, rule: SwitchRule, name: str) -> None:
        self.follow(rule, name)
        self._running: ContextVar[tuple[Any, Any] | None] = ContextVar("viditq_running", default=None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Follower, (self.switch.rule, self._name)

    def follow(self, rule: SwitchRule, name: str) -> None:
        """Begin anew, by a rule and the name of the timestep."""
        self.switch, self._name = BitSwitch(rule), name

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = timestep_value(model, self._name, args, kwargs)
        if timestep is None:
            raise ViditqError(
                f"{type(model).__name__} was called without {self._name!r}, which tells its steps apart"
            )
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        shapes = tuple(tuple(value.shape) for value in tensors)
        bits, generation = self.switch.begin(torch.as_tensor(timestep), shapes)
        self._running.set((_DECIDED.set(bits), generation))

    def after(self, result: Any) -> None:
        running = self._running.get()
        if running is None:  # `before` raised
            return
        token, generation = running
        self._running.set(None)
        _DECIDED.reset(token)
        if result is not None:
            self.switch.end(generation, _tensors(result))


class _Before:
    """Classes and no closures, so that models copy and pickle with their hooks."""

    def __init__(self, follower: _Follower) -> None:
        self.follower = follower

    @torch.compiler.disable  # it waits for the device and counts: no part of a graph
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.follower.before(model, args, kwargs)


class _After:
    def __init__(self, follower: _Follower) -> None:
        self.follower = follower

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        self.follower.after(result)


def _follower_of(model: nn.Module) -> _Follower | None:
    return next((h.follower for h in model._forward_pre_hooks.values() if isinstance(h, _Before)), None)


def switch_bits(
    model: nn.Module,
    *,
    delta: float = 0.09,
    high_first: int = 2,
    high_last: int = 0,
    steps: int | None = None,
    timestep: str | None = None,
) -> None:
    """Let a whole model decide its steps' bits, for one that is compiled to several graphs.

    A model in one graph needs none of this. Blocks that are compiled by themselves, and graphs that break (step caches
    of diffusers), show no timestep to the graph that would decide: here hooks on `model` do, for all of them. Compile
    with scheme "dvd-w4a6". Called again it replaces what it did before.

    Raises OptionError for wrong numbers, ViditqError for a model whose forward has no timestep.
    """
    rule = SwitchRule(delta=delta, high_first=high_first, high_last=high_last, steps=steps)
    model = getattr(model, "_orig_mod", model)
    name = timestep_name(model, timestep)
    if name is None:
        raise ViditqError(
            f"switch_bits: {type(model).__name__}.forward has no timestep; give its name in timestep="
        )
    known = _follower_of(model)
    if known is not None:
        known.follow(rule, name)
        return
    follower = _Follower(rule, name)
    before: Any = _Before(follower)  # what torch.compiler.disable makes of a method has no type of use
    after: Any = _After(follower)
    model.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    model.register_forward_hook(after, always_call=True)


def switches(model: nn.Module) -> list[BitSwitch]:
    """What decides the bits of a model's steps: its hooks of `switch_bits`, then one for each graph that ran."""
    model = getattr(model, "_orig_mod", model)
    followed = _follower_of(model)
    mine = [graph.switch for graph in _graphs(model)]
    return [*([followed.switch] if followed is not None else []), *mine]


def high_schemes(model: nn.Module) -> set[str]:
    """Names of the schemes that a model's graphs run in at high bits; nothing where none switches its bits."""
    return {graph.report.scheme for graph in _graphs(getattr(model, "_orig_mod", model))}


def _graphs(model: nn.Module) -> list[SwitchingGraph]:
    return [graph for graph in list(_GRAPHS) if graph.runs_weights_of(model)]


def reset(model: nn.Module) -> None:
    """Begin a new generation with the model's next call: for a sampler whose timesteps do not turn back."""
    for switch in switches(model):
        switch.reset()


def step_records(model: nn.Module) -> list[StepRecord]:
    """What every step of a model ran at, in order; [] for one that does not switch its bits."""
    return [record for switch in switches(model) for record in switch.records]


@contextmanager
def forced_bits(bits: str) -> Iterator[None]:
    """Run every switching graph inside at "low" or "high" bits; for warm-up and measurements."""
    if bits not in (LOW, HIGH):
        raise ViditqError(f"forced_bits: {LOW!r} or {HIGH!r}, not {bits!r}")
    token = _DECIDED.set(bits)
    try:
        yield
    finally:
        _DECIDED.reset(token)
