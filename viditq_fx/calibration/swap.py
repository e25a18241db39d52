"""Units of a model in integers for a while: in every call, or in those of one range of the timestep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from viditq_fx.calibration.timesteps import Bucket, Buckets, TimestepArgument, range_of
from viditq_fx.calibration.units import Survey, plan_at
from viditq_fx.errors import RecipeError
from viditq_fx.layer_plan import Packed
from viditq_fx.quant_conv import quantized_layer
from viditq_fx.recipe import Recipe
from viditq_fx.scheme import QuantScheme


@dataclass(frozen=True, kw_only=True)
class StepRanges:
    """Ranges of the timestep with about as many of the timesteps of a run in each."""

    edges: tuple[float, ...]
    """R - 1 rising timesteps between R ranges."""
    calls: tuple[int, ...]
    """How many calls of the run lie in each."""

    @classmethod
    def of(cls, timesteps: Sequence[float | None], count: int, model: nn.Module) -> StepRanges:
        """Part the timesteps of a run's calls. Raises RecipeError where calls have none, or too few are distinct."""
        known = [value for value in timesteps if value is not None]
        if len(known) < len(timesteps):
            raise RecipeError(
                f"measure_sensitivity: ranges={count}, and {len(timesteps) - len(known)} of {len(timesteps)} calls of "
                f"this {type(model).__name__} have no timestep: the recipe names the argument that has it "
                "(dataclasses.replace(recipe, timestep=...)); a model without one can only be measured with ranges=1"
            )
        steps = sorted(set(known))
        if len(steps) < count:
            raise RecipeError(
                f"measure_sensitivity: ranges={count}, but run called the model at {len(steps)} different timesteps; "
                "let it draw with as many steps as will be used, or ask for fewer ranges"
            )
        cuts = [index * len(steps) // count for index in range(count + 1)]
        parts = [Bucket(steps[first], steps[last - 1]) for first, last in pairwise(cuts)]
        edges = Buckets(limit=count, items=parts).edges()
        places = [range_of(edges, value) for value in known]
        return cls(edges=edges, calls=tuple(places.count(place) for place in range(count)))


@dataclass(frozen=True, kw_only=True)
class InRange:
    """The calls of one range."""

    argument: TimestepArgument
    edges: tuple[float, ...]
    index: int


class Swap:
    """Units of a model in integers for as long as a `with` block lasts; the layers themselves come back after it."""

    def __init__(
        self,
        model: nn.Module,
        found: Survey,
        recipe: Recipe,
        schemes: Mapping[str, QuantScheme],
        within: InRange | None = None,
    ) -> None:
        """schemes: name of a unit -> its scheme; other units stay in full precision. within: None is in every call."""
        self._model, self._found, self._recipe, self._schemes = model, found, recipe, schemes
        self._within = within
        self._places: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        self._stack = ExitStack()
        self.calls = 0
        """How many calls ran with the units in integers; counted only `within` a range."""

    def __enter__(self) -> Swap:
        made = self._quantized()
        self._places = [
            (parent, name, child, made[id(child)])
            for parent in self._model.modules()
            for name, child in parent._modules.items()
            if child is not None and id(child) in made
        ]
        with ExitStack() as stack:
            stack.callback(self._take_out)
            if self._within is None:
                self._put_in()
            else:
                for handle in (
                    self._model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
                    self._model.register_forward_hook(self._after, always_call=True),
                ):
                    stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _quantized(self) -> dict[int, nn.Module]:
        """Integer layers by the identity of the layers whose places they take."""
        made: dict[int, nn.Module] = {}
        packed: Packed = {}
        for unit in self._found.units:
            for site, (_, depth) in zip(unit.sites, unit.shapes, strict=True):
                if unit.name in self._schemes:
                    layer = self._found.modules[site]
                    plan = plan_at(self._schemes[unit.name], site, depth, self._recipe)
                    made[id(layer)] = quantized_layer(layer, plan, site, packed)
        return made

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._within is not None
        timestep = self._within.argument.read(args, kwargs)
        if range_of(self._within.edges, timestep) == self._within.index:
            self.calls += 1
            self._put_in()

    def _after(self, model: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        self._take_out()

    def _put_in(self) -> None:
        for parent, name, _, quantized in self._places:
            parent._modules[name] = quantized

    def _take_out(self) -> None:
        for parent, name, layer, _ in self._places:
            parent._modules[name] = layer
