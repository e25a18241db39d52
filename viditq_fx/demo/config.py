"""What a run of the demo is asked for, checked before anything slow starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from viditq_fx.errors import ViditqError
from viditq_fx.scheme import QuantScheme

DEFAULT_IMAGES, DEFAULT_STEPS = 200, 20
"""What two idle CPU cores do for three variants in less than three minutes, compilation included."""
QUICK_IMAGES, QUICK_STEPS = 40, 10
SEED_COUNTS = (4, 3, 2)
"""Into how many seeds the images are split, the first that divides them evenly."""
LARGEST_BATCH = 50
"""Most images per model call; guidance doubles the rows."""
MIN_IMAGES_PER_SEED = 10
"""Fewest images of one seed: one of each digit."""


class DemoError(ViditqError):
    """The demo was asked for something that it cannot do."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Everything that decides a run's figures, apart from the machine."""

    out: Path = Path("viditq-demo")
    """Folder of the results; made when missing."""
    images: int = DEFAULT_IMAGES
    """Images that every variant draws, over all seeds."""
    steps: int = DEFAULT_STEPS
    """Sampling steps from noise to image."""
    seed: int = 0
    """First seed; the others follow it."""
    schemes: tuple[str, ...] = ()
    """Schemes to compare with full precision; empty for those that fit the device."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": CUDA where there is one."""
    timing_rounds: int = 12
    """Rounds of the timing: each times one step of every variant, in turn."""
    command: str = ""
    """The command line, for the record."""

    def __post_init__(self) -> None:
        for name in ("images", "steps", "timing_rounds"):
            value = getattr(self, name)
            if value < 1:
                raise DemoError(f"--{name.replace('_', '-')} {value}: give a whole number from 1 up")
        if not 0 <= self.seed < 2**63:
            raise DemoError(f"--seed {self.seed}: give a whole number from 0 to 2^63 - 1")
        if self.device not in {"auto", "cpu", "cuda"}:
            raise DemoError(f"--device {self.device}: choose auto, cpu or cuda")
        for scheme in self.schemes:
            QuantScheme.parse(scheme)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds: several when the images split evenly, so that their spread can be told."""
        for count in SEED_COUNTS:
            if self.images % count == 0 and self.images // count >= MIN_IMAGES_PER_SEED:
                return tuple(range(self.seed, self.seed + count))
        return (self.seed,)

    @property
    def images_per_seed(self) -> int:
        """Images of one seed, the same number for every seed."""
        return self.images // len(self.seeds)

    @property
    def batch_size(self) -> int:
        """Images per model call: the even split of a seed's images, so that padding is least."""
        calls = -(-self.images_per_seed // LARGEST_BATCH)
        return -(-self.images_per_seed // calls)


def parse_schemes(text: str) -> tuple[str, ...]:
    """Read "w8a8,w8a7" into names, each once.

    Raises SchemeError for an unknown scheme and DemoError for none at all.
    """
    names = [str(QuantScheme.parse(part)) for part in text.split(",") if part.strip()]
    if not names:
        raise DemoError(f"--schemes {text!r}: give at least one, e.g. w8a8,w8a7")
    return tuple(dict.fromkeys(names))
