"""Balance the channels of an input against those of its weights, and rotate them, where that lowers the error.

    s = max|X|^alpha / max|W|^(1 - alpha)        x' = (x / s) R,  W' = (W * s) R

per input channel, from the timesteps at which the channels are least even (ViDiT-Q section 4.2, the static part; the
rotation R is the dynamic part). alpha is SmoothQuant's: at 1 the input becomes even, at 0 the weight. ViDiT-Q's
repository has X * mask with mask = max|W|^a / max|X|^(1 - a) = 1 / s, so its a ("alpha_repo") is 1 - alpha.

Shapes: amax_K, scale s_K and multiplier [K].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from viditq_fx.calibration.groups import Group
from viditq_fx.calibration.options import CalibrationOptions
from viditq_fx.calibration.statistics import Statistics
from viditq_fx.calibration.timesteps import Bucket
from viditq_fx.calibration.trial import Trial
from viditq_fx.ops.rotate import rotation_block

ALPHAS = tuple(n / 10 for n in range(1, 10))
"""What a search tries."""
FLOOR = 1e-5
"""Least magnitude of a channel, relative to the largest: a dead channel would ask for an infinite scale."""
LARGEST_SCALE = 2.0**16
"""Of the normalised scales, and its inverse the least: their products with any weight stay normal fp32 numbers."""
LEAST_GAIN = 0.02
"""Part of the error by which a step that costs time at every call has to lower it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Transform:
    """What happens to the input of a group before it is quantized, and why."""

    multiplier: Tensor | None = None
    """fp32 [K] on the CPU: signs / s."""
    rotation: int = 1
    reason: str = ""


def imbalance(part: Statistics) -> float:
    """Largest over mean abs-max of the channels: 1 where all are alike; 0 of no rows."""
    mean = float(part.amax.mean()) if part.count else 0.0
    return float(part.amax.max()) / mean if mean else 0.0


def channel_scale(x_amax_K: Tensor, w_amax_K: Tensor, alpha: float) -> Tensor:
    """The module's s, fp64 [K] on the CPU, its geometric mean 1; of 1s where input or weight is all zero."""
    x_K, w_K = (t.to("cpu", torch.float64) for t in (x_amax_K, w_amax_K))
    if not float(x_K.max()) or not float(w_K.max()):
        return torch.ones_like(x_K)
    x_K, w_K = (t.clamp(min=FLOOR * float(t.max())) for t in (x_K, w_K))
    logs = alpha * x_K.log() - (1.0 - alpha) * w_K.log()
    return (logs - logs.mean()).exp().clamp(1.0 / LARGEST_SCALE, LARGEST_SCALE)


def random_signs(depth: int, seed: int) -> Tensor:
    """+-1 for each channel, fp32 [K], the same for the same seed everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (depth,), generator=generator).to(torch.float32) * 2.0 - 1.0


def plan_transform(
    group: Group, options: CalibrationOptions, buckets: Sequence[Bucket], edges: tuple[float, ...] = ()
) -> Transform:
    """The transform of a group: the one asked for, or the best of {none, scale, rotation, both} by measured error."""
    if options.scheme.floating:
        return Transform(reason="fp8 is neither balanced nor rotated")
    if group.depth is None:
        return Transform(
            reason="linears of different K stand under one path: no balance or rotation fits them all"
        )
    block = rotation_block(group.depth)
    blocks = {"off": (1,), "on": (block,), "search": (1, block)}[options.rotation]
    alphas = {"off": (None,), "search": (None, *ALPHAS)}.get(str(options.balance), (options.balance,))
    note = f"; K={group.depth} has no power of 4 in it: not rotated" if block == 1 and blocks != (1,) else ""
    # Found once: to merge the statistics of all steps for each candidate took longer than to try it.
    peaks = None if alphas == (None,) else _uneven_peaks(group, buckets)
    candidates = [
        _candidate(group.depth, options, peaks, alpha, turn)
        for turn in sorted(set(blocks))
        for alpha in alphas
    ]
    if len(candidates) == 1:
        _, only = candidates[0]
        return replace(only, reason=f"{only.reason}, as asked for{note}")
    return _best(candidates, Trial(group, options.scheme, edges), note)


_KINDS = {
    (False, False): "neither",
    (True, False): "balance",
    (False, True): "rotation",
    (True, True): "both",
}
"""(balanced, rotated) -> what the reason calls it, in rising order of what it costs at every call."""


def _uneven_peaks(group: Group, buckets: Sequence[Bucket]) -> tuple[Tensor, Tensor]:
    """(max|X| of the bucket whose channels are least even, max|W|), each fp32 [K]."""
    worst = max((group.at(bucket) for bucket in buckets), key=imbalance)
    return worst.amax, group.weight_amax()


def _candidate(
    depth: int,
    options: CalibrationOptions,
    peaks: tuple[Tensor, Tensor] | None,
    alpha: str | float | None,
    rotation: int,
) -> tuple[str, Transform]:
    """(kind, transform)."""
    multiplier, words = None, []
    if alpha is not None:
        assert peaks is not None
        scale_K = channel_scale(*peaks, float(alpha))
        multiplier = (1.0 / scale_K).to(torch.float32)
        words.append(f"balance at alpha {float(alpha):g}")
    if rotation > 1:
        words.append(f"rotation in blocks of {rotation}")
        if options.random_signs:
            signs_K = random_signs(depth, options.seed)
            multiplier = signs_K if multiplier is None else signs_K * multiplier
    reason = " and ".join(words) or "neither balance nor rotation"
    kind = _KINDS[alpha is not None, rotation > 1]
    return kind, Transform(multiplier=multiplier, rotation=rotation, reason=reason)


def _best(candidates: list[tuple[str, Transform]], trial: Trial, note: str) -> Transform:
    """The candidate of least error; a kind that costs more has to be better by LEAST_GAIN."""
    kinds: dict[str, tuple[float, Transform]] = {}
    errors = trial.errors([(candidate.multiplier, candidate.rotation) for _, candidate in candidates])
    for (kind, candidate), error in zip(candidates, errors, strict=True):
        if kind not in kinds or error < kinds[kind][0]:
            kinds[kind] = error, candidate
    order = [kind for kind in _KINDS.values() if kind in kinds]
    chosen = order[0]
    for kind in order[1:]:
        if kinds[kind][0] < (1.0 - LEAST_GAIN) * kinds[chosen][0]:
            chosen = kind
    error, best = kinds[chosen]
    others = ", ".join(f"{kind} {kinds[kind][0]:.3%}" for kind in order if kind != chosen)
    told = f" ({others})" if others else ""
    return replace(best, reason=f"{best.reason}: output error {error:.3%}{told}{note}")
