"""`viditq calibrate`: what it runs, and what it prints."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from viditq_fx.errors import RecipeError

if TYPE_CHECKING:
    from viditq_fx.recipe import Recipe


def run_calibration(target: str, out: Path, *, samples: int, steps: int, options: dict[str, Any]) -> None:
    """Calibrate, write the recipe, and say what was decided. Raises ViditqError for a user's mistake."""
    options["balance"] = _alpha(options["balance"])
    _check(out, options)
    console = Console(stderr=True)
    with console.status(f"loading {target} ..."):
        from viditq_fx.calibration.run import calibrate
        from viditq_fx.cli.target import load_sampling

        loaded = load_sampling(target, samples, steps, options["seed"])
    recipe = calibrate(loaded.model, loaded.run, progress=True, **options)
    folder = recipe.save(out)
    shown = Console()
    shown.print(_table(recipe))
    for line in _summary(recipe):
        shown.print(line, markup=False, highlight=False, soft_wrap=True)
    shown.print(f"Written to {folder}", markup=False, highlight=False, soft_wrap=True)


def _alpha(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _check(out: Path, options: dict[str, Any]) -> None:
    """Tell what is wrong before the imports and the model."""
    from viditq_fx.calibration.options import read_options

    rest = {name: value for name, value in options.items() if name not in _READ}
    rest.pop("resume")
    read_options(**{name: options[name] for name in _READ}, **rest)
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out {out}: is a file; give a folder")


_READ = ("scheme", "keep", "balance", "rotation")


def _table(recipe: Recipe) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("site", overflow="fold", ratio=2)
    table.add_column("scheme", no_wrap=True)
    table.add_column("why", overflow="fold", ratio=3)
    for path, plan in recipe.sites.items():
        table.add_row(Text(path or "(root)"), str(plan.scheme or "full precision"), Text(plan.reason or ""))
    return table


def _summary(recipe: Recipe) -> list[str]:
    kinds = Counter(
        {
            (False, False): "neither",
            (True, False): "balanced",
            (False, True): "rotated",
            (True, True): "both",
        }[plan.multiplier is not None, plan.rotation > 1]
        for plan in recipe.sites.values()
    )
    told, found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())), recipe.provenance
    lines = [
        f"{len(recipe.sites)} sites: {told}; {found['samples']} samples, {found['calls']} calls of the model"
    ]
    if found["timesteps"]:
        low, high = found["timesteps"][0][0], found["timesteps"][-1][1]
        lines.append(
            f"{found['timestep']} went from {low:g} to {high:g}, in {len(found['timesteps'])} ranges"
        )
    return lines
