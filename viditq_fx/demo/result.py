"""The demo's figures as plain data, and the sentences that say what they mean."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT_VERSION = 1
SAME_SPEED = 0.05
"""Ratios to full precision this near to 1 are called equal: the machine's noise is no smaller."""


@dataclass(kw_only=True)
class VariantFigures:
    """Everything measured of one variant."""

    name: str
    scheme: str | None
    compile_seconds: float
    step_ms: float
    """Median time of one step, after compilation."""
    step_ms_quartiles: tuple[float, float]
    speed: float
    """Step time of full precision over this one's, median of the rounds: 2 is twice as fast."""
    speed_quartiles: tuple[float, float]
    """Of the rounds: a difference is told only where both lie on one side of 1."""
    linear_bytes: int
    """Memory of the weights of the linears that the schemes quantize, as this variant holds them."""
    model_bytes: int
    """Memory of all weights of the model, as this variant holds them."""
    accuracy: float
    fd_by_seed: list[float]
    """FD-digits of each seed's images; empty for fewer than 2 images."""
    fd_all: float | None
    """FD-digits of all images together."""
    sqnr_db: float | None = None
    """Of one step against full precision on the same inputs; None for full precision itself."""
    psnr_db: float | None = None
    """Of the images against those of full precision from the same seeds."""
    quantized: int = 0
    kept: int = 0
    refused: int = 0
    kernels: list[str] = field(default_factory=list)
    sites: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the explain report; empty for full precision."""

    @property
    def fd_mean(self) -> float | None:
        """Mean FD-digits over the seeds."""
        return sum(self.fd_by_seed) / len(self.fd_by_seed) if self.fd_by_seed else None


@dataclass(kw_only=True)
class DemoResult:
    """One run: its settings, its variants (full precision first) and the machine."""

    variants: list[VariantFigures]
    settings: dict[str, Any]
    machine: dict[str, Any]
    seconds: float = 0.0

    @property
    def baseline(self) -> VariantFigures:
        """The variant in full precision."""
        return self.variants[0]

    @property
    def fd_spread(self) -> float | None:
        """Standard deviation of full precision's FD-digits from seed to seed; None for one seed."""
        return standard_deviation(self.baseline.fd_by_seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for JSON; infinite figures become None."""
        variants = []
        for figures in self.variants:
            entry = asdict(figures) | {"fd_mean": figures.fd_mean, "verdict": speed_in_words(figures, self)}
            variants.append({key: _finite(value) for key, value in entry.items()})
        return {
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            "machine": self.machine,
            "seconds": self.seconds,
            "fd_seed_to_seed": self.fd_spread,
            "variants": variants,
            "notes": notes(self),
        }


def standard_deviation(values: list[float]) -> float | None:
    """The sample's standard deviation; None for fewer than 2 values."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def speed_in_words(figures: VariantFigures, result: DemoResult) -> str:
    """The ratio with its verdict: "0.80x: slower than fp32 here"."""
    base = result.baseline.name
    if figures is result.baseline:
        return "the yardstick"
    low, high = figures.speed_quartiles
    if abs(figures.speed - 1.0) <= SAME_SPEED:
        return f"{figures.speed:.2f}x: as fast as {base} here"
    if low < 1.0 < high:
        return f"{figures.speed:.2f}x: no clear difference from {base} here (rounds {low:.2f} to {high:.2f})"
    return f"{figures.speed:.2f}x: {'faster' if figures.speed > 1.0 else 'slower'} than {base} here"


def fd_in_words(figures: VariantFigures, result: DemoResult) -> str:
    """A variant's change of FD-digits against the spread that another seed alone makes."""
    base, spread = result.baseline, result.fd_spread
    if figures.fd_mean is None or base.fd_mean is None:
        return "too few images for FD-digits"
    change = figures.fd_mean - base.fd_mean
    if spread is None:
        return f"{signed(change)} against {base.name}; one seed only, so its spread is unknown"
    verdict = "within" if abs(change) <= spread else "beyond"
    return f"{signed(change)} against {base.name}: {verdict} its seed-to-seed spread of {spread:.1f}"


def signed(change: float) -> str:
    """A change with its sign, "+0.3" or "-0.3"; one that rounds to nothing has none: "0.0"."""
    text = f"{change:+.1f}"
    return "0.0" if float(text) == 0.0 else text


def notes(result: DemoResult) -> list[str]:
    """What a reader should know to judge the table, each in one sentence."""
    lines = []
    for figures in result.variants[1:]:
        lines.append(
            f"{figures.name}: {speed_in_words(figures, result)}; FD-digits {fd_in_words(figures, result)}."
        )
        if "fp32-exact" in figures.kernels:
            reason = next(
                (s["reason"] for s in figures.sites if s["kernel"] == "fp32-exact" and s["reason"]), ""
            )
            lines.append(f"{figures.name} computes its integers in fp32 GEMMs here: {reason}.")
    load, threads = result.machine.get("load_average"), result.machine.get("threads")
    if load and threads and load > 1.5 * threads:
        lines.append(
            f"The machine was busy with other work (load {load} on {threads} threads): times are rough."
        )
    if any(figures.speed < 1.0 + SAME_SPEED for figures in result.variants[1:]):
        lines.append(
            "This model is tiny (its linears have K=128 or 512), so quantizing the inputs costs about as much as "
            "the smaller products save; benchmarks/cpu.py times a block of DiT-XL's size."
        )
    count = result.settings["images_per_seed"]
    lines.append(
        f"FD-digits is no FID, and with {count} images a seed it reads high for every variant alike: compare it "
        "inside this table only."
    )
    return lines


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
