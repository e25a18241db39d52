"""What calibration decides, by site: schemes, balance, rotation, static input scales; see docs/recipe_format.md."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from viditq_fx.errors import RecipeError
from viditq_fx.recipe_fields import Fields
from viditq_fx.recipe_file import JSON_FILE, WITH_RANGES, read_recipe, write_recipe
from viditq_fx.scheme import QuantScheme
from viditq_fx.site import site_of_module


@dataclass(frozen=True, kw_only=True, eq=False)
class SitePlan:
    """How one linear y = x W^T (+ bias) with x [..., K], W [N, K] is to run.

    x' = rotate(x * multiplier),  W' = rotate(W / multiplier):  x' W'^T = x W^T, and x', W' are quantized
    """

    scheme: QuantScheme | None
    """None: the site stays in full precision. Where `by_range` has several, the first of them."""
    multiplier: Tensor | None = None
    """fp32 [K], finite and nonzero: 1 / s of channel balancing (ViDiT-Q section 4.2) times the signs of a rotation."""
    rotation: int = 1
    """Block of the Hadamard rotation, a power of 4 that divides K; 1 is none."""
    input_scale: Tensor | None = None
    """fp32, of x' / its integers: [] for a static range, [T] for T ranges of the timestep, [S] for the S positions of a
    token in its sequence (x [..., S, K]; 1 where x is [B, K]); None: found at run time."""
    reason: str | None = None
    """Why this was chosen, for the report."""
    by_range: tuple[QuantScheme, ...] = ()
    """The scheme in each range that Recipe.range_edges parts the timestep into; (): `scheme` in all. All else is the
    same in every range, but that a scheme without -rot is not rotated, and fp8 takes no multiplier either."""

    def in_range(self, index: int) -> SitePlan:
        """The plan of the calls of one range: one that has one scheme."""
        if not self.by_range:
            return self
        scheme = self.by_range[index]
        return replace(
            self,
            scheme=scheme,
            by_range=(),
            rotation=self.rotation if scheme.rotate else 1,
            multiplier=None if scheme.floating else self.multiplier,
        )

    def range_problem(self, ranges: int) -> str | None:
        """What is wrong with `by_range` in a recipe of so many ranges; None if nothing."""
        if not self.by_range:
            return None
        if len(self.by_range) != ranges:
            return (
                f"names {len(self.by_range)} schemes by range of the timestep, and there are {ranges} ranges"
            )
        if self.by_range[0] != self.scheme:
            return f"has the scheme {self.scheme}, but {self.by_range[0]} in the first range of the timestep"
        if self.rotation == 1 and any(scheme.rotate for scheme in self.by_range):
            return "names schemes with -rot, and no rotation"
        kinds = {(s.input_range, s.calibrated and (s.input_bits, s.rotate)) for s in self.by_range}
        if len(kinds) > 1:
            told = ", ".join(map(str, self.by_range))
            return f"names {told}: calibrated input scales are of one width of integers, for all ranges or for none"
        return None


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
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """(N, K) of every linear that calibration saw, those in full precision too; what `check` compares."""
    range_edges: tuple[float, ...] = ()
    """R - 1 increasing timesteps between the R ranges of SitePlan.by_range (ViDiT-Q section 4.3); as `edges`."""

    def __post_init__(self) -> None:
        rises = all(a < b for a, b in pairwise(self.range_edges))
        if not rises or not all(map(math.isfinite, self.range_edges)):
            raise RecipeError(f"range_edges={self.range_edges!r}: give finite timesteps in rising order")
        for path, plan in self.sites.items():
            problem = plan.range_problem(self.ranges)
            if problem is not None:
                raise RecipeError(f"the plan of site {path!r} {problem}")

    @property
    def ranges(self) -> int:
        """How many ranges of the timestep have schemes of their own; 1 is none."""
        return len(self.range_edges) + 1

    def at_range(self, index: int) -> Recipe:
        """The recipe of the calls of one range, without ranges. Raises RecipeError for a range that there is not."""
        if not 0 <= index < self.ranges:
            raise RecipeError(f"at_range({index}): the recipe has ranges 0 to {self.ranges - 1}")
        plans = {path: plan.in_range(index) for path, plan in self.sites.items()}
        return replace(self, sites=plans, range_edges=())

    def with_inputs_of(self, scheme: QuantScheme) -> Recipe:
        """The same plans with the input bits of `scheme`: weights, balance and rotation stay as they are.

        Raises RecipeError, naming the site, for input scales from calibration: they are those of other bits; and for
        ranges of the timestep, each of which is a recipe of its own (`at_range`).
        """
        if self.ranges > 1:
            raise RecipeError("with_inputs_of: the recipe has ranges of the timestep; take at_range(i) first")
        sites: dict[str, SitePlan] = {}
        for path, plan in self.sites.items():
            own = plan.scheme
            if own is not None and own.calibrated:
                raise RecipeError(
                    f"{path}: its input scale comes from calibration for {own}, so its bits cannot change from step to "
                    "step; calibrate for a scheme without -static, -timestep and -position"
                )
            if own is not None and not own.floating:
                own = replace(own, input_bits=scheme.input_bits)
            sites[path] = replace(plan, scheme=own)
        return replace(self, scheme=scheme, sites=sites)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write recipe.json and recipe.safetensors into a folder (docs/recipe_format.md), which is made.

        Raises RecipeError where they cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        names: dict[int, str] = {}
        sites: dict[str, Any] = {}
        for path, plan in sorted(self.sites.items()):
            entry: dict[str, Any] = {"scheme": None if plan.scheme is None else str(plan.scheme)}
            if plan.by_range:
                entry = {"schemes": [str(scheme) for scheme in plan.by_range]}
            if plan.rotation != 1:
                entry["rotation"] = plan.rotation
            if plan.reason is not None:
                entry["reason"] = plan.reason
            for name in ("multiplier", "input_scale"):
                value = getattr(plan, name)
                if value is not None:  # sites that share a tensor share it in the file
                    entry[name] = names.setdefault(id(value), f"{path}:{name}")
                    tensors[entry[name]] = value.detach().cpu()
            sites[path] = entry
        document = {
            "scheme": str(self.scheme),
            "keep": list(self.keep),
            "edges": list(self.edges),
            "timestep": self.timestep,
            "sites": sites,
            "shapes": {path: list(shape) for path, shape in self.shapes.items()},
            "provenance": dict(self.provenance),
        }
        if self.range_edges:
            document |= {"version": WITH_RANGES, "range_edges": list(self.range_edges)}
        return write_recipe(folder, document, tensors)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Recipe:
        """Read what `save` wrote. Raises RecipeError, naming the file, for anything that `save` would not write."""
        document, tensors = read_recipe(folder)
        fields = Fields(str(Path(folder) / JSON_FILE), document)
        ranged = fields.get("version", int) == WITH_RANGES
        fields.only(*_FIELDS, *(("range_edges",) if ranged else ()))
        scheme = fields.scheme("scheme", required=True)
        assert scheme is not None
        edges, range_edges = fields.rising("edges"), fields.rising("range_edges")
        if ranged and not range_edges:
            raise fields.error("'range_edges' part the timestep into ranges, and there are none")
        sites = Fields(f"{fields.where}: sites", fields.get("sites", dict))
        return cls(
            scheme=scheme,
            sites={
                path: _read_plan(sites, path, entry, tensors, len(edges) + 1, len(range_edges) + 1)
                for path, entry in sites.items()
            },
            keep=tuple(fields.list_of("keep", str)),
            edges=edges,
            timestep=fields.get("timestep", str, None),
            provenance=fields.get("provenance", dict, {}),
            shapes=_read_shapes(Fields(f"{fields.where}: shapes", fields.get("shapes", dict, {}))),
            range_edges=range_edges,
        )

    def check(self, model: nn.Module, *, strict: bool = True) -> RecipeFit:
        """Compare the recipe with a model's linears by path and shape.

        Raises RecipeError, listing all that does not fit, where a site is missing or reshaped, and under `strict`
        also where the model has linears that calibration never saw.
        """
        named = {site_of_module(path).fqn: module for path, module in model.named_modules()}
        expected = {path: self.shapes.get(path) for path in {*self.sites, *self.shapes}}
        missing = sorted(path for path in expected if path not in named)
        reshaped = {
            path: (shape, _shapes_of(named[path]))
            for path, shape in sorted(expected.items())
            if path in named and shape is not None and shape not in _shapes_of(named[path])
        }
        extra = [path for path, m in sorted(named.items()) if _is_linear(m) and path not in expected]
        fit = RecipeFit(missing=tuple(missing), extra=tuple(extra), reshaped=reshaped)
        if missing or reshaped or (strict and extra):
            raise RecipeError(f"the recipe does not fit this {type(model).__name__}:\n{fit}")
        return fit


@dataclass(frozen=True, kw_only=True)
class RecipeFit:
    """How a recipe and a model differ; empty where they do not."""

    missing: tuple[str, ...] = ()
    """Linears of the recipe that the model has not."""
    extra: tuple[str, ...] = ()
    """Linears of the model that calibration did not see."""
    reshaped: Mapping[str, tuple[tuple[int, int], tuple[tuple[int, int], ...]]] = field(default_factory=dict)
    """Path -> ((N, K) of the recipe, (N, K) of what the model has there)."""

    def __str__(self) -> str:
        lines = [f"  {path}: the model has no such module" for path in self.missing]
        lines += [
            f"  {path}: [N, K] = {list(was)} in the recipe, {' or '.join(map(str, map(list, now))) or 'none'} here"
            for path, (was, now) in self.reshaped.items()
        ]
        lines += [f"  {path}: calibration never saw this linear" for path in self.extra]
        return "\n".join(lines) or "  nothing differs"


_FIELDS = ("format", "version", "tensors_sha256", "scheme", "keep", "edges", "timestep", "sites", "shapes")
_FIELDS += ("provenance",)


def _read_plan(
    sites: Fields, path: str, entry: Any, tensors: Mapping[str, Tensor], scales: int, ranges: int
) -> SitePlan:
    """`scales`: ranges of the timestep that input scales are of; `ranges`: that schemes are of."""
    fields = Fields(f"{sites.where}: {path!r}", entry)
    fields.only(
        "scheme" if "schemes" not in entry else "schemes", "rotation", "reason", "multiplier", "input_scale"
    )
    by_range = fields.schemes("schemes") if "schemes" in entry else ()
    scheme = by_range[0] if by_range else fields.scheme("scheme", required=False)
    rotation = fields.get("rotation", int, 1)
    multiplier, scale = fields.tensor("multiplier", tensors), fields.tensor("input_scale", tensors)
    if rotation < 1 or rotation & (rotation - 1) or rotation.bit_length() % 2 == 0:
        raise fields.error(f"'rotation' is a power of 4, not {rotation}")
    if multiplier is not None:
        if multiplier.dim() != 1 or not multiplier.numel():
            raise fields.error(f"'multiplier' is one number for each channel, not {tuple(multiplier.shape)}")
        if bool((multiplier == 0).any()):
            raise fields.error("'multiplier' holds 0: a weight is divided by it")
        if multiplier.numel() % rotation:
            raise fields.error(
                f"blocks of 'rotation' {rotation} do not divide the {multiplier.numel()} channels"
            )
    problem = _scale_problem(scheme, scale, scales)
    if problem is not None:
        raise fields.error(problem)
    if scale is not None and bool((scale <= 0).any()):
        raise fields.error("'input_scale' is above 0")
    plan = SitePlan(
        scheme=scheme,
        multiplier=multiplier,
        rotation=rotation,
        input_scale=scale,
        reason=fields.get("reason", str, None),
        by_range=by_range,
    )
    problem = plan.range_problem(ranges)
    if problem is not None:
        raise fields.error(problem)
    return plan


def _scale_problem(scheme: QuantScheme | None, scale: Tensor | None, ranges: int) -> str | None:
    """What is wrong with the shape of a site's input scales under its scheme; None if nothing."""
    kind = "dynamic" if scheme is None else scheme.input_range
    found = None if scale is None else tuple(scale.shape)
    if kind == "position":
        fits = scale is not None and scale.dim() == 1 and scale.numel() > 0
        wanted = "one number or more, one for each position"
    else:
        wanted = {"dynamic": None, "static": (), "timestep": (ranges,)}[kind]
        fits = found == wanted
    return None if fits else f"'input_scale' has shape {found}; scheme {scheme} with these edges has {wanted}"


def _read_shapes(fields: Fields) -> dict[str, tuple[int, int]]:
    shapes = {path: tuple(fields.list_of(path, int)) for path, _ in fields.items()}
    for path, shape in shapes.items():
        if len(shape) != 2 or min(shape) < 1:
            raise fields.error(f"{path!r} is [N, K], two numbers above 0, not {list(shape)}")
    return shapes  # type: ignore[return-value]


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return set(module.kernel_size) == {1} and module.groups == 1
    return isinstance(module, nn.Linear) or hasattr(module, "in_features")


def _shapes_of(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """(N, K) of the matrices that a module itself holds, packed ones too."""
    own = [(p.shape[0], p[0].numel()) for p in module.parameters(recurse=False) if p.dim() > 1 and p.numel()]
    width, depth = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(width, int) and isinstance(depth, int):
        own.append((width, depth))
    return tuple(dict.fromkeys(own))
