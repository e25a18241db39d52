"""Static input scales: the largest |x'| that a site reads over qmax, of all timesteps, by range of them or by position.

x' = rotate(x * multiplier). Without a rotation the largest of all rows, or of a range's, follows from the channels' own
ranges. With one it does not, and what each position of a token reads follows from neither: then the samples are run a
second time, and the rows of x' are looked at.

Shapes: x [..., S, K], rows x_MK [M, K]; largest and scale [T] for T ranges of the timestep, [S] for S positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from viditq_fx.calibration.balance import Transform
from viditq_fx.calibration.groups import Group
from viditq_fx.calibration.ledger import InputKey
from viditq_fx.calibration.positions import Positions, mixed_positions
from viditq_fx.calibration.statistics import cached_rows
from viditq_fx.calibration.timesteps import Bucket, range_of
from viditq_fx.errors import RecipeError
from viditq_fx.ops.quantize import EPS
from viditq_fx.ops.rotate import rotate
from viditq_fx.scheme import QuantScheme, largest_int


@dataclass(eq=False, kw_only=True)
class TransformedRanges:
    """Hears the second run: max|x'| of every input that has a transform here, fp32 [T], or [S] by position."""

    transforms: Mapping[InputKey, Transform]
    edges: tuple[float, ...]
    by_position: bool = False
    largest: dict[InputKey, Tensor] = field(default_factory=dict)
    _positions: Positions = field(default_factory=Positions)
    _range: int = 0

    def begin_call(self, timestep: float | None) -> None:
        """What follows belongs to a call at this timestep."""
        self._range = range_of(self.edges, timestep)

    def expect(self, key: InputKey, dtype: torch.dtype, device: torch.device) -> None:
        """A number or a row of them for each input: no room to make."""

    def see(self, key: InputKey, x: Tensor) -> None:
        """Look at an input [..., S, K] of the call. Raises RecipeError where positions count and S differs."""
        transform = self.transforms.get(key)
        if transform is None or not x.numel():
            return
        if self.by_position:
            positions = self._positions.see(key, x)
            largest_S = self._rows(key, x, transform).reshape(-1, positions).amax(0)
            known = self.largest.get(key)
            self.largest[key] = largest_S if known is None else torch.maximum(known, largest_S)
            return
        if key not in self.largest:
            self.largest[key] = torch.zeros(len(self.edges) + 1, device=x.device)
        ranges = self.largest[key]
        ranges[self._range] = torch.maximum(ranges[self._range], self._rows(key, x, transform).amax())

    def _rows(self, key: InputKey, x: Tensor, transform: Transform) -> Tensor:
        """max|x'| of each row of x, fp32 [M]."""
        multiplier = None if transform.multiplier is None else transform.multiplier.to(x.device)
        x_MK = x.detach().reshape(-1, key.depth)
        # Piece by piece: a rotated fp32 copy of the widest input would be the run's largest activation.
        pieces = (rotate(part, multiplier, transform.rotation) for part in cached_rows(x_MK))
        return torch.cat([torch.maximum(part.amax(-1), -part.amin(-1)) for part in pieces])


def static_scale(
    group: Group,
    transform: Transform,
    scheme: QuantScheme,
    buckets: Sequence[Bucket],
    again: Mapping[InputKey, Tensor],
) -> Tensor:
    """fp32 scales of a group's x': one for all ([]), one for each bucket ([T]) or one for each position ([S]).

    `again`: what the second run found. A bucket unseen, or a position of zeros alone, has the largest of all.
    Raises RecipeError where the second run did not show the site, or its linears read sequences of several lengths.
    """
    if transform.rotation > 1 or scheme.input_range == "position":
        found = [again[record.key].cpu() for record in group.inputs if record.key in again]
        if not found:
            raise RecipeError(
                f"calibrate: site {group.sites[0]!r} was not reached when the samples were run again for its static "
                "range: they have to make the same calls each time"
            )
        sizes = {len(largest) for largest in found}
        if len(sizes) > 1:
            raise mixed_positions(group.sites, sizes)
        largest_T = torch.stack(found).amax(0)
    else:
        largest_T = torch.tensor([group.largest(bucket, transform.multiplier) for bucket in buckets])
    largest_T = torch.where(largest_T > 0, largest_T, largest_T.amax()).clamp(min=EPS)
    scale_T = largest_T / largest_int(scheme.input_bits)
    return scale_T.amax() if scheme.input_range == "static" else scale_T
