"""Run the samples and say what every site saw: the first half of `calibrate`, and all that an analysis needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from viditq_fx.calibration.groups import Group, group_sites
from viditq_fx.calibration.ledger import Ledger
from viditq_fx.calibration.options import CalibrationOptions
from viditq_fx.calibration.positions import Positions
from viditq_fx.calibration.progress import Progress
from viditq_fx.calibration.ranks import from_every_rank, ranks
from viditq_fx.calibration.resume import Resume, fingerprint
from viditq_fx.calibration.samples import Samples
from viditq_fx.calibration.timesteps import Buckets
from viditq_fx.calibration.watch import Sightings, Watch
from viditq_fx.errors import RecipeError


@dataclass(frozen=True, eq=False, kw_only=True)
class Findings:
    """What the samples showed, of all ranks together."""

    groups: tuple[Group, ...]
    """Sites that get one plan, with the statistics of their input."""
    buckets: Buckets
    timestep: str | None
    """Name of the argument that the buckets are of; None where the calls had none."""
    shapes: dict[str, tuple[int, int]]
    """(N, K) of every linear that was seen, the kept ones too."""
    refused: dict[str, str]
    """Path -> reason, of linears that cannot be quantized."""
    unseen: tuple[str, ...]
    """Linear layers that no call reached."""
    samples: int
    calls: int
    first_call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    """(args, kwargs) of the first call here: an example of one; None where this process made none after a resume."""

    def group(self, site: str) -> Group:
        """The group of a site. Raises KeyError where there is none."""
        for group in self.groups:
            if site in group.sites:
                return group
        raise KeyError(site)


def observe(
    watch: Watch, samples: Samples, options: CalibrationOptions, progress: Progress, resume: str | Path | None
) -> Findings:
    """Run the samples (this rank's share) under a watch that is entered. Raises RecipeError, see `calibrate`."""
    ledger = Ledger(
        rows=options.rows,
        seed=options.seed,
        branches=options.branches,
        buckets=Buckets(limit=options.max_buckets),
        positions=Positions() if options.scheme.input_range == "position" else None,
    )
    file, done = None, 0
    if resume is not None:
        asked = options.to_dict()
        request = {name: asked[name] for name in _COUNTED} | {"model": fingerprint(watch.model)}
        file = Resume(resume, request | {"samples_given": samples.count})
        done = file.load(ledger, watch.sightings)
    watch.sink = ledger
    for _ in run_samples(watch, samples, progress, "calibrating", skip=done, begin=ledger.begin_sample):
        done += 1
        if file is not None:
            file.save(ledger, watch.sightings, done)
    done = _merge_ranks(ledger, watch.sightings, done)
    _check(watch, ledger, done)
    return _findings(watch, ledger, done)


_COUNTED = ("keep", "timestep", "max_buckets", "branches", "rows", "seed")
"""Options on which statistics depend; the others may change when a calibration goes on."""


def run_samples(
    watch: Watch,
    samples: Samples,
    progress: Progress,
    title: str,
    *,
    skip: int = 0,
    begin: Callable[[int], None] = lambda index: None,
) -> Iterator[int]:
    """Run this rank's samples but the first `skip` of them; gives each one's index when it is done."""
    rank, world = ranks()
    by_call = samples.single or samples.count is None
    mine = 1 if samples.single else -(-((samples.count or 0) - rank) // world)
    progress.stage(title, None if by_call else mine - skip)
    watch.on_call = progress.advance if by_call else lambda: None
    position = 0
    for number, sample in enumerate(samples):
        index = rank if samples.single else number
        if index % world != rank:
            continue
        position += 1
        if position <= skip:
            continue
        begin(index)
        sample()
        yield index
        if not by_call:
            progress.advance()


def _merge_ranks(ledger: Ledger, sightings: Sightings, samples: int) -> int:
    """Let every rank know what all have seen; returns how many samples all have run."""
    _, world = ranks()
    if world == 1:
        return samples
    meta, tensors = ledger.dump()
    parts = from_every_rank((meta, tensors, sightings.dump(), samples))
    idle = [str(source) for source, (meta, *_) in enumerate(parts) if not meta["calls"]]
    if idle and len(idle) < world:
        raise RecipeError(
            f"calibrate: ranks {', '.join(idle)} of {world} never called the model; give at least {world} samples"
        )
    ledger.clear()
    for meta, tensors, seen, _ in parts:
        ledger.absorb(meta, tensors)
        sightings.absorb(seen)
    return sum(part[3] for part in parts)


def _check(watch: Watch, ledger: Ledger, samples: int) -> None:
    name = type(watch.model).__name__
    if not samples:
        raise RecipeError("calibrate: run holds no sample")
    if not ledger.calls:
        raise RecipeError(
            f"calibrate: the {samples} samples never called this {name}; calling model.forward directly, or the model "
            "inside a function that is compiled as a whole, goes unseen: call the model itself"
        )
    if watch.calls and not watch.graphs:
        raise RecipeError(
            "calibrate: Dynamo captured no graph of the model's calls; check that torch.compile is not disabled "
            "(TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE, torch.compiler.disable)"
        )
    if not ledger.inputs:
        refused = "".join(f"\n  {fqn}: {reason}" for fqn, reason in watch.sightings.refused.items())
        raise RecipeError(
            f"calibrate: none of the linears of this {name} is to be quantized; layers of quantize_ are integers "
            f"already, so calibrate first{refused}"
        )
    at_fault = watch.sightings.not_finite()
    if at_fault is not None:
        raise RecipeError(
            f"calibrate: {at_fault!r} of this {name} holds NaN or infinity; load its checkpoint again, or repair it"
        )
    problem = ledger.problem()
    if problem is not None:
        raise RecipeError(f"calibrate: {problem}")


def _findings(watch: Watch, ledger: Ledger, samples: int) -> Findings:
    seen = watch.sightings
    return Findings(
        groups=tuple(group_sites(ledger.inputs, seen.linears.values())),
        buckets=ledger.buckets,
        timestep=watch.argument.name if ledger.buckets.timed else None,
        shapes={fqn: shape for fqn, (shape, *more) in sorted(seen.shapes.items()) if not more},
        refused=dict(sorted(seen.refused.items())),
        unseen=tuple(watch.unseen()),
        samples=samples,
        calls=ledger.calls,
        first_call=watch.first_call,
    )
