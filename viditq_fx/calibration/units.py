"""The units of a mixed-precision search: linears that change their bits together, and the group that judges them.

Linears that read one input stay together (they share its quantize and its transform), as `calibrate` groups them. What
a unit moves is told by the graph as far as it can be: cross-attention moves "alignment", all else "visual". That an
attention runs over frames and not over places is no fact of the graph, so "temporal" is for the user to name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from viditq_fx.calibration.groups import Group, group_sites
from viditq_fx.calibration.ledger import InputKey, InputRecord
from viditq_fx.calibration.reservoir import Reservoir
from viditq_fx.calibration.sightings import WatchedLinear
from viditq_fx.calibration.timesteps import TimestepArgument
from viditq_fx.calibration.watch import Watch
from viditq_fx.errors import RecipeError
from viditq_fx.ops.fp8 import why_no_fp8
from viditq_fx.ops.rotate import rotation_block
from viditq_fx.quantize import why_not_replaced
from viditq_fx.recipe import Recipe, SitePlan
from viditq_fx.scheme import QuantScheme

VISUAL, ALIGNMENT = "visual", "alignment"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Linears that get one scheme."""

    sites: tuple[str, ...]
    """Module paths, sorted."""
    shapes: tuple[tuple[int, int], ...]
    """(N, K) of each."""
    group: str
    """Whose metric judges it: "visual", "alignment" or a name of the user's."""

    @property
    def name(self) -> str:
        """The first path; no two units have one."""
        return self.sites[0]

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return sum(width * depth for width, depth in self.shapes)


@dataclass(frozen=True, eq=False, kw_only=True)
class Survey:
    """The units of a model, and what is none."""

    units: tuple[Unit, ...]
    modules: Mapping[str, nn.Module]
    """Site -> the full-precision layer."""
    left: Mapping[str, str]
    """Site -> why it is in no unit."""
    argument: TimestepArgument
    """Where a call of the model has its timestep."""
    timesteps: tuple[float | None, ...]
    """The timestep of every call of the run, in order."""


def survey(
    model: nn.Module, run: Callable[[Any], Any], recipe: Recipe, groups: Mapping[str, str | Sequence[str]]
) -> tuple[Survey, Any]:
    """Run a model once in full precision and find its units; returns what `run` gave, too.

    Raises RecipeError where nothing can be measured, or where `groups` names nothing or one unit twice.
    """
    inputs = _Inputs()
    with Watch(model, keep=recipe.keep, timestep=recipe.timestep) as watch:
        watch.sink = inputs
        output = run(model)
    seen = watch.sightings
    left = dict(seen.refused)
    units: list[Unit] = []
    modules: dict[str, nn.Module] = {}
    for group in group_sites(inputs.seen, seen.linears.values()):
        reason = _why_left(group, watch.model, recipe)
        if reason is not None:
            left |= dict.fromkeys(group.sites, reason)
            continue
        shapes = {linear.fqn: (linear.matrix.shape[0], linear.matrix.shape[1]) for linear in group.linears}
        crosses = set(group.sites) <= seen.crossing
        units.append(
            Unit(
                sites=group.sites,
                shapes=tuple(shapes[site] for site in group.sites),
                group=ALIGNMENT if crosses else VISUAL,
            )
        )
        modules |= {linear.fqn: _owner(linear, watch.model) for linear in group.linears}
    if not units:
        told = "".join(f"\n  {site}: {why}" for site, why in left.items())
        raise RecipeError(
            f"measure_sensitivity: run reached no linear of this {type(watch.model).__name__} that can be "
            f"measured{told}"
        )
    found = Survey(
        units=in_groups(units, groups),
        modules=modules,
        left=dict(sorted(left.items())),
        argument=watch.argument,
        timesteps=tuple(inputs.timesteps),
    )
    return found, output


class _Inputs:
    """Notes who reads what, and when; no statistics: a search needs none."""

    def __init__(self) -> None:
        self.seen: dict[InputKey, InputRecord] = {}
        self.timesteps: list[float | None] = []

    def begin_call(self, timestep: float | None) -> None:
        self.timesteps.append(timestep)

    def expect(self, key: InputKey, dtype: torch.dtype, device: torch.device) -> None:
        """Nothing of an input is kept."""

    def see(self, key: InputKey, x: Tensor) -> None:
        self.seen.setdefault(key, InputRecord(key=key, reservoir=Reservoir(size=0)))


def _owner(linear: WatchedLinear, model: nn.Module) -> nn.Module:
    return model.get_submodule(linear.parameter.rpartition(".")[0])


def _why_left(group: Group, model: nn.Module, recipe: Recipe) -> str | None:
    plans = [recipe.sites.get(site) for site in group.sites]
    if any(plan is not None and plan.scheme is None for plan in plans):
        return "the recipe keeps it, or what shares its input, in full precision"
    if len(group.linears) != len(group.sites):
        return "several linears stand under one path"
    for linear in group.linears:
        layer = _owner(linear, model)
        if layer is model or layer._parameters.get("weight") is not linear.weight:
            return "its weight belongs to no layer that can be swapped"
        reason = why_not_replaced(layer)
        if reason is not None:
            return reason
    return None


def in_groups(units: Sequence[Unit], groups: Mapping[str, str | Sequence[str]]) -> tuple[Unit, ...]:
    """Put units that the user's globs name into the user's groups.

    Raises RecipeError for globs that name nothing, or one unit for two groups.
    """
    if not isinstance(groups, Mapping):
        raise RecipeError(f"groups={groups!r}; give a dict, group -> globs over module paths")
    chosen: dict[str, str] = {}
    for group, given in groups.items():
        patterns = (given,) if isinstance(given, str) else tuple(given)
        for pattern in patterns:
            named = [unit for unit in units if any(_names(pattern, site) for site in unit.sites)]
            if not named:
                raise RecipeError(
                    f"groups[{group!r}]: {pattern!r} names none of the {len(units)} units; paths are such as "
                    f"{units[0].name!r}"
                )
            for unit in named:
                if chosen.setdefault(unit.name, group) != group:
                    raise RecipeError(
                        f"groups: {unit.name!r} is named by {chosen[unit.name]!r} and by {group!r}; linears that "
                        f"share an input are one unit: {', '.join(unit.sites)}"
                    )
    return tuple(replace(unit, group=chosen.get(unit.name, unit.group)) for unit in units)


def _names(pattern: str, site: str) -> bool:
    """As `keep` reads its patterns: "*.attn" also names "attn"."""
    return fnmatchcase(site, pattern) or fnmatchcase(f".{site}", pattern)


def plan_at(scheme: QuantScheme, site: str, depth: int, recipe: Recipe) -> SitePlan:
    """The plan of a site at another scheme: with the balance and rotation that the recipe found for it.

    Raises RecipeError where the recipe's input scales are of other integers.
    """
    planned = recipe.sites.get(site)
    if planned is None or scheme.floating:
        return SitePlan(scheme=scheme, rotation=rotation_block(depth) if scheme.rotate else 1)
    rotates = planned.rotation > 1
    return SitePlan(
        scheme=scheme if scheme.rotate == rotates else replace(scheme, rotate=rotates),
        multiplier=planned.multiplier,
        rotation=planned.rotation,
        reason=planned.reason,
    )


def plan_in_ranges(schemes: Sequence[QuantScheme], site: str, depth: int, recipe: Recipe) -> SitePlan:
    """The plan of a site at one scheme for each range of the timestep; one without ranges where all are the same.

    Raises RecipeError as `plan_at`.
    """
    plans = [plan_at(scheme, site, depth, recipe) for scheme in schemes]
    found = tuple(plan.scheme for plan in plans if plan.scheme is not None)
    if len(set(found)) == 1:
        return plans[0]
    # Of a site that the recipe does not name, a candidate with -rot alone has a rotation; fp8 takes nothing.
    whole = max(plans, key=lambda plan: (plan.rotation, plan.multiplier is not None))
    return replace(whole, scheme=found[0], by_range=found)


def why_no_candidate(scheme: QuantScheme, model: nn.Module) -> str | None:
    """Why a scheme cannot be tried on a model; None if it can."""
    if scheme.calibrated:
        return "its input scales are of one width of integers: the search tries schemes that find them at run time"
    first = next(model.parameters(), None)
    return why_no_fp8(first.device) if scheme.floating and first is not None else None
