"""Static input scales: the largest |x'| that each site reads, over all timesteps or by range of them, over qmax.

x' = rotate(x * multiplier). Without a rotation max|x'| follows from the channels' own ranges; with one it does not,
so the samples are run a second time, and the rotated rows are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from viditq_fx.calibration.balance import Transform
from viditq_fx.calibration.groups import Group
from viditq_fx.calibration.ledger import InputKey
from viditq_fx.calibration.statistics import cached_rows
from viditq_fx.calibration.timesteps import Bucket, range_of
from viditq_fx.errors import RecipeError
from viditq_fx.ops.quantize import EPS
from viditq_fx.ops.rotate import rotate
from viditq_fx.scheme import QuantScheme, largest_int


@dataclass(eq=False, kw_only=True)
class RotatedRanges:
    """Hears the second run: max|x'| of every rotated input, fp32 [T] for T ranges of the timestep."""

    transforms: Mapping[InputKey, Transform]
    edges: tuple[float, ...]
    largest: dict[InputKey, Tensor] = field(default_factory=dict)
    _range: int = 0

    def begin_call(self, timestep: float | None) -> None:
        """What follows belongs to a call at this timestep."""
        self._range = range_of(self.edges, timestep)

    def see(self, key: InputKey, x: Tensor) -> None:
        """Look at an input [..., K] of the call."""
        transform = self.transforms.get(key)
        if transform is None or not x.numel():
            return
        multiplier = None if transform.multiplier is None else transform.multiplier.to(x.device)
        x_MK = x.detach().reshape(-1, key.depth)
        # Piece by piece: a rotated fp32 copy of the widest input would be the run's largest activation.
        pieces = (rotate(part, multiplier, transform.rotation) for part in cached_rows(x_MK))
        largest = torch.stack([torch.maximum(part.amax(), -part.amin()) for part in pieces]).amax()
        if key not in self.largest:
            self.largest[key] = torch.zeros(len(self.edges) + 1, device=x.device)
        ranges = self.largest[key]
        ranges[self._range] = torch.maximum(ranges[self._range], largest)


def static_scale(
    group: Group,
    transform: Transform,
    scheme: QuantScheme,
    buckets: Sequence[Bucket],
    rotated: Mapping[InputKey, Tensor],
) -> Tensor:
    """fp32 scales of a group's x', one for all ([]) or one for each bucket ([T]); a bucket unseen has the largest.

    Raises RecipeError where the samples' second run did not show the site.
    """
    if transform.rotation > 1:
        found = [rotated[record.key].cpu() for record in group.inputs if record.key in rotated]
        if not found:
            raise RecipeError(
                f"calibrate: site {group.sites[0]!r} was not reached when the samples were run again for its static "
                "range: they have to make the same calls each time"
            )
        largest_T = torch.stack(found).amax(0)
    else:
        largest_T = torch.tensor([group.largest(bucket, transform.multiplier) for bucket in buckets])
    largest_T = torch.where(largest_T > 0, largest_T, largest_T.amax()).clamp(min=EPS)
    scale_T = largest_T / largest_int(scheme.input_bits)
    return scale_T if scheme.input_range == "timestep" else scale_T.amax()
