"""Which linears are planned together, and all that was seen of their input.

q, k and v read one value and share one quantize, so they get one multiplier, rotation and scale. A path that several
linears of one module share, or that reads different inputs in different graphs, joins all of these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from viditq_fx.calibration.ledger import InputKey, InputRecord
from viditq_fx.calibration.reservoir import Reservoir
from viditq_fx.calibration.sightings import WatchedLinear
from viditq_fx.calibration.statistics import Statistics, merged
from viditq_fx.calibration.timesteps import Bucket


@dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """Linears that get one plan."""

    sites: tuple[str, ...]
    """Paths, sorted."""
    linears: tuple[WatchedLinear, ...]
    inputs: tuple[InputRecord, ...]

    @property
    def depth(self) -> int | None:
        """K; None where linears of several K stand under one path, so that no transform fits all."""
        depths = {record.key.depth for record in self.inputs}
        return depths.pop() if len(depths) == 1 else None

    def at(self, bucket: Bucket, branch: int | None = None) -> Statistics:
        """Statistics of one bucket. `depth` must not be None."""
        return merged([record.at(bucket, branch) for record in self.inputs], self._depth())

    def whole(self) -> Statistics:
        """Statistics over all timesteps. `depth` must not be None."""
        return merged([record.whole() for record in self.inputs], self._depth())

    def largest(self, bucket: Bucket, multiplier_K: Tensor | None = None) -> float:
        """Largest magnitude in a bucket of the input, or of its product with a multiplier; 0 where no row came."""
        largest = 0.0
        for record in self.inputs:
            part = record.at(bucket)
            if part.count:
                amax = part.amax if multiplier_K is None else part.amax * multiplier_K.abs()
                largest = max(largest, float(amax.max()))
        return largest

    def reservoir(self) -> Reservoir:
        """Rows of all its inputs."""
        size = max((record.reservoir.size for record in self.inputs), default=0)
        whole = Reservoir(size=size)
        for record in self.inputs:
            whole.merge(record.reservoir)
        return whole

    def weight_amax(self) -> Tensor:
        """Largest magnitude of each input channel over all its weights, fp32 [K] on the CPU."""
        parts = [linear.matrix.abs().amax(0).to("cpu", torch.float32) for linear in self.linears]
        return torch.stack(parts).amax(0)

    def _depth(self) -> int:
        assert self.depth is not None
        return self.depth


def group_sites(inputs: dict[InputKey, InputRecord], linears: Iterable[WatchedLinear]) -> list[Group]:
    """Groups in order of their first path."""
    leader: dict[str, str] = {}

    def find(site: str) -> str:
        while leader.setdefault(site, site) != site:
            site = leader[site]
        return site

    for key in inputs:
        for site in key.sites[1:]:
            leader[find(site)] = find(key.sites[0])
    linears = list(linears)
    groups: dict[str, tuple[set[str], list[InputRecord]]] = {}
    for key, record in sorted(inputs.items()):
        sites, records = groups.setdefault(find(key.sites[0]), (set(), []))
        sites.update(key.sites)
        records.append(record)
    return [
        Group(
            sites=tuple(sorted(sites)),
            linears=tuple(linear for linear in linears if linear.fqn in sites),
            inputs=tuple(records),
        )
        for sites, records in sorted(groups.values(), key=lambda group: min(group[0]))
    ]
