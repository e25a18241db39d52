"""`calibrate`: run samples, look at what every site reads, and decide how each is quantized."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from viditq_fx.calibration.balance import Transform, plan_transform
from viditq_fx.calibration.findings import Findings, observe, run_samples
from viditq_fx.calibration.ledger import InputKey
from viditq_fx.calibration.options import CalibrationOptions, read_options
from viditq_fx.calibration.progress import Progress, close, progress_of
from viditq_fx.calibration.ranges import TransformedRanges, static_scale
from viditq_fx.calibration.ranks import largest_of_ranks, ranks
from viditq_fx.calibration.samples import Samples
from viditq_fx.calibration.watch import Watch
from viditq_fx.errors import RecipeError
from viditq_fx.recipe import Recipe, SitePlan
from viditq_fx.scheme import QuantScheme


def calibrate(
    model: nn.Module,
    run: Any,
    *,
    scheme: str | QuantScheme = "w8a8",
    keep: str | Sequence[str] = (),
    timestep: str | None = None,
    max_buckets: int = 20,
    branches: int = 1,
    rows: int = 64,
    seed: int = 0,
    balance: str | float | None = None,
    alpha: float | None = None,
    alpha_repo: float | None = None,
    rotation: str | None = None,
    random_signs: bool = False,
    progress: bool | Progress = False,
    resume: str | Path | None = None,
) -> Recipe:
    """Watch `model` while `run` samples with it, and return how each of its linears is best quantized.

    run: a function without arguments that makes the model be called, `lambda: pipe(prompt)`, or an iterable of such
        functions or of the model's arguments ((args, kwargs), a list or a dict). It runs without gradients and in full
        precision; `model` may be compiled already. A static scheme with rotated sites runs it twice, and so does a
        "-position" one, for which every call has to be of one resolution, number of frames and text length.
    scheme, keep: as in `quantize_`.
    timestep: name of the argument of the model's forward that holds the timestep; by default "timestep", "timesteps"
        or "t". Its largest element counts. Calls are sorted into at most `max_buckets` ranges of those seen.
    branches: 2 keeps statistics of the first and second half of the batch apart (conditional and not).
    rows: rows of each input that are kept, in the dtype they come in, to measure errors on; chosen by `seed`.
    balance: "search" (default) tries SmoothQuant's alpha 0.1 to 0.9 and none, by site; "off"; or an alpha in 0..1.
        `alpha` says the same; `alpha_repo` is ViDiT-Q's own repository's, 1 - alpha (see calibration/balance.py).
    rotation: "search" (default) rotates where that lowers the measured error; "on" (default of "-rot" schemes); "off".
    random_signs: put random signs, by `seed`, into the multiplier before the rotation.
    progress: True for bars (rich) or lines on stderr, or an object with stage(title, total) and advance().
    resume: a folder. Statistics are saved there after each sample, and a later call with the same model, samples
        and options goes on where they end. The second run of a static scheme always runs whole.

    With torch.distributed initialised every rank calls this with the same iterable and runs its share of it (of one
    function: its own); all return the same recipe. Statistics take O(sites * buckets * K) memory, no activations.

    Raises RecipeError for wrong arguments, samples that never call the model or reach NaN, a missing timestep under
    a "-timestep" scheme, several sequence lengths under a "-position" one, or a `resume` folder of something else;
    SchemeError, OptionError for scheme and keep.
    """
    options = read_options(
        *(scheme, keep, balance, rotation, alpha, alpha_repo),
        timestep=timestep,
        max_buckets=max_buckets,
        branches=branches,
        rows=rows,
        seed=seed,
        random_signs=random_signs,
    )
    watch, drawn = Watch(model, keep=options.keep, timestep=timestep), progress_of(progress)
    samples = Samples(model, run)
    _check_static(options, watch, samples)
    try:
        with watch:
            findings = observe(watch, samples, options, drawn, resume)
            return plan(findings, options, watch, samples, drawn)
    finally:
        close(drawn)


def collect(
    model: nn.Module,
    run: Any,
    *,
    keep: str | Sequence[str] = (),
    timestep: str | None = None,
    max_buckets: int = 20,
    branches: int = 1,
    rows: int = 64,
    seed: int = 0,
    progress: bool | Progress = False,
    resume: str | Path | None = None,
) -> Findings:
    """The statistics that `calibrate` decides from, for `analysis.analyse` or a search of one's own.

    Arguments and errors are those of `calibrate`. The findings hold the model's weights, not copies.
    """
    counted = {
        "timestep": timestep,
        "max_buckets": max_buckets,
        "branches": branches,
        "rows": rows,
        "seed": seed,
    }
    options = read_options("w8a8", keep, "off", "off", **counted)
    drawn = progress_of(progress)
    try:
        with Watch(model, keep=options.keep, timestep=timestep) as watch:
            return observe(watch, Samples(model, run), options, drawn, resume)
    finally:
        close(drawn)


def _check_static(options: CalibrationOptions, watch: Watch, samples: Samples) -> None:
    """Tell before the samples run what a static scheme would lack afterwards."""
    if options.scheme.input_range == "timestep" and watch.argument.name is None:
        raise RecipeError(
            f"calibrate: scheme {options.scheme} has a scale for each range of the timestep, and "
            f"{type(watch.model).__name__}.forward has no argument timestep, timesteps or t; name the one that holds "
            "it (timestep='...'), or choose a static or dynamic scheme"
        )
    if not (options.scheme.calibrated and samples.once):
        return
    if options.scheme.input_range == "position":
        raise RecipeError(
            f"calibrate: scheme {options.scheme} runs the samples a second time, to see each position of a token; give "
            "a list or a function, not a generator"
        )
    if options.rotation != "off":
        raise RecipeError(
            f"calibrate: scheme {options.scheme} runs the samples a second time where sites are rotated; give a list "
            "or a function, not a generator, or rotation='off'"
        )


def plan(
    findings: Findings, options: CalibrationOptions, watch: Watch, samples: Samples, progress: Progress
) -> Recipe:
    """Decide on every site from what was found; `watch` is entered, in case the samples have to run again."""
    scheme = options.scheme
    if scheme.input_range == "timestep" and not findings.buckets.timed:
        raise RecipeError(
            f"calibrate: scheme {scheme} has a scale for each range of the timestep, and argument "
            f"{watch.argument.name!r} was None in every call; name the one that holds it: timestep='...'"
        )
    edges = findings.buckets.edges() if scheme.input_range == "timestep" else ()
    progress.stage("planning", len(findings.groups))
    transforms: list[Transform] = []
    for group in findings.groups:
        transforms.append(plan_transform(group, options, findings.buckets.items, edges))
        progress.advance()
    again = (
        _seen_again(scheme, findings, transforms, edges, watch, samples, progress)
        if scheme.calibrated
        else {}
    )
    sites: dict[str, SitePlan] = {}
    for group, transform in zip(findings.groups, transforms, strict=True):
        ranges = None
        if scheme.calibrated:
            ranges = static_scale(group, transform, scheme, findings.buckets.items, again)
        sites |= dict.fromkeys(group.sites, _site_plan(scheme, transform, ranges))
    if findings.unseen and ranks()[0] == 0:
        warnings.warn(
            f"viditq: no call of the calibration reached {len(findings.unseen)} linear layers, e.g. "
            f"{findings.unseen[0]!r}: they have no plan of their own",
            stacklevel=3,
        )
    return Recipe(
        scheme=scheme,
        sites=dict(sorted(sites.items())),
        keep=options.keep,
        edges=edges,
        timestep=findings.timestep if edges else None,
        shapes=findings.shapes,
        provenance=_provenance(findings, options, watch),
    )


def _site_plan(scheme: QuantScheme, transform: Transform, ranges: Tensor | None) -> SitePlan:
    rotates = transform.rotation > 1
    return SitePlan(
        scheme=scheme if scheme.rotate == rotates else replace(scheme, rotate=rotates),
        multiplier=transform.multiplier,
        rotation=transform.rotation,
        input_scale=ranges,
        reason=transform.reason,
    )


def _seen_again(
    scheme: QuantScheme,
    findings: Findings,
    transforms: Sequence[Transform],
    edges: tuple[float, ...],
    watch: Watch,
    samples: Samples,
    progress: Progress,
) -> dict[InputKey, Tensor]:
    """Run the samples again for max|x'| of the rotated inputs, or of all by position, if there are any."""
    by_position = scheme.input_range == "position"
    wanted = {
        record.key: transform
        for group, transform in zip(findings.groups, transforms, strict=True)
        for record in group.inputs
        if by_position or transform.rotation > 1
    }
    if not wanted:
        return {}
    sink = TransformedRanges(transforms=wanted, edges=edges, by_position=by_position)
    watch.sink = sink
    for _ in run_samples(watch, samples, progress, "measuring static ranges"):
        pass
    return largest_of_ranks(sink.largest)


def _provenance(findings: Findings, options: CalibrationOptions, watch: Watch) -> dict[str, Any]:
    kind = type(watch.model)
    return {
        "model": f"{kind.__module__}.{kind.__qualname__}",
        "samples": findings.samples,
        "calls": findings.calls,
        "timestep": findings.timestep,
        "timesteps": [[b.low, b.high] for b in findings.buckets.items] if findings.buckets.timed else [],
        "options": options.to_dict(),
        "versions": {"viditq_fx": import_module("viditq_fx").__version__, "torch": torch.__version__},
        "refused": findings.refused,
        "unseen": list(findings.unseen),
    }
