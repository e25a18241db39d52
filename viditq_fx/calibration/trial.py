"""Try a balance and a rotation on real rows: how far is the quantized linear from the true one?

    error = sqrt(mean over linears of  ||X W^T - Q(X') Q(W')^T||^2 / ||X W^T||^2)      X', W' as in ops/rotate.py

Computed by the dialect's own ops, so integers, grids, groups and blocks count as they will run. Of a wide linear a part
of its output channels is tried.

Shapes: x_RK [R, K] kept rows; w_NK [N, K].
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from viditq_fx.calibration.groups import Group
from viditq_fx.calibration.timesteps import range_of
from viditq_fx.ops.linear import without_autocast
from viditq_fx.ops.quantize import EPS
from viditq_fx.ops.rotate import rotate
from viditq_fx.ops.static_scale import QUANTIZE_STATIC
from viditq_fx.ops.weight_forms import Multiplier, linear_in_scheme, quantize_input, quantize_weight
from viditq_fx.scheme import QuantScheme, largest_int

TRIED_CHANNELS = 256
"""Most output channels of a linear that are tried, evenly spread."""


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
        self._weights = [w_NK.to(device, torch.float32) for w_NK in tried]
        with without_autocast(self._x_RK):
            self._truths = [self._x_RK @ w_NK.t() for w_NK in self._weights]

    def error(self, multiplier_K: Tensor | None, rotation: int) -> float:
        """The module's formula, 0 where nothing is lost."""
        key = None if multiplier_K is None else Multiplier.of(multiplier_K)
        form = replace(self._scheme.weight_form, rotation=rotation, multiplier=key)
        q_RK, scale = self._quantized(multiplier_K, rotation)
        total = 0.0
        for w_NK, truth in zip(self._weights, self._truths, strict=True):
            stored = quantize_weight(w_NK, form)
            y = linear_in_scheme(self._scheme, self._x_RK, q_RK, scale, stored, None, torch.float32)
            total += float((y - truth).square().sum() / truth.square().sum().clamp(min=EPS))
        return (total / len(self._weights)) ** 0.5

    def _quantized(self, multiplier_K: Tensor | None, rotation: int) -> tuple[Tensor, Tensor]:
        """Integers and scales of the rows; the largest of those at hand stands for a static range.

        By position it is the largest of all rows, which do not know theirs. What is lost lies between that and a scale
        for each row; a scale by position has to hold all steps and samples, so what differs by step, as most does in
        such models, is lost to it as to one scale. Scales for each row would not weigh that at all.
        """
        if multiplier_K is not None:
            multiplier_K = multiplier_K.to(self._x_RK.device)
        if not self._scheme.calibrated:
            return quantize_input(self._x_RK, self._scheme, multiplier_K, rotation)
        rotated_RK = rotate(self._x_RK, multiplier_K, rotation)
        largest_T = rotated_RK.new_zeros(self._ranges)
        largest_T.scatter_reduce_(0, self._range_R, rotated_RK.abs().amax(-1), "amax")
        scale_T = largest_T.clamp(min=EPS) / largest_int(self._scheme.input_bits)
        # A scale for each row: all ranges in one call, however many there are.
        return QUANTIZE_STATIC.overload(rotated_RK, scale_T[self._range_R], self._scheme.input_bits)


def spread_rows(w_NK: Tensor, rows: int | None) -> Tensor:
    """At most `rows` rows of a weight, evenly spread from the first to the last; all of them for None."""
    width = w_NK.shape[0]
    if rows is None or width <= rows:
        return w_NK
    at_R = torch.linspace(0, width - 1, rows, device=w_NK.device).round().to(torch.int64)
    return w_NK[at_R]
