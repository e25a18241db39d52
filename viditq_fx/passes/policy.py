"""The default precision policy: which sites stay in full precision, and the sentence that says why."""

from __future__ import annotations

from fnmatch import fnmatchcase

from viditq_fx.passes.roles import CONDITION, HEAD, STEM
from viditq_fx.report import SiteReport

MIN_ROWS = 17
"""Fewest rows M for which quantizing an input pays: below, a linear is bound by reading its weight."""
MIN_CHANNELS = 32
"""Fewest K and N: below, quantize and scales cost more than the product (LoRA ranks, patch channels)."""

_ROLE_REASONS = {
    CONDITION: "conditioning (adaLN modulation, timestep, class or pooled embedding): its error would reach all tokens",
    STEM: "embeds the model's input: its error would go through every block",
    HEAD: "final projection: its error would be the output's",
}


def keeps(pattern: str, site: SiteReport) -> bool:
    """Whether a pattern names a site, by its role or by its path.

    "*.ff.net.2" also names "ff.net.2": under regional compilation paths begin at the block.
    """
    return any(fnmatchcase(text, pattern) for text in (site.role, site.fqn, f".{site.fqn}"))


def unmatched(keep: tuple[str, ...], sites: list[SiteReport]) -> tuple[str, ...]:
    """Patterns that name none of the sites."""
    return tuple(pattern for pattern in keep if not any(keeps(pattern, site) for site in sites))


def reason_to_keep(site: SiteReport, rows: int | None, keep: tuple[str, ...]) -> str | None:
    """Why a site stays in full precision, or None if it is to be quantized.

    `rows` is M at compile time (its hint under dynamic shapes), None when it is not known.
    """
    for pattern in keep:
        if keeps(pattern, site):
            return f"kept by pattern {pattern!r}"
    if site.role in _ROLE_REASONS:
        return _ROLE_REASONS[site.role]
    if rows is not None and rows < MIN_ROWS:
        return f"M={rows} rows is batch-sized (fewer than {MIN_ROWS}): bound by reading the weight"
    if min(site.depth, site.width) < MIN_CHANNELS:
        return f"K={site.depth}, N={site.width}: fewer than {MIN_CHANNELS} channels, quantizing cannot pay"
    return None
