"""Try a balance and a rotation on real rows: how far is the quantized linear from the true one?

    error = sqrt(mean over linears of  ||X W^T - Q(X') Q(W')^T||^2 / ||X W^T||^2)      X', W' as in ops/rotate.py

Computed by the dialect's own ops, so integers, grids, groups and blocks count as they will run. Of a wide linear a part
of its output channels is tried.

Shapes: x_RK [R, K] kept rows; w_NK [N, K], of all linears side by side where they can be; m_AK [A, K] multipliers of A
candidates; T ranges of the timestep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from viditq_fx.calibration.groups import Group
from viditq_fx.calibration.timesteps import range_of
from viditq_fx.ops.linear import without_autocast
from viditq_fx.ops.quantize import EPS
from viditq_fx.ops.rotate import rotate, transform_weight
from viditq_fx.ops.static_scale import QUANTIZE_STATIC
from viditq_fx.ops.weight_forms import (
    Multiplier,
    Stored,
    linear_in_scheme,
    quantize_input,
    quantize_weight,
    split_weight,
)
from viditq_fx.scheme import QuantScheme, largest_int

TRIED_CHANNELS = 256
"""Most output channels of a linear that are tried, evenly spread."""
TRIED_AT_ONCE = 1 << 19
"""Most weights that are transformed and quantized in one call, of all candidates together: 4 MB in fp64."""


class Trial:
    """The rows and weights of one group, ready to be tried. The group's K must be one."""

    def __init__(self, group: Group, scheme: QuantScheme, edges: tuple[float, ...] = ()) -> None:
        kept = group.reservoir()
        assert kept.rows_RK is not None, "calibration keeps rows wherever it searches"
        self._scheme = scheme
        device = group.linears[0].matrix.device
        # Static scales belong to ranges of the timestep; without edges there is one.
        ranges = [range_of(edges, t) if t == t else 0 for t in kept.timesteps]
        self._range_R, self._ranges = torch.tensor(ranges, device=device), len(edges) + 1
        self._x_RK = kept.rows_RK.to(device, torch.float32)
        tried = (spread_rows(linear.matrix, TRIED_CHANNELS) for linear in group.linears)
        weights = [w_NK.to(device, torch.float32) for w_NK in tried]
        self._widths = [w_NK.shape[0] for w_NK in weights]
        # Side by side, as one linear: rows of weights are quantized each for itself. Not so a low-rank branch.
        self._weights = weights if scheme.weight_form.rank else [torch.cat(weights)]
        with without_autocast(self._x_RK):
            self._truth_RN = torch.cat([self._x_RK @ w_NK.t() for w_NK in weights], dim=-1)

    def errors(self, candidates: Sequence[tuple[Tensor | None, int]]) -> list[float]:
        """The module's formula for each (multiplier, rotation), 0 where nothing is lost."""
        at_once = max(1, TRIED_AT_ONCE // max(w_NK.numel() for w_NK in self._weights))
        found: list[float] = []
        for rotation, same in groupby(candidates, key=lambda candidate: candidate[1]):
            multipliers = [multiplier for multiplier, _ in same]
            for first in range(0, len(multipliers), at_once):
                found += self._tried(multipliers[first : first + at_once], rotation)
        return found

    def _tried(self, multipliers: Sequence[Tensor | None], rotation: int) -> list[float]:
        ones_K = self._x_RK.new_ones(self._x_RK.shape[-1])
        m_AK = torch.stack([ones_K if m_K is None else m_K.to(ones_K) for m_K in multipliers])
        stored = [self._stored(w_NK, m_AK, rotation) for w_NK in self._weights]
        outputs: list[Tensor] = []
        for q_RK, scale, *weights in zip(*self._quantized(m_AK, rotation), *stored, strict=True):
            parts = [
                linear_in_scheme(self._scheme, self._x_RK, q_RK, scale, weight, None, torch.float32)
                for weight in weights
            ]
            outputs.append(torch.cat(parts, dim=-1))
        lost_AN = (torch.stack(outputs) - self._truth_RN).square().sum(1)
        truth_N = self._truth_RN.square().sum(0)
        lost, whole = (
            torch.stack([part.sum(-1) for part in of.split(self._widths, dim=-1)], dim=-1)
            for of in (lost_AN, truth_N)
        )
        return (lost / whole.clamp(min=EPS)).mean(-1).sqrt().tolist()

    def _stored(self, w_NK: Tensor, m_AK: Tensor, rotation: int) -> list[Stored]:
        """What each candidate stores of a weight."""
        form = self._scheme.weight_form
        if form.rank:
            forms = (replace(form, rotation=rotation, multiplier=Multiplier.of(m_K)) for m_K in m_AK)
            return [quantize_weight(w_NK, one) for one in forms]
        # One call for all of them: much of what a candidate costs is the calls themselves.
        balanced = (w_NK.to(torch.float64) / m_AK.to(torch.float64).unsqueeze(1)).flatten(0, 1)
        return split_weight(quantize_weight(transform_weight(balanced, None, rotation), form), len(m_AK))

    def _quantized(self, m_AK: Tensor, rotation: int) -> tuple[Tensor, Tensor]:
        """Integers [A, R, K] and scales of the rows; the largest at hand stands for a static range.

        By position it is the largest of all rows, which do not know theirs. What is lost lies between that and a scale
        for each row; a scale by position has to hold all steps and samples, so what differs by step, as most does in
        such models, is lost to it as to one scale. Scales for each row would not weigh that at all.
        """
        x_ARK = self._x_RK * m_AK.unsqueeze(1)
        if not self._scheme.calibrated:
            return quantize_input(x_ARK, self._scheme, None, rotation)
        rotated_ARK = rotate(x_ARK, None, rotation)
        largest_AT = rotated_ARK.new_zeros(len(m_AK), self._ranges)
        range_AR = self._range_R.expand(len(m_AK), -1)
        largest_AT.scatter_reduce_(1, range_AR, rotated_ARK.abs().amax(-1), "amax")
        scale_AT = largest_AT.clamp(min=EPS) / largest_int(self._scheme.input_bits)
        # A scale for each row: all ranges and candidates in one call, however many there are.
        scale = scale_AT.gather(1, range_AR).flatten()
        q, scale = QUANTIZE_STATIC.overload(rotated_ARK.flatten(0, 1), scale, self._scheme.input_bits)
        return q.unflatten(0, range_AR.shape), scale.unflatten(0, range_AR.shape)


def spread_rows(w_NK: Tensor, rows: int | None) -> Tensor:
    """At most `rows` rows of a weight, evenly spread from the first to the last; all of them for None."""
    width = w_NK.shape[0]
    if rows is None or width <= rows:
        return w_NK
    at_R = torch.linspace(0, width - 1, rows, device=w_NK.device).round().to(torch.int64)
    return w_NK[at_R]
