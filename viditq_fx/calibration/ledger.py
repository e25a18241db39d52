"""Everything that calibration has seen so far, by input; as plain tensors it can be saved, sent and merged.

An input is what several linears read at once (q, k and v read one): it is counted once for all of them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from viditq_fx.calibration.positions import Positions
from viditq_fx.calibration.reservoir import Reservoir
from viditq_fx.calibration.statistics import Statistics, merged
from viditq_fx.calibration.timesteps import Bucket, Buckets
from viditq_fx.errors import RecipeError


class InputKey(NamedTuple):
    """Paths of the linears that read one value, sorted, and its number of channels K."""

    sites: tuple[str, ...]
    depth: int


@dataclass(eq=False, kw_only=True)
class InputRecord:
    """What is known of one input."""

    key: InputKey
    reservoir: Reservoir
    parts: dict[tuple[Bucket, int], Statistics] = field(default_factory=dict)
    """By bucket of timesteps and branch of the batch."""

    def at(self, bucket: Bucket, branch: int | None = None) -> Statistics:
        """Statistics of one bucket, of one branch or of all; of no rows where none came."""
        found = [s for (b, i), s in self.parts.items() if b is bucket and branch in (None, i)]
        return merged(found, self.key.depth)

    def whole(self) -> Statistics:
        """Statistics over all timesteps and branches."""
        return merged(list(self.parts.values()), self.key.depth)

    def grow(self, grew: Bucket, taken: Bucket) -> None:
        """Let one bucket take in another."""
        for bucket, branch in [key for key in self.parts if key[0] is taken]:
            part = self.parts.pop((bucket, branch))
            if (grew, branch) in self.parts:
                self.parts[grew, branch].merge(part)
            else:
                self.parts[grew, branch] = part


@dataclass(eq=False, kw_only=True)
class Ledger:
    """Counts rows as calls of the model bring them."""

    rows: int
    """Rows kept of each input."""
    seed: int
    branches: int
    buckets: Buckets
    positions: Positions | None = None
    """Given where every input has to have one number of positions."""
    inputs: dict[InputKey, InputRecord] = field(default_factory=dict)
    calls: int = 0
    _time: float | None = None
    _bucket: Bucket | None = None
    _sample: int = 0
    _call: int = 0
    _seen: dict[InputKey, int] = field(default_factory=dict)
    _expected: dict[InputKey, InputRecord] = field(default_factory=dict)
    """Inputs that no call has shown yet: the graph that has them may fail before."""
    _ready: dict[tuple[InputKey, int], Statistics] = field(default_factory=dict)

    def begin_sample(self, index: int) -> None:
        """What follows belongs to the sample of this index."""
        self._sample, self._call = index, 0

    def begin_call(self, timestep: float | None) -> None:
        """What follows belongs to a call at this timestep."""
        self._bucket, merge = self.buckets.find(timestep)
        if merge is not None:
            self._grow(*merge)
        self._time, self._seen = timestep, {}
        self._call += 1
        self.calls += 1
        self._prepare()

    def _prepare(self) -> None:
        """Make what this call will keep while no activations are there: see kept.py."""
        places = [(self._bucket, branch) for branch in range(self.branches)]
        self._ready = {
            (key, branch): Statistics.empty(key.depth, next(iter(record.parts.values())).low.device)
            for key, record in self.inputs.items()
            for bucket, branch in places
            if record.parts and (bucket, branch) not in record.parts
        }

    def expect(self, key: InputKey, dtype: torch.dtype, device: torch.device) -> None:
        """Make what will be kept of an input before the first activations are there: see kept.py."""
        record = self.inputs.get(key) or self._expected.setdefault(key, self._new(key))
        record.reservoir.reserve(key.depth, dtype, device)
        for branch in range(self.branches):
            if (self._bucket, branch) not in record.parts:
                self._ready[key, branch] = Statistics.empty(key.depth, device)

    def see(self, key: InputKey, x: Tensor) -> None:
        """Count an input [..., K] of the call.

        Raises RecipeError where it has no `branches` equal parts, or other positions than before where those count.
        """
        assert self._bucket is not None, "a graph ran outside of a call"
        record = self._record(key)
        x_MK = x.detach().reshape(-1, key.depth)
        if not x_MK.shape[0]:
            return
        if self.positions is not None:
            self.positions.see(key, x)
        if x_MK.shape[0] % self.branches:
            raise RecipeError(
                f"calibrate: site {key.sites[0]!r} reads {x_MK.shape[0]} rows, which are no {self.branches} equal "
                "branches; use branches=1"
            )
        for branch, part in enumerate(x_MK.chunk(self.branches)):
            place = self._bucket, branch
            known = record.parts.get(place)
            # Counted before an interruption, or before the model moved.
            if known is not None and known.low.device != x.device:
                record.parts[place] = merged([known], key.depth, x.device)
            if place not in record.parts:
                ready = self._ready.pop((key, branch), None)
                if ready is None or ready.low.device != x.device:
                    ready = Statistics.empty(key.depth, x.device)
                record.parts[place] = ready
            record.parts[place].add(part)
        if self.rows:
            occurrence = self._seen[key] = self._seen.get(key, 0) + 1
            identity = (self.seed, key.sites, key.depth, self._sample, self._call, occurrence)
            record.reservoir.add(x_MK, self._time, *identity)

    def _record(self, key: InputKey) -> InputRecord:
        if key not in self.inputs:
            self.inputs[key] = self._expected.pop(key, None) or self._new(key)
        return self.inputs[key]

    def _new(self, key: InputKey) -> InputRecord:
        return InputRecord(key=key, reservoir=Reservoir(size=self.rows))

    def _grow(self, grew: Bucket, taken: Bucket) -> None:
        for record in self.inputs.values():
            record.grow(grew, taken)

    def dump(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(plain JSON values, tensors on the CPU) that `absorb` takes."""
        tensors: dict[str, Tensor] = {}
        inputs = []
        for index, record in enumerate(self.inputs.values()):
            parts = []
            for number, ((bucket, branch), part) in enumerate(record.parts.items()):
                parts.append([self.buckets.items.index(bucket), branch])
                tensors |= {f"{index}.{number}.{name}": value for name, value in part.tensors()}
            kept = record.reservoir
            rows = kept.rows_RK
            if rows is not None:
                tensors[f"{index}.rows"] = rows.cpu()
                tensors[f"{index}.keys"] = torch.tensor(kept.keys, dtype=torch.float64)
                tensors[f"{index}.timesteps"] = torch.tensor(kept.timesteps, dtype=torch.float64)
            inputs.append({"sites": record.key.sites, "depth": record.key.depth, "parts": parts})
        meta = {
            "buckets": [[b.low, b.high] for b in self.buckets.items],
            "timed": self.buckets.timed,
            "calls": self.calls,
            "inputs": inputs,
        }
        return json.loads(json.dumps(meta)), tensors

    def absorb(self, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Count what another ledger dumped: of another rank, or of this one before an interruption.

        Raises KeyError, TypeError, ValueError or IndexError for what no ledger dumps, RecipeError where only one
        of the two has timesteps.
        """
        timed = self.buckets.timed
        if timed is not None and meta["timed"] is not None and timed != meta["timed"]:
            raise RecipeError("calibrate: calls have a timestep on some ranks and none on others")
        self.buckets.timed = meta["timed"] if timed is None else timed
        theirs = [Bucket(float(low), float(high)) for low, high in meta["buckets"]]
        self.buckets.items += theirs
        self.calls += int(meta["calls"])
        for index, entry in enumerate(meta["inputs"]):
            record = self._record(InputKey(tuple(entry["sites"]), int(entry["depth"])))
            for number, (bucket, branch) in enumerate(entry["parts"]):
                prefix = f"{index}.{number}."
                named = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                record.parts[theirs[bucket], int(branch)] = Statistics.of_tensors(named, record.key.depth)
            if f"{index}.rows" in tensors:
                keys, times = tensors[f"{index}.keys"].tolist(), tensors[f"{index}.timesteps"].tolist()
                rows = tensors[f"{index}.rows"]
                record.reservoir.merge(Reservoir.of_rows(self.rows, keys, times, rows))
        for grew, taken in self.buckets.settle():
            self._grow(grew, taken)

    def clear(self) -> None:
        """Forget everything that was counted."""
        self.inputs, self.calls, self.buckets = {}, 0, Buckets(limit=self.buckets.limit)

    def problem(self) -> str | None:
        """What makes these statistics useless, if anything does."""
        for record in self.inputs.values():
            whole = record.whole()
            if not math.isfinite(float(whole.amax.max())) or not bool(torch.isfinite(whole.square).all()):
                return (
                    f"site {record.key.sites[0]!r} reads NaN or infinity, and no linear's weight holds any; check the "
                    "samples, and the model in full precision, first"
                )
        return None
