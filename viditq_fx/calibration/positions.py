"""How many positions a token has at each site, where scales are by position: one number, or an error."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from viditq_fx.errors import RecipeError
from viditq_fx.ops.static_scale import positions_of

if TYPE_CHECKING:
    from viditq_fx.calibration.ledger import InputKey


@dataclass(eq=False)
class Positions:
    """The number of positions S of each input x [..., S, K] that came."""

    known: dict[InputKey, int] = field(default_factory=dict)

    def see(self, key: InputKey, x: Tensor) -> int:
        """S of this input. Raises RecipeError where it was another before."""
        size = positions_of(x)
        known = self.known.setdefault(key, size)
        if known != size:
            raise mixed_positions(key.sites, (known, size))
        return size


def mixed_positions(sites: Sequence[str], sizes: Collection[int]) -> RecipeError:
    """The error of linears that get one plan and read sequences of several lengths."""
    told = " and ".join(map(str, sorted(sizes)))
    others = f" (planned with {', '.join(sites[1:])})" if sites[1:] else ""
    return RecipeError(
        f"calibrate: site {sites[0]!r}{others} reads sequences of {told} tokens, and a '-position' scheme has one "
        "scale for each position: calibrate at one resolution, number of frames and text length, or choose a scheme "
        "with '-static' or with scales found at run time"
    )
