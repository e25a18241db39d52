"""What calibration decides, by site: schemes, balance, rotation, static input scales; see docs/recipe_format.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from viditq_fx.scheme import QuantScheme


@dataclass(frozen=True, kw_only=True, eq=False)
class SitePlan:
    """How one linear y = x W^T (+ bias) with x [..., K], W [N, K] is to run.

    x' = rotate(x * multiplier),  W' = rotate(W / multiplier):  x' W'^T = x W^T, and x', W' are quantized
    """

    scheme: QuantScheme | None
    """None: the site stays in full precision."""
    multiplier: Tensor | None = None
    """fp32 [K], finite and nonzero: 1 / s of channel balancing (ViDiT-Q section 4.2) times the signs of a rotation."""
    rotation: int = 1
    """Block of the Hadamard rotation, a power of 4 that divides K; 1 is none."""
    input_scale: Tensor | None = None
    """fp32, of x' / its integers: [] for a static range, [T] for T ranges of the timestep; None: found at run time."""
    reason: str | None = None
    """Why this was chosen, for the report."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """SitePlans by module path (that of `named_modules()`), and what holds for all of them."""

    scheme: QuantScheme
    """For sites that `sites` does not name; the policy decides which of those are quantized."""
    sites: Mapping[str, SitePlan] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()
    """T - 1 increasing timesteps between the T ranges of `input_scale`, in the units of the model's own argument.
    A call belongs to range i where i edges are at or below its (largest) timestep."""
    timestep: str | None = None
    """Name of the argument of the model's forward that holds the timestep."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Model class, samples, versions, options: plain JSON values."""
