"""What a layer of `quantize_` is made by: its plan, complete and fitting, and the form that packs its weight."""

from __future__ import annotations

from dataclasses import replace

from viditq_fx.errors import RecipeError
from viditq_fx.ops.rotate import rotation_block
from viditq_fx.ops.weight_forms import Multiplier, Stored
from viditq_fx.recipe import SitePlan
from viditq_fx.scheme import QuantScheme, WeightForm

Packed = dict[tuple[int, WeightForm], Stored]
"""Packed weights by the parameter's id and by what it was packed to: plans of tied weights may differ."""


def complete_plan(scheme: QuantScheme | SitePlan, depth: int, name: str) -> SitePlan:
    """The plan of a layer of K = `depth`: a scheme's own rotation where no recipe has decided one.

    Raises RecipeError for a plan that does not fit, or that is to stay in full precision.
    """
    if isinstance(scheme, QuantScheme):
        plan = SitePlan(scheme=scheme, rotation=rotation_block(depth) if scheme.rotate else 1)
    else:
        plan = scheme
    if plan.scheme is None:
        raise RecipeError(f"{name}: the recipe keeps this layer in full precision")
    if plan.multiplier is not None and tuple(plan.multiplier.shape) != (depth,):
        raise RecipeError(
            f"{name}: the recipe's multiplier is {tuple(plan.multiplier.shape)}, the layer has K={depth}"
        )
    if depth % plan.rotation:
        raise RecipeError(
            f"{name}: the recipe rotates blocks of {plan.rotation}, which do not divide K={depth}"
        )
    if plan.scheme.calibrated and plan.input_scale is None:
        raise RecipeError(
            f"{name}: scheme {str(plan.scheme)!r} takes its input's scale from calibration: pass a recipe of "
            "viditq_fx.calibrate(model, run, scheme=...)"
        )
    wanted = 0 if plan.scheme.input_range == "static" else 1
    if plan.scheme.calibrated and plan.input_scale is not None and plan.input_scale.dim() != wanted:
        raise RecipeError(
            f"{name}: the recipe's input_scale is {tuple(plan.input_scale.shape)}; scheme {str(plan.scheme)!r} takes "
            f"{'one number, ()' if wanted == 0 else 'a vector'}"
        )
    return plan


def form_of(plan: SitePlan) -> WeightForm:
    """What the weight of a planned site is packed to."""
    assert plan.scheme is not None
    multiplier = None if plan.multiplier is None else Multiplier.of(plan.multiplier)
    return replace(plan.scheme.weight_form, rotation=plan.rotation, multiplier=multiplier)
