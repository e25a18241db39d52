"""What each unit alone does to each metric: measured once, saved, looked at, allocated from as often as one likes."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from viditq_fx.calibration.units import Unit
from viditq_fx.errors import RecipeError
from viditq_fx.recipe_fields import Fields
from viditq_fx.whole_file import write_whole

FORMAT, VERSION = "viditq_fx.sensitivity", 1
_MOST_ROWS = 400
"""Of a picture: more are no longer told apart."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SensitivityTable:
    """Losses of a model, one unit at a time and one group at a time; 0 is full precision."""

    schemes: tuple[str, ...]
    """Candidates, from few bits to many."""
    metrics: tuple[str, ...]
    units: tuple[Unit, ...]
    losses: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Name of a unit -> scheme -> metric -> loss with this unit alone in integers, all else in full precision."""
    errors: Mapping[str, float]
    """Group -> sum (y - r)^2 / sum r^2, y drawn with the whole group at the first scheme, r in full precision."""
    left: Mapping[str, str] = field(default_factory=dict)
    """Site -> why it is in no unit: its plan stays what the recipe says."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """What was asked for: model, recipe, seed; plain JSON values."""

    def groups(self) -> tuple[str, ...]:
        """Names of the groups, sorted."""
        return tuple(sorted({unit.group for unit in self.units}))

    def loss(self, unit: Unit, scheme: str) -> float:
        """The loss of a unit alone by its own group's metric. Raises RecipeError for what was not measured."""
        try:
            return self.losses[unit.name][scheme][unit.group]
        except KeyError as error:
            raise RecipeError(
                f"the table has no {unit.group!r} loss of unit {unit.name!r} at {scheme!r}; it has schemes "
                f"{', '.join(self.schemes)} and metrics {', '.join(self.metrics)}: measure it to the end"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as one JSON file, whole or not at all; its folder is made. Raises RecipeError where that fails."""
        file = Path(path)
        document = {
            "format": FORMAT,
            "version": VERSION,
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
                    "losses": {
                        scheme: dict(found) for scheme, found in self.losses.get(unit.name, {}).items()
                    },
                }
                for unit in self.units
            ],
        }
        text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, text.encode("utf-8", "surrogatepass"))
        except OSError as error:
            raise RecipeError(f"cannot write the table {file}: {error.strerror or error}") from error
        return file

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
        if fields.get("format", str, None) != FORMAT or fields.get("version", int, None) != VERSION:
            raise RecipeError(
                f"{file}: is no table of sensitivities of version {VERSION}; delete it to measure anew"
            )
        names = ("format", "version", "schemes", "metrics", "request", "errors", "left", "units")
        fields.only(*names)
        read = [_read_unit(fields, entry) for entry in fields.list_of("units", dict)]
        units = tuple(unit for unit, _ in read)
        if len({site for unit in units for site in unit.sites}) < sum(len(unit.sites) for unit in units):
            raise fields.error("a site stands in two units")
        return cls(
            schemes=tuple(fields.list_of("schemes", str)),
            metrics=tuple(fields.list_of("metrics", str)),
            units=units,
            losses={unit.name: losses for unit, losses in read},
            errors=_numbers(fields, "errors"),
            left=fields.get("left", dict, {}),
            request=fields.get("request", dict, {}),
        )

    def plot(self, path: str | os.PathLike[str], scheme: str | None = None) -> Path:
        """Write a heat map (PNG): a row a unit, a column a metric, each column relative to its largest loss.

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


def _read_unit(table: Fields, entry: Any) -> tuple[Unit, dict[str, dict[str, float]]]:
    fields = _Table(f"{table.where}: unit", entry)
    fields.only("sites", "shapes", "group", "losses")
    sites, shapes = tuple(fields.list_of("sites", str)), fields.list_of("shapes", list)
    fits = all(len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape) for shape in shapes)
    if not sites or len(sites) != len(shapes) or not fits:
        raise fields.error("'shapes' are [N, K], one for each of 'sites'")
    by_scheme = _Table(f"{fields.where} {sites[0]!r}: losses", fields.get("losses", dict))
    losses = {scheme: _numbers(by_scheme, scheme) for scheme, _ in by_scheme.items()}
    unit = Unit(sites=sites, shapes=tuple((n, k) for n, k in shapes), group=fields.get("group", str))
    return unit, losses


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
    rows = [
        [table.losses.get(u.name, {}).get(scheme, {}).get(m, math.nan) for m in table.metrics] for u in units
    ]
    peaks = [
        max((abs(row[i]) for row in rows if row[i] == row[i]), default=0.0) for i in range(len(table.metrics))
    ]
    shares = [[value / (peak or 1.0) for value, peak in zip(row, peaks, strict=True)] for row in rows]
    height = 1.4 + 0.2 * len(units)
    figure = Figure(figsize=(5.5 + 1.3 * len(table.metrics), height), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="magma", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(table.metrics)), _titles(table.metrics, peaks), fontsize=8)
    axes.set_yticks(range(len(units)), [_label(unit) for unit in units], fontsize=6)
    for row, unit in enumerate(units):
        if unit.group in table.metrics:
            place = (table.metrics.index(unit.group) - 0.5, row - 0.5)
            axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="#39c", linewidth=1.5))
    axes.set_title(f"Loss with one unit alone at {scheme}; framed: what decides", fontsize=9)
    figure.colorbar(image, ax=axes, label="of the column's largest")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _titles(metrics: Sequence[str], peaks: Sequence[float]) -> list[str]:
    return [f"{metric}\n(1 = {peak:.3g})" for metric, peak in zip(metrics, peaks, strict=True)]


def _label(unit: Unit) -> str:
    more = f" + {len(unit.sites) - 1}" if len(unit.sites) > 1 else ""
    return f"{unit.name[-48:] or '(root)'}{more}"
