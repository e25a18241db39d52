"""Which argument of a model's forward is the timestep, and its range for layers that no graph shows it to.

A compiled whole model reads the range from its own argument, in the graph (passes/site_plan.py). Blocks that are
compiled by themselves, and layers that run eagerly, never see the argument: `clock_for` puts a hook on the top-level
module that writes the range's number where they read it. Nothing waits for the device.
"""

from __future__ import annotations

import inspect
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from viditq_fx.errors import RecipeError

TIMESTEP_NAMES = ("timestep", "timesteps", "t")
"""What diffusers' models call it, most common first."""
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class _Call:
    """What one thread's running call of the model is at."""

    def __init__(self) -> None:
        self.bucket: Tensor | None = None


class _PerThread(threading.local):
    """A `_Call` for every thread. Dynamo reads through a thread's own attributes, and writes to what they hold."""

    def __init__(self) -> None:
        self.call = _Call()


class Clock:
    """The number of the timestep's range in the model's current call: read by every layer with static ranges.

    Threads that sample with one model at once have a number each.
    """

    def __init__(self, edges: Sequence[float], device: torch.device) -> None:
        self.values = tuple(edges)
        self.edges = self._on(device)
        self._now = _PerThread()

    def _on(self, device: torch.device) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float32, device=device)

    def read(self, device: torch.device) -> Tensor:
        """int64 [1] on `device`. Raises RecipeError before this thread's first call of the clock's model."""
        call = self._now.call
        if call.bucket is None:
            raise RecipeError(
                "a layer with input ranges by timestep ran outside its model: call the whole model that "
                "quantize_ was given, in the thread that runs its layers: its timestep argument chooses the range"
            )
        if call.bucket.device != device:  # kept: later layers are there too, unless a model lies on several
            call.bucket = _moved(call.bucket, device)
        return call.bucket

    def set(self, timestep: Any) -> None:
        """Note a call's timestep, a number or a tensor of any shape on any device: its largest value counts."""
        if not isinstance(timestep, Tensor):
            timestep = torch.as_tensor(timestep, device=self.edges.device)
        edges = self.edges
        if (
            edges.device != timestep.device
        ):  # these go where it is: to bring it here could wait for the device
            edges = _moved(edges, timestep.device)
        self._now.call.bucket = bucket_of(timestep, edges)

    def follow(self, device: torch.device) -> None:
        """Keep the edges where the layers are now; not on meta, where a timestep is only to pass by."""
        if device.type != "meta" and device != self.edges.device:
            self.edges = self._on(device)

    def why_other(self, told: Tensor | None) -> str | None:
        """Why edges that were saved beside a layer's scales are not these; None if they are, or none were saved."""
        if told is None or (
            told.device.type != "meta" and told.tolist() == self._on(torch.device("cpu")).tolist()
        ):
            return None
        theirs = "no values" if told.device.type == "meta" else told.tolist()
        return (
            f"input_edges: the saved scales are for ranges of the timestep between {theirs}, this model's are between "
            f"{list(self.values)}; quantize it by the recipe that was saved"
        )

    def saved(self) -> Tensor:
        """The edges as a state dict holds them, fp32 [T - 1]: a tensor of its own for each layer."""
        return self._on(torch.device("cpu"))

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self.values, "device": self.edges.device}  # calls that run are no part of a copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["values"], state["device"])


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """A few numbers on another device; nothing waits unless they come from one that is not the CPU."""
    return value.to(device, non_blocking=value.device.type == "cpu")


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
    """The argument of the model's forward that holds the timestep; None where it has none.

    Raises RecipeError where `given` is no parameter of it, and it takes no others by name (**kwargs) either.
    """
    known = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    if given is not None and given not in known and not takes_any:
        raise RecipeError(
            f"timestep={given!r} is no argument of {type(model).__name__}.forward; it takes {', '.join(known)}"
        )
    return given or next((name for name in TIMESTEP_NAMES if name in known), None)


def timestep_value(model: nn.Module, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call of the model was given as its timestep, by position or by name; None where it was left out."""
    if name in kwargs:
        return kwargs[name]
    positions = [
        p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in _POSITIONAL
    ]
    position = positions.index(name) if name in positions else len(args)
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
