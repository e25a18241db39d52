"""What each unit alone does to each metric: measured once, saved, looked at, allocated from as often as one likes."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from viditq_fx.calibration.units import Unit
from viditq_fx.errors import RecipeError
from viditq_fx.recipe_fields import Fields
from viditq_fx.timestep import range_names
from viditq_fx.whole_file import write_whole

FORMAT, VERSION, WITH_RANGES = "viditq_fx.sensitivity", 1, 2
"""A table in ranges of the timestep is of another version, so that nobody reads its losses as those of all steps."""
_MOST_ROWS = 400
"""Of a picture: more are no longer told apart."""

Losses = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Name of a unit -> scheme -> metric -> loss with this unit alone in integers, all else in full precision."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SensitivityTable:
    """Losses of a model, one unit at a time and one group at a time; 0 is full precision."""

    schemes: tuple[str, ...]
    """Candidates, from few bits to many."""
    metrics: tuple[str, ...]
    units: tuple[Unit, ...]
    losses: Losses
    """With a unit in integers in all steps; empty where it was measured in ranges."""
    errors: Mapping[str, float]
    """Group -> sum (y - r)^2 / sum r^2, y drawn with the whole group at the first scheme, r in full precision."""
    left: Mapping[str, str] = field(default_factory=dict)
    """Site -> why it is in no unit: its plan stays what the recipe says."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """What was asked for: model, recipe, seed; plain JSON values."""
    edges: tuple[float, ...] = ()
    """R - 1 rising timesteps between R ranges; a call is in range i where i of them are at or below its timestep."""
    calls: tuple[int, ...] = ()
    """How many calls of a run lie in each range; () without ranges."""
    timestep: str | None = None
    """The argument of the model's forward that the ranges are of."""
    in_ranges: tuple[Losses, ...] = ()
    """With a unit in integers only in the calls of each range; () without ranges."""

    @property
    def parts(self) -> tuple[Losses, ...]:
        """The losses of each range, or those of all steps as one."""
        return self.in_ranges or (self.losses,)

    def with_losses(self, name: str, part: int, found: Mapping[str, Mapping[str, float]]) -> SensitivityTable:
        """The table with a unit's losses of one of `parts` put in."""
        parts = list(self.parts)
        parts[part] = {**parts[part], name: found}
        return replace(self, in_ranges=tuple(parts)) if self.in_ranges else replace(self, losses=parts[0])

    def groups(self) -> tuple[str, ...]:
        """Names of the groups, sorted."""
        return tuple(sorted({unit.group for unit in self.units}))

    def loss(self, unit: Unit, scheme: str, part: int = 0) -> float:
        """The loss of a unit alone by its own group's metric, in one of `parts`.

        Raises RecipeError for what was not measured.
        """
        try:
            return self.parts[part][unit.name][scheme][unit.group]
        except KeyError as error:
            where = f" in range {part} of the timestep" if self.edges else ""
            raise RecipeError(
                f"the table has no {unit.group!r} loss of unit {unit.name!r} at {scheme!r}{where}; it has schemes "
                f"{', '.join(self.schemes)} and metrics {', '.join(self.metrics)}: measure it to the end"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as one JSON file, whole or not at all; its folder is made. Raises RecipeError where that fails."""
        file = Path(path)
        document = {
            "format": FORMAT,
            "version": WITH_RANGES if self.edges else VERSION,
            "schemes": list(self.schemes),
            "metrics": list(self.metrics),
            "request": dict(self.request),
            "errors": dict(self.errors),
            "left": dict(self.left),
            "units": [
                {
                    "sites": list(unit.sites),
                    "shapes": [list(shape) for shape in unit.shapes],
                    "group": unit.group,
                    "losses": self._written(unit),
                }
                for unit in self.units
            ],
        }
        if self.edges:
            document |= {"edges": list(self.edges), "calls": list(self.calls), "timestep": self.timestep}
        text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, text.encode("utf-8", "surrogatepass"))
        except OSError as error:
            raise RecipeError(f"cannot write the table {file}: {error.strerror or error}") from error
        return file

    def _written(self, unit: Unit) -> Any:
        found = [
            {scheme: dict(values) for scheme, values in losses.get(unit.name, {}).items()}
            for losses in self.parts
        ]
        return found if self.edges else found[0]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SensitivityTable:
        """Read what `save` wrote, complete or not. Raises RecipeError, naming the file, for anything else."""
        file = Path(path)
        try:
            document = json.loads(file.read_bytes().decode())
        except OSError as error:
            raise RecipeError(f"{file}: cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise RecipeError(
                f"{file}: is no table of sensitivities ({error}); delete it to measure anew"
            ) from error
        fields = _Table(str(file), document)
        version = fields.get("version", int, None)
        if fields.get("format", str, None) != FORMAT or version not in (VERSION, WITH_RANGES):
            raise RecipeError(
                f"{file}: is no table of sensitivities of version {VERSION} or {WITH_RANGES}; delete it to measure anew"
            )
        names = ("format", "version", "schemes", "metrics", "request", "errors", "left", "units")
        fields.only(*names, *(("edges", "calls", "timestep") if version == WITH_RANGES else ()))
        edges, calls = _read_ranges(fields, version)
        read = [_read_unit(fields, entry, len(calls)) for entry in fields.list_of("units", dict)]
        units = tuple(unit for unit, _ in read)
        if len({site for unit in units for site in unit.sites}) < sum(len(unit.sites) for unit in units):
            raise fields.error("a site stands in two units")
        parts = [{u.name: losses[part] for u, losses in read} for part in range(len(calls) or 1)]
        return cls(
            schemes=tuple(fields.list_of("schemes", str)),
            metrics=tuple(fields.list_of("metrics", str)),
            units=units,
            losses={} if edges else parts[0],
            errors=_numbers(fields, "errors"),
            left=fields.get("left", dict, {}),
            request=fields.get("request", dict, {}),
            edges=edges,
            calls=calls,
            timestep=fields.get("timestep", str) if edges else None,
            in_ranges=tuple(parts) if edges else (),
        )

    def plot(self, path: str | os.PathLike[str], scheme: str | None = None) -> Path:
        """Write a heat map (PNG): a row a unit, a column a metric, or a metric in a range of the timestep.

        Each metric is drawn relative to its largest loss, that of all ranges.

        scheme: which candidate is drawn; by default the one of fewest bits. The cell that decides is framed.
        Raises RecipeError for a scheme that was not measured, ImportError without matplotlib.
        """
        drawn = self.schemes[0] if scheme is None else scheme
        if drawn not in self.schemes:
            raise RecipeError(
                f"plot: scheme {drawn!r} was not measured; choose one of {', '.join(self.schemes)}"
            )
        write_whole(Path(path), _heat_map(self, drawn))
        return Path(path)


class _Table(Fields):
    def error(self, problem: str) -> RecipeError:
        return RecipeError(f"{self.where}: {problem}; delete it to measure anew")


def _read_ranges(fields: Fields, version: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """(edges between ranges, calls in each); both empty in a table without ranges."""
    if version == VERSION:
        return (), ()
    edges, calls = fields.rising("edges"), tuple(fields.list_of("calls", int))
    if not edges or len(calls) != len(edges) + 1 or min(calls) < 1:
        raise fields.error("'calls' are numbers above 0, one for each range that 'edges' separate")
    return edges, calls


def _read_unit(table: Fields, entry: Any, ranges: int) -> tuple[Unit, list[dict[str, dict[str, float]]]]:
    """A unit and its losses: a list of one where there are no ranges (0)."""
    fields = _Table(f"{table.where}: unit", entry)
    fields.only("sites", "shapes", "group", "losses")
    sites, shapes = tuple(fields.list_of("sites", str)), fields.list_of("shapes", list)
    fits = all(len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape) for shape in shapes)
    if not sites or len(sites) != len(shapes) or not fits:
        raise fields.error("'shapes' are [N, K], one for each of 'sites'")
    unit = Unit(sites=sites, shapes=tuple((n, k) for n, k in shapes), group=fields.get("group", str))
    written = fields.list_of("losses", dict) if ranges else [fields.get("losses", dict)]
    if len(written) != (ranges or 1):
        raise fields.error(f"{sites[0]!r}: 'losses' are a list, one for each of {ranges} ranges")
    parts = [_Table(f"{fields.where} {sites[0]!r}: losses", part) for part in written]
    return unit, [{scheme: _numbers(part, scheme) for scheme, _ in part.items()} for part in parts]


def _numbers(fields: Fields, name: str) -> dict[str, float]:
    inner = _Table(f"{fields.where}: {name}", fields.get(name, dict))
    found = {key: float(inner.get(key, float)) for key, _ in inner.items()}
    if not all(map(math.isfinite, found.values())):
        raise fields.error(f"{name!r} holds NaN or infinity")
    return found


def _heat_map(table: SensitivityTable, scheme: str) -> bytes:
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError(
            "the heat map is drawn by matplotlib, which cannot be imported; run: pip install viditq_fx[mixed]"
        ) from error
    units = sorted(table.units, key=lambda unit: (unit.group, unit.name))[:_MOST_ROWS]
    columns = [(metric, part) for metric in table.metrics for part in range(len(table.parts))]
    rows = [
        [table.parts[part].get(u.name, {}).get(scheme, {}).get(metric, math.nan) for metric, part in columns]
        for u in units
    ]
    largest: dict[str, float] = {}
    for row in rows:
        for (metric, _), value in zip(columns, row, strict=True):
            largest[metric] = max(largest.get(metric, 0.0), abs(value) if value == value else 0.0)
    peaks = [largest.get(metric, 0.0) for metric, _ in columns]
    shares = [[value / (peak or 1.0) for value, peak in zip(row, peaks, strict=True)] for row in rows]
    height = 1.4 + 0.2 * len(units)
    figure = Figure(figsize=(5.5 + 1.3 * len(columns), height), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="magma", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(columns)), _titles(table, columns, peaks), fontsize=8)
    axes.set_yticks(range(len(units)), [_label(unit) for unit in units], fontsize=6)
    for row, unit in enumerate(units):
        if unit.group in table.metrics:
            place = (columns.index((unit.group, 0)) - 0.5, row - 0.5)
            axes.add_patch(Rectangle(place, len(table.parts), 1, fill=False, edgecolor="#39c", linewidth=1.5))
    axes.set_title(f"Loss with one unit alone at {scheme}; framed: what decides", fontsize=9)
    figure.colorbar(image, ax=axes, label="of the column's largest")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _titles(table: SensitivityTable, columns: Sequence[tuple[str, int]], peaks: Sequence[float]) -> list[str]:
    names = [f"{metric}\n(1 = {peak:.3g})" for (metric, _), peak in zip(columns, peaks, strict=True)]
    if not table.edges:
        return names
    ranges = range_names(table.edges)
    return [f"{name}\n{ranges[part]}" for name, (_, part) in zip(names, columns, strict=True)]


def _label(unit: Unit) -> str:
    more = f" + {len(unit.sites) - 1}" if len(unit.sites) > 1 else ""
    return f"{unit.name[-48:] or '(root)'}{more}"
