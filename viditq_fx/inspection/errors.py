"""Where quantization errors come from, by site: what calibration's analysis found, ready to be shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from viditq_fx.calibration.analysis import SiteErrors, analyse
from viditq_fx.calibration.findings import Findings
from viditq_fx.calibration.weight_errors import WeightErrors, weight_errors
from viditq_fx.errors import ViditqError


@dataclass(frozen=True, kw_only=True)
class ErrorReport:
    """Of one model and the samples that it ran."""

    sites: tuple[SiteErrors, ...]
    """What varies in the inputs of each site, most incoherent first."""
    weights: tuple[WeightErrors, ...]
    """What 4 bits do to each site's weight, by path; without those whose weight is released."""
    timestep: str | None
    """Name of the argument that ranges are of."""
    samples: int
    calls: int

    @property
    def inputs(self) -> tuple[SiteErrors, ...]:
        """One entry for sites that read the same (q, k and v do), most incoherent first."""
        first: dict[tuple[str, ...], SiteErrors] = {}
        for entry in self.sites:
            first.setdefault(entry.group, entry)
        return tuple(first.values())

    def weight(self, site: str) -> WeightErrors | None:
        """What 4 bits do to the weight of a site; None where it is released."""
        return self._weights.get(site)

    @cached_property
    def _weights(self) -> dict[str, WeightErrors]:
        return {entry.site: entry for entry in self.weights}


def error_report(findings: Any, model: Any) -> ErrorReport:
    """Analyse what `collect` found of `model`. Raises ViditqError for what is no findings, or of another model."""
    if not isinstance(findings, Findings):
        raise ViditqError(
            f"explain: errors={type(findings).__name__}: give the findings of viditq_fx.collect(model, run)"
        )
    if isinstance(model, nn.Module):
        own = {".".join(s for s in path.split(".") if s != "_orig_mod") for path, _ in model.named_modules()}
        sites = [site for group in findings.groups for site in group.sites]
        if own.isdisjoint(sites):
            raise ViditqError(
                f"explain: errors= are findings of another model: {type(model).__name__} has no module "
                f"{sites[0]!r}; collect them on this one"
            )
    return ErrorReport(
        sites=analyse(findings),
        weights=weight_errors(findings),
        timestep=findings.timestep,
        samples=findings.samples,
        calls=findings.calls,
    )


def advice_in_words(entries: Sequence[SiteErrors]) -> list[tuple[str, list[str]]]:
    """(what to do, the sites that ask for it), what most ask for first; sites of which nothing varies come last."""
    asking: dict[str, list[str]] = {}
    for entry in sorted(entries, key=lambda entry: entry.site):
        asking.setdefault(", ".join(entry.advice), []).append(entry.site)
    return sorted(asking.items(), key=lambda pair: (not pair[0], -len(pair[1]), pair[0]))


def plain_numbers(value: Any) -> Any:
    """Values of dicts and lists as JSON can hold them: inf and nan as strings, tuples as lists."""
    if isinstance(value, dict):
        return {key: plain_numbers(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_numbers(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def ratio(value: float | None) -> str:
    """A source of variation as text: "2.31", "40.2", "1.2e+03"; "" where it is not known."""
    return "" if value is None else f"{value:.3g}"


def share(value: float) -> str:
    """A relative squared error as text: "1.13%"."""
    return f"{value:.3%}" if value < 0.0095 else f"{value:.2%}"
