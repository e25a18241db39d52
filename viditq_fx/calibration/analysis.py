"""Where a site's quantization error comes from: ViDiT-Q's four sources of variation, and incoherence (section 3.2).

    token        largest over median abs-max of the rows of one call's range: one scale for all of them wastes bits
    condition    largest over least abs-max of the branches of the batch (with branches=2)
    timestep     largest over least abs-max of the ranges of the timestep: one scale for all of them wastes bits
    channel      largest over mean abs-max of the channels, at the timesteps where that is largest
    drift        how far the profile of the channels moves over the timesteps: the largest distance of a range's
                 normalised profile from the mean one, 0 (the same at all) to 1
    incoherence  max|X| * sqrt(number of elements) / ||X||_F (QuIP's), over all that was seen

Plain numbers from the statistics of `calibration.run.collect`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from viditq_fx.calibration.balance import imbalance
from viditq_fx.calibration.findings import Findings
from viditq_fx.calibration.groups import Group
from viditq_fx.calibration.statistics import Statistics
from viditq_fx.calibration.timesteps import Bucket

TOKENS, BRANCHES, STEPS, CHANNELS, DRIFT = 3.0, 1.5, 2.0, 5.0, 0.1
"""From where on a source is named in the recommendation."""
EVEN = "even over tokens, timesteps and channels: min-max does"
"""The recommendation where nothing is named."""


@dataclass(frozen=True, kw_only=True)
class SiteErrors:
    """Of one site; see the module for each number, 1 (or 0 for `drift`) where nothing varies."""

    site: str
    group: tuple[str, ...]
    """All sites that read the same, this one among them: they have these numbers too."""
    token: float
    condition: float | None
    """None where branches were not kept apart."""
    timestep: float
    channel: float
    drift: float
    incoherence: float
    worst_channel: int
    """The channel of the largest abs-max, where the channels are least even."""
    worst_range: tuple[float, float]
    """Timesteps of that range; (0, 0) where calls had none."""
    by_range: tuple[tuple[float, float, float, float], ...]
    """For each range: its lowest and highest timestep, its abs-max and its channels' largest over mean."""
    advice: tuple[str, ...]
    """What to do, most important first; nothing where min-max does."""
    recommendation: str
    """The same in words, with why."""


def analyse(findings: Findings) -> tuple[SiteErrors, ...]:
    """The sources of variation at every site, most incoherent first. Sites whose linears differ in K are left out."""
    entries = [
        _entry(site, group, findings)
        for group in findings.groups
        if group.depth is not None
        for site in group.sites
    ]
    return tuple(sorted(entries, key=lambda entry: (-entry.incoherence, entry.site)))


def _entry(site: str, group: Group, findings: Findings) -> SiteErrors:
    parts = [(bucket, group.at(bucket)) for bucket in findings.buckets.items]
    parts = [(bucket, part) for bucket, part in parts if part.count]
    worst_bucket, worst = max(parts, key=lambda pair: imbalance(pair[1]))
    tokens = [_ratio(*part.token_ranges()[1:]) for _, part in parts]
    values: dict[str, float] = {
        "token": max(tokens),
        "timestep": _ratio(*_extremes([float(part.amax.max()) for _, part in parts])),
        "channel": imbalance(worst) or 1.0,
        "drift": _drift([part for _, part in parts]),
        "incoherence": _incoherence(group.whole()),
    }
    condition, channel = _condition(group, [b for b, _ in parts]), int(worst.amax.argmax())
    where = (worst_bucket.low, worst_bucket.high) if findings.buckets.timed else (0.0, 0.0)
    median = _ratio(float(worst.amax.median()), float(worst.amax.max()))
    at = f" at {findings.timestep} {where[0]:g}" if findings.timestep else ""
    at += f" to {where[1]:g}" if at and where[0] != where[1] else ""
    seen, advice = _recommend(values, condition, f"channel {channel} carries {median:.3g}x the median{at}")
    return SiteErrors(
        site=site,
        group=group.sites,
        condition=condition,
        worst_channel=channel,
        worst_range=where,
        by_range=tuple((b.low, b.high, float(p.amax.max()), imbalance(p) or 1.0) for b, p in parts),
        advice=advice,
        recommendation=f"{'; '.join(seen)}: {', '.join(advice)}" if seen else EVEN,
        **values,
    )


def _condition(group: Group, buckets: list[Bucket]) -> float | None:
    """The largest ratio of two branches' abs-max in one range."""
    branches = sorted({branch for record in group.inputs for _, branch in record.parts})
    if len(branches) < 2:
        return None
    ratios = []
    for bucket in buckets:
        parts = [group.at(bucket, branch) for branch in branches]
        ratios.append(_ratio(*_extremes([float(part.amax.max()) for part in parts if part.count])))
    return max(ratios)


def _drift(parts: list[Statistics]) -> float:
    """Half the sum of |profile - mean profile|, profiles being abs-max of the channels with sum 1; the largest."""
    profiles = torch.stack([_normalised(part.amax) for part in parts])
    return float((profiles - profiles.mean(0)).abs().sum(1).max() / 2)


def _normalised(amax_K: Tensor) -> Tensor:
    values = amax_K.to(torch.float64)
    total = float(values.sum())
    return values / total if total else torch.full_like(values, 1.0 / values.numel())


def _incoherence(whole: Statistics) -> float:
    elements = whole.count * whole.amax.numel()
    norm = float(whole.square.sum()) ** 0.5
    return float(whole.amax.max()) * elements**0.5 / norm if norm else 1.0


def _extremes(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def _ratio(small: float, large: float) -> float:
    """`large` / `small`; 1 of two zeros, inf of a zero and more."""
    if not large:
        return 1.0
    return large / small if small else float("inf")


def _recommend(
    values: dict[str, float], condition: float | None, channel: str
) -> tuple[list[str], tuple[str, ...]]:
    """(what varies, what to do)."""
    seen: list[str] = []
    advice: list[str] = []
    if values["channel"] >= CHANNELS:
        seen.append(channel)
        advice.append("balance + rotate" if values["drift"] >= DRIFT else "balance")
    elif values["drift"] >= DRIFT:
        seen.append("which channels are large changes with the timestep")
        advice.append("rotate")
    if values["token"] >= TOKENS:
        seen.append(f"the largest token is {values['token']:.3g}x the median one")
        advice.append("a scale for each token, not a static one")
    elif values["timestep"] >= STEPS:
        seen.append(f"ranges differ {values['timestep']:.3g}x over the timesteps")
        advice.append("a dynamic or timestep-wise scale")
    if condition is not None and condition >= BRANCHES and values["token"] < TOKENS:
        seen.append(f"the branches' ranges differ {condition:.3g}x")
        advice.append("a scale for each token")
    return seen, tuple(dict.fromkeys(advice))
