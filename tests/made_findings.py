"""Findings made by hand, as `collect` would return them: what each site reads is known, so numbers can be too."""

import torch

from viditq_fx.calibration.findings import Findings
from viditq_fx.calibration.groups import Group
from viditq_fx.calibration.ledger import InputKey, InputRecord
from viditq_fx.calibration.reservoir import Reservoir
from viditq_fx.calibration.sightings import WatchedLinear
from viditq_fx.calibration.statistics import Statistics
from viditq_fx.calibration.timesteps import Bucket, Buckets

EARLY, LATE = Bucket(10.0, 20.0), Bucket(900.0, 900.0)


def made_findings(inputs, weights):
    """`inputs`: sites -> (rows at timesteps 10 to 20, rows at 900), each [M, K]; `weights`: site -> [N, K]."""
    groups = []
    for sites, rows in inputs.items():
        record = InputRecord(key=InputKey(sites, rows[0].shape[1]), reservoir=Reservoir(size=0))
        for bucket, rows_MK in zip((EARLY, LATE), rows, strict=True):
            record.parts[bucket, 0] = Statistics.empty(rows_MK.shape[1])
            record.parts[bucket, 0].add(rows_MK)
        linears = tuple(
            WatchedLinear(fqn=site, role="other", parameter=f"{site}.weight", weight=weights[site])
            for site in sites
        )
        groups.append(Group(sites=sites, linears=linears, inputs=(record,)))
    return Findings(
        groups=tuple(groups),
        buckets=Buckets(limit=20, items=[EARLY, LATE], timed=True),
        timestep="timestep",
        shapes={},
        refused={},
        unseen=(),
        samples=1,
        calls=3,
    )


def loud_channel(depth, channel, gain):
    """Four rows of ones, but for one channel."""
    rows_MK = torch.ones(4, depth)
    rows_MK[:, channel] = gain
    return rows_MK
