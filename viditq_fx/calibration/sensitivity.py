"""measure_sensitivity: put one unit at a time into integers, and ask each metric what that did to what is generated.

ViDiT-Q, section 4.3: layers are judged by the metric that they move. A unit is measured with all else in full
precision, on real integers: eager quantized layers take the places of its layers for one run. Nothing is compiled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from viditq_fx.calibration.progress import Progress, close, progress_of
from viditq_fx.calibration.resume import fingerprint
from viditq_fx.calibration.sensitivity_table import SensitivityTable
from viditq_fx.calibration.swap import InRange, StepRanges, Swap
from viditq_fx.calibration.units import VISUAL, Survey, survey, why_no_candidate
from viditq_fx.calibration.watch import quiet_own_compilation
from viditq_fx.errors import RecipeError, SchemeError
from viditq_fx.quality import Judge, Loss
from viditq_fx.recipe import Recipe
from viditq_fx.scheme import QuantScheme
from viditq_fx.timestep import range_names

UNSEEDED = 1e-2
"""Relative error of two full-precision runs from which on they are taken for draws of different noise."""


def relative_square(reference: Tensor, test: Tensor) -> float:
    """sum (test - reference)^2 / sum reference^2 in float64: 10^(-SQNR / 10); the default visual loss."""
    signal = reference.double().square().sum().item()
    error = (test.double() - reference.double()).square().sum().item()
    return error / signal if signal else (0.0 if error == 0.0 else math.inf)


def measure_sensitivity(
    model: nn.Module,
    run: Callable[[Any], Tensor],
    recipe: Recipe | str | PathLike[str],
    *,
    metrics: Judge | Mapping[str, Loss] | None = None,
    groups: Mapping[str, str | Sequence[str]] | None = None,
    low: str | QuantScheme = "w4a8",
    high: str | QuantScheme = "w8a8",
    between: Sequence[str | QuantScheme] = (),
    ranges: int = 1,
    seed: int = 0,
    resume: str | PathLike[str] | None = None,
    progress: bool | Progress = False,
) -> SensitivityTable:
    """Measure what every unit alone does to every metric, at every candidate scheme, by range of the timestep if asked.

    run: called as run(model); it draws samples and returns them as one tensor. Every call starts from the same state
        of torch's random numbers (`seed`), so that what differs is the model; numpy's and `random`'s are run's to seed.
    recipe: brings balance and rotation by site (calibrate for `low`), and what is kept in full precision.
    metrics: group -> loss(reference, test), lower is better, for every group of units; or a `quality.Judge`.
        "visual" is `relative_square` unless given. All are asked of every run; a unit's own group's decides.
    groups: group -> globs over module paths, in place of what the graph tells: cross-attention is "alignment", all
        else "visual". Name temporal attention here, {"temporal": "*.temporal_transformer_blocks.*"}.
    low, high, between: the candidates. Schemes with calibrated input scales cannot be searched.
    ranges: into how many ranges of the timestep the run's steps are parted, evenly (the paper parts 20 steps into 4). A
        unit is then in integers only in the calls of one range, and has losses for each; groups are measured over all
        steps. The argument that holds the timestep is the recipe's, or the first of TIMESTEP_NAMES that forward takes.
    resume: a JSON file. The table is written there after every unit and range, and a later call with the same model,
        recipe and arguments goes on where it ends.
    progress: as in `calibrate`.

    Takes 2 + groups + units * candidates * ranges runs, eager, and the memory of one group in integers.

    Raises RecipeError for wrong arguments, a group without a metric, a run that returns no tensor or draws other noise
    each time, a loss that is no finite number, a `resume` file of something else, or ranges of a model whose calls have
    no timestep, or fewer different ones than ranges.
    """
    if not isinstance(model, nn.Module) or not callable(run):
        raise RecipeError("measure_sensitivity: give a torch.nn.Module and a function, run(model) -> tensor")
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    plain = model
    while isinstance(plain, OptimizedModule):
        plain = plain._orig_mod
    schemes = _candidates(low, between, high, plain)
    if not isinstance(ranges, int) or isinstance(ranges, bool) or ranges < 1:
        raise RecipeError(f"measure_sensitivity: ranges={ranges!r}; give how many, 1 or more")
    drawn = progress_of(progress)

    def sample(given: Any) -> Tensor:
        return _sample(run, given, seed)

    try:
        drawn.stage("full precision", 2)
        found, seen = survey(model, sample, recipe, groups or {})
        drawn.advance()
        losses = _losses(metrics, found)
        parted = StepRanges.of(found.timesteps, ranges, plain) if ranges > 1 else None
        with ExitStack() as stack:
            quiet_own_compilation(stack, [model, *plain.modules()])
            reference = sample(model)
            drawn.advance()
            _check_seeded(reference, seen)
            request = _request(plain, recipe, seed, reference)
            table = _begin(found, schemes, losses, request, parted, resume)
            trial = _Trial(model, plain, sample, reference, found, recipe, losses)
            return _measure(table, trial, schemes, resume, drawn)
    finally:
        close(drawn)


class _Trial:
    """Runs with some units in integers."""

    def __init__(
        self,
        model: nn.Module,
        plain: nn.Module,
        sample: Callable[[Any], Tensor],
        reference: Tensor,
        found: Survey,
        recipe: Recipe,
        losses: Mapping[str, Loss],
    ) -> None:
        self._model, self._plain, self._sample = model, plain, sample
        self._reference, self._found, self._recipe, self._losses = reference, found, recipe, losses

    def output(self, schemes: Mapping[str, QuantScheme], within: InRange | None = None) -> Tensor:
        """What is drawn with these units (by name) in integers, in all steps or within a range."""
        with Swap(self._plain, self._found, self._recipe, schemes, within) as swap:
            drawn = self._sample(self._model)
        if drawn.shape != self._reference.shape:
            raise RecipeError(
                f"run gave a tensor of shape {tuple(drawn.shape)}, and {tuple(self._reference.shape)} before"
            )
        if within is not None and not swap.calls:
            raise RecipeError(
                f"measure_sensitivity: with {', '.join(schemes)} in integers run called the model at no timestep of "
                f"the range {range_names(within.edges)[within.index]!r}, and did in full precision; let it "
                "call the model at the same timesteps each time, or measure with ranges=1"
            )
        return drawn

    def losses(self, name: str, scheme: QuantScheme, within: InRange | None) -> dict[str, float]:
        """All metrics with one unit at a scheme. Raises RecipeError for one that is no finite number."""
        drawn = self.output({name: scheme}, within)
        found = {metric: float(loss(self._reference, drawn)) for metric, loss in self._losses.items()}
        for metric, value in found.items():
            _check_finite(value, f"metric {metric!r} of unit {name!r} at {scheme}")
        return found

    def ranges(self, edges: tuple[float, ...]) -> list[InRange | None]:
        """What stands for each of the table's `parts`."""
        if not edges:
            return [None]
        argument = self._found.argument
        return [InRange(argument=argument, edges=edges, index=i) for i in range(len(edges) + 1)]

    def error(self, names: Sequence[str], scheme: QuantScheme, group: str) -> float:
        """Relative squared error of the output with several units at a scheme."""
        value = relative_square(self._reference, self.output(dict.fromkeys(names, scheme)))
        _check_finite(value, f"the error of group {group!r} at {scheme}")
        return value


def _measure(
    table: SensitivityTable,
    trial: _Trial,
    schemes: Sequence[QuantScheme],
    resume: str | PathLike[str] | None,
    progress: Progress,
) -> SensitivityTable:
    progress.stage("groups", len(table.groups()))
    for group in table.groups():
        if group not in table.errors:
            names = [unit.name for unit in table.units if unit.group == group]
            error = trial.error(names, schemes[0], group)
            table = _saved(replace(table, errors={**table.errors, group: error}), resume)
        progress.advance()
    ranges = trial.ranges(table.edges)
    progress.stage("units", len(table.units) * len(ranges))
    for unit in table.units:
        for part, within in enumerate(ranges):
            if set(table.parts[part].get(unit.name, ())) != set(table.schemes):
                found = {str(scheme): trial.losses(unit.name, scheme, within) for scheme in schemes}
                table = _saved(table.with_losses(unit.name, part, found), resume)
            progress.advance()
    return table


def _saved(table: SensitivityTable, path: str | PathLike[str] | None) -> SensitivityTable:
    if path is not None:
        table.save(path)
    return table


def _sample(run: Callable[[Any], Any], model: Any, seed: int) -> Tensor:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        output = run(model)
    if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
        told = (
            f"{output.dtype} of shape {tuple(output.shape)}"
            if isinstance(output, Tensor)
            else type(output).__name__
        )
        raise RecipeError(f"measure_sensitivity: run(model) returns one tensor of real numbers, not {told}")
    return output.detach()


def _candidates(
    low: str | QuantScheme, between: Sequence[str | QuantScheme], high: str | QuantScheme, model: nn.Module
) -> tuple[QuantScheme, ...]:
    """From few bits to many; by how much is for the budget to say."""
    if isinstance(between, str):
        raise RecipeError(f"between={between!r}; give a list of schemes")
    schemes = [QuantScheme.parse(scheme) for scheme in (low, *between, high)]
    if len(set(schemes)) < len(schemes):
        raise RecipeError(f"candidates {', '.join(map(str, schemes))}: each can be given once")
    widths = [(scheme.weight_bits, scheme.input_bits) for scheme in schemes]
    if widths != sorted(widths):
        raise RecipeError(f"candidates {', '.join(map(str, schemes))}: give them from few bits to many")
    for scheme in schemes:
        reason = why_no_candidate(scheme, model)
        if reason is not None:
            raise SchemeError(f"scheme {str(scheme)!r} cannot be searched: {reason}")
    return tuple(schemes)


def _losses(metrics: Judge | Mapping[str, Loss] | None, found: Survey) -> dict[str, Loss]:
    given: dict[str, Any] = {}
    if isinstance(metrics, Judge):
        given = {part.name: getattr(metrics, part.name) for part in fields(metrics)}
    elif isinstance(metrics, Mapping):
        given = dict(metrics)
    elif metrics is not None:
        raise RecipeError(f"metrics={metrics!r}; give a dict, group -> loss(reference, test), or a Judge")
    losses = {VISUAL: relative_square} | given
    wrong = [name for name, loss in losses.items() if not callable(loss) or not isinstance(name, str)]
    if wrong:
        raise RecipeError(f"metrics {wrong}: each is a function, loss(reference, test) -> number")
    groups = {unit.group: unit for unit in reversed(found.units)}
    missing = sorted(groups.keys() - losses.keys())
    if missing:
        raise RecipeError(
            f"group {missing[0]!r} has no metric (its first unit is {groups[missing[0]].name!r}); give "
            f"metrics={{{missing[0]!r}: loss}}, or put its units into another group: groups={{'visual': '*'}}"
        )
    return dict(sorted(losses.items()))


def _check_seeded(reference: Tensor, seen: Any) -> None:
    _check_finite(relative_square(reference, reference), "what run draws in full precision")
    if reference.shape != seen.shape or relative_square(reference, seen) > UNSEEDED**2:
        raise RecipeError(
            "measure_sensitivity: two runs in full precision drew different samples; let run draw the same noise at "
            "every call. Only torch's own random numbers are seeded before it: inside run, make and seed each "
            "torch.Generator and numpy.random.default_rng, or call numpy.random.seed and random.seed"
        )


def _check_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise RecipeError(f"measure_sensitivity: {what} is {value}: it has to be a finite number")


def _request(model: nn.Module, recipe: Recipe, seed: int, reference: Tensor) -> dict[str, Any]:
    kind = type(model)
    return {
        "model": f"{kind.__module__}.{kind.__qualname__}",
        "fingerprint": fingerprint(model),
        "recipe": _digest(recipe),
        "seed": seed,
        "samples": {
            "shape": list(reference.shape),
            "mean": float(f"{reference.double().mean().item():.3g}"),
            "rms": float(f"{reference.double().square().mean().sqrt().item():.4g}"),
        },
    }


def _digest(recipe: Recipe) -> str:
    """Changes with all of a recipe that a measurement depends on."""
    digest = hashlib.sha256(repr(sorted(recipe.keep)).encode())
    for path, plan in sorted(recipe.sites.items()):
        digest.update(f"{path} {plan.scheme is None} {plan.rotation}".encode())
        if plan.multiplier is not None:
            digest.update(plan.multiplier.detach().to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _begin(
    found: Survey,
    schemes: Sequence[QuantScheme],
    losses: Mapping[str, Loss],
    request: dict[str, Any],
    parted: StepRanges | None,
    resume: str | PathLike[str] | None,
) -> SensitivityTable:
    """A table without figures, or the one that a file holds so far."""
    fresh = SensitivityTable(
        schemes=tuple(map(str, schemes)),
        metrics=tuple(losses),
        units=found.units,
        losses={},
        errors={},
        left=found.left,
        request=request,
    )
    if parted is not None:
        fresh = replace(
            fresh,
            edges=parted.edges,
            calls=parted.calls,
            timestep=found.argument.name,
            in_ranges=({},) * len(parted.calls),
        )
    if resume is None or not Path(resume).exists():
        return fresh
    old = SensitivityTable.load(resume)
    asked = {"schemes": (old.schemes, fresh.schemes), "metrics": (old.metrics, fresh.metrics)}
    asked |= {"units": (old.units, fresh.units), "ranges": (old.edges, fresh.edges)}
    asked |= {"timestep": (old.timestep, fresh.timestep), "calls by range": (old.calls, fresh.calls)}
    asked |= {key: (old.request.get(key), value) for key, value in request.items()}
    for key, (was, now) in asked.items():
        if was != now:
            told = "others" if key == "units" else f"{was}, now {now} is asked for"
            raise RecipeError(
                f"{resume}: was begun with {key} {told}; give another file, or delete it to begin anew"
            )
    return old
