"""What rounding alone does to each weight, before and after BGR, before and after rotation; no data is needed.

    error = ||W' - Q(W')||_F^2 / ||W||_F^2        W' = W, or W R (ops/rotate.py; R is orthonormal, so ||W'|| = ||W||)

Q is an asymmetric grid for each row: its minimum and maximum, or those refined by BGR (DVD-Quant section 3.2). Of a
wide linear some rows are measured, evenly spread: rows have grids of their own, so these stand for all.

Shapes: w_NK [N, K].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from viditq_fx.calibration.findings import Findings
from viditq_fx.calibration.trial import spread_rows
from viditq_fx.ops.bgr import Refinement
from viditq_fx.ops.grid import dequantize_weight_grid, fit_weight_grid
from viditq_fx.ops.packed_weights import is_released
from viditq_fx.ops.rotate import rotation_block, transform_weight

MEASURED_ROWS = 256
"""Most output channels of a linear that are measured: BGR takes a second of one core for 5 million weights."""


@dataclass(frozen=True, kw_only=True)
class WeightErrors:
    """Relative squared errors of one site's weights, see the module; of all of them where it has several."""

    site: str
    bits: int
    minmax: float
    bgr: float
    rotation: int
    """Block in which K is rotated; 1 where K allows none, and then the rotated errors are the plain ones."""
    rotated_minmax: float
    rotated_bgr: float


def weight_errors(
    findings: Findings, *, bits: int = 4, rows: int | None = MEASURED_ROWS
) -> tuple[WeightErrors, ...]:
    """The errors of every site's weights at `bits`, by path; `rows` None measures all rows of each.

    Sites whose weights are released are left out: nothing is left to measure. Raises ValueError for bits outside 2..8.
    """
    entries: dict[str, WeightErrors] = {}
    for group in findings.groups:
        for site in group.sites:
            linears = [linear for linear in group.linears if linear.fqn == site]
            if linears and not any(is_released(linear.weight) for linear in linears):
                entries[site] = _entry(site, [spread_rows(linear.matrix, rows) for linear in linears], bits)
    return tuple(entries[site] for site in sorted(entries))


def _entry(site: str, weights: list[Tensor], bits: int) -> WeightErrors:
    block = min(rotation_block(w_NK.shape[1]) for w_NK in weights)
    whole = sum(float(w_NK.double().square().sum()) for w_NK in weights)
    turned = [transform_weight(w_NK, None, block) for w_NK in weights] if block > 1 else weights

    def error(of: list[Tensor], refinement: Refinement | None) -> float:
        lost = sum(_squared_error(w_NK, bits, refinement) for w_NK in of)
        return lost / whole if whole else 0.0

    minmax, bgr = (error(weights, refinement) for refinement in (None, Refinement()))
    rotated = (
        tuple(error(turned, refinement) for refinement in (None, Refinement()))
        if block > 1
        else (minmax, bgr)
    )
    return WeightErrors(
        site=site,
        bits=bits,
        minmax=minmax,
        bgr=bgr,
        rotation=block,
        rotated_minmax=rotated[0],
        rotated_bgr=rotated[1],
    )


def _squared_error(w_NK: Tensor, bits: int, refinement: Refinement | None) -> float:
    q_NK, scale, zero = fit_weight_grid(w_NK, bits, 0, refinement)
    near_NK = dequantize_weight_grid(q_NK, scale, zero, 0, torch.float32)
    return float((near_NK.double() - w_NK.double()).square().sum())
