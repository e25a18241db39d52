"""Which argument of a model's forward is the timestep, and its range for layers that no graph shows it to.

A compiled whole model reads the range from its own argument, in the graph (passes/site_plan.py). Blocks that are
compiled by themselves, and layers that run eagerly, never see the argument: `clock_for` puts a hook on the top-level
module that writes the range's number where they read it. Nothing waits for the device.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from viditq_fx.errors import RecipeError

TIMESTEP_NAMES = ("timestep", "timesteps", "t")
"""What diffusers' models call it, most common first."""


class Clock:
    """The number of the timestep's range in the model's current call: read by every layer with static ranges."""

    def __init__(self, edges: Sequence[float], device: torch.device) -> None:
        self.edges = torch.tensor(tuple(edges), dtype=torch.float32, device=device)
        self.bucket: Tensor | None = None

    def read(self) -> Tensor:
        """int64 [1]. Raises RecipeError before the first call of the model that the clock belongs to."""
        if self.bucket is None:
            raise RecipeError(
                "a layer with input ranges by timestep ran outside its model: call the whole model that "
                "quantize_ was given, whose timestep argument chooses the range"
            )
        return self.bucket

    def set(self, timestep: Any) -> None:
        """Note a call's timestep, a number or a tensor of any shape: its largest value counts."""
        value = torch.as_tensor(timestep, device=self.edges.device)
        self.bucket = bucket_of(value, self.edges)


def bucket_of(timestep: Tensor, edges: Tensor) -> Tensor:
    """The range that a call's timestep lies in, int64 [1]: how many of `edges` [T - 1] are at or below its largest."""
    return torch.bucketize(timestep.amax().to(torch.float32), edges, right=True).reshape(1)


def range_on_host(timestep: Tensor, edges: Sequence[float]) -> int:
    """What `bucket_of` finds, as a number of Python's: waits for the device where the timestep is on one."""
    return bisect_right(edges, float(timestep.detach().amax().to(torch.float32)))


def as_fp32(edges: Sequence[float]) -> tuple[float, ...]:
    """Edges as they are compared on a device."""
    return tuple(torch.tensor(tuple(edges), dtype=torch.float32).tolist())


def range_names(edges: Sequence[float]) -> list[str]:
    """The ranges between edges in words, e.g. "t < 250", "250 <= t < 500", "500 <= t"."""
    ends = [f"{edge:.4g}" for edge in edges]
    lows, highs = ["", *(f"{end} <= " for end in ends)], [*(f" < {end}" for end in ends), ""]
    return [f"{low}t{high}" for low, high in zip(lows, highs, strict=True)]


def timestep_name(model: nn.Module, given: str | None = None) -> str | None:
    """The parameter of the model's forward that holds the timestep; None where it has none.

    Raises RecipeError where `given` is no parameter of it.
    """
    names = inspect.signature(model.forward).parameters
    if given is not None and given not in names:
        raise RecipeError(f"timestep={given!r}: {type(model).__name__}.forward takes {', '.join(names)}")
    return given or next((name for name in TIMESTEP_NAMES if name in names), None)


def timestep_value(model: nn.Module, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call of the model was given as its timestep; None where it was left out."""
    if name in kwargs:
        return kwargs[name]
    position = list(inspect.signature(model.forward).parameters).index(name)
    return args[position] if position < len(args) else None


class ClockHook:
    """The forward pre-hook that sets a clock; a class and no closure, so that models copy and pickle with it."""

    def __init__(self, clock: Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = timestep_value(model, self.name, args, kwargs)
        if value is None:
            raise RecipeError(
                f"{type(model).__name__} was called without its {self.name!r}, which chooses the input ranges"
            )
        self.clock.set(value)


def clock_for(model: nn.Module, edges: Sequence[float], name: str | None) -> Clock:
    """A clock that every call of `model` sets. Raises RecipeError for a model without a timestep."""
    found = timestep_name(model, name)
    if found is None:
        raise RecipeError(
            f"{type(model).__name__}.forward has no argument named {', '.join(TIMESTEP_NAMES)}: a scheme with input "
            "ranges by timestep needs one; name it in calibrate(..., timestep=...) or choose another scheme"
        )
    first = next(model.parameters(), None)
    clock = Clock(edges, torch.device("cpu") if first is None else first.device)
    model.register_forward_pre_hook(ClockHook(clock, found), with_kwargs=True)
    return clock
