"""Try a balance and a rotation on real rows: how far is the quantized linear from the true one?

    error = sqrt(mean over linears of  ||X W^T - Q(X') Q(W')^T||^2 / ||X W^T||^2)      X', W' as in ops/rotate.py

Q is what the dialect's own ops store, so integers, grids and groups count as they will run. Of a wide linear a part of
its output channels is tried.

Shapes: x_RK [R, K] kept rows; w_NK [N, K].
"""

from __future__ import annotations

import torch
from torch import Tensor

from viditq_fx.calibration.groups import Group
from viditq_fx.calibration.timesteps import range_of
from viditq_fx.ops.quantize import EPS
from viditq_fx.ops.rotate import rotate, transform_weight
from viditq_fx.ops.weight_forms import dequantize_weight, quantize_input, quantize_weight
from viditq_fx.scheme import QuantScheme, WeightForm, largest_int

TRIED_CHANNELS = 256
"""Most output channels of a linear that are tried, evenly spread."""


class Trial:
    """The rows and weights of one group, ready to be tried. The group's K must be one."""

    def __init__(self, group: Group, scheme: QuantScheme, edges: tuple[float, ...] = ()) -> None:
        kept = group.reservoir()
        assert kept.rows_RK is not None, "calibration keeps rows wherever it searches"
        self._scheme = scheme
        device = group.linears[0].matrix.device
        self._x_RK = kept.rows_RK.to(device, torch.float32)
        ranges = [range_of(edges, t) if t == t else 0 for t in kept.timesteps]
        self._ranges = torch.tensor(ranges, device=device)
        self._weights = [_part(linear.matrix).to(device, torch.float32) for linear in group.linears]
        self._truths = [self._x_RK @ w_NK.t() for w_NK in self._weights]

    def error(self, multiplier_K: Tensor | None, rotation: int) -> float:
        """The module's formula, 0 where nothing is lost."""
        if multiplier_K is not None:
            multiplier_K = multiplier_K.to(self._x_RK.device)
        x_RK = self._rounded_input(rotate(self._x_RK, multiplier_K, rotation))
        total = 0.0
        for w_NK, truth in zip(self._weights, self._truths, strict=True):
            moved = transform_weight(w_NK, multiplier_K, rotation)
            y = x_RK @ rounded_weight(moved, self._scheme.weight_form).t()
            total += float((y - truth).square().sum() / truth.square().sum().clamp(min=EPS))
        return (total / len(self._weights)) ** 0.5

    def _rounded_input(self, x_RK: Tensor) -> Tensor:
        if not self._scheme.calibrated:
            q_RK, scale = quantize_input(x_RK, self._scheme)
            if self._scheme.block is not None:
                scale = scale.repeat_interleave(self._scheme.block, dim=-1)[..., : q_RK.shape[-1]]
            return q_RK.to(torch.float32) * scale
        # Static: the range of the rows at hand stands for the one that calibration will give.
        largest_T = torch.zeros(int(self._ranges.max()) + 1, device=x_RK.device)
        largest_T.scatter_reduce_(0, self._ranges, x_RK.abs().amax(-1), "amax")
        if self._scheme.input_range == "static":
            largest_T = largest_T.amax().expand_as(largest_T)
        qmax = largest_int(self._scheme.input_bits)
        scale_R1 = (largest_T[self._ranges].clamp(min=EPS) / qmax).unsqueeze(-1)
        return (x_RK / scale_R1).round().clamp(-qmax, qmax) * scale_R1


def rounded_weight(w_NK: Tensor, form: WeightForm) -> Tensor:
    """What is left of a weight [N, K] once it is stored in a form, fp32."""
    return dequantize_weight(quantize_weight(w_NK, form), w_NK.shape[1], form, torch.float32)


def _part(w_NK: Tensor) -> Tensor:
    step = max(1, w_NK.shape[0] // TRIED_CHANNELS)
    return w_NK[::step][:TRIED_CHANNELS]
