"""The demo's results as files: table.json, and report.html that needs nothing beside itself."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from typing import Any

from viditq_fx.demo.result import DemoResult, notes
from viditq_fx.demo.table import COLUMNS, cells


def render_json(result: DemoResult) -> str:
    """All figures, settings, versions and hardware as JSON text."""
    return json.dumps(result.to_dict(), indent=1, ensure_ascii=False) + "\n"


def render_html(result: DemoResult, grid_png: bytes) -> str:
    """One HTML page with the table, the picture as a data URI, the sites, and what each number means.

    Raises ImportError when jinja2 is not installed.
    """
    import jinja2

    source = resources.files("viditq_fx.demo") / "templates" / "report.html.j2"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    schemes = [figures for figures in result.variants if figures.scheme is not None]
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        columns=COLUMNS,
        rows=cells(result),
        notes=notes(result),
        settings=result.settings,
        machine=result.machine,
        seconds=result.seconds,
        grid=base64.b64encode(grid_png).decode(),
        schemes=[{"name": figures.name, "sites": site_rows(figures.sites)} for figures in schemes],
    )


@dataclass(kw_only=True)
class SiteRow:
    """Sites that share role, shape and outcome, e.g. the same linear of every block."""

    names: list[str]
    role: str
    shape: str
    outcome: str
    kernel: str
    weight: str
    reason: str


def site_rows(sites: list[dict[str, Any]]) -> list[SiteRow]:
    """Rows of the sites table: blocks repeat, so sites alike but for the block's number are one row."""

    def key(site: dict[str, Any]) -> tuple[str, ...]:
        name = ".".join("*" if part.isdigit() else part for part in site["fqn"].split("."))
        return (name, site["role"], _shape(site), site["outcome"], site["kernel"] or "", site["reason"] or "")

    rows = []
    order = {key(site): index for index, site in reversed(list(enumerate(sites)))}
    for same, group in groupby(sorted(sites, key=lambda s: order[key(s)]), key=key):
        members = list(group)
        _, role, shape, outcome, kernel, reason = same
        full = sum(site["bytes_full"] for site in members) / 1e6
        packed = sum(site["resident_packed"] for site in members) / 1e6
        weight = f"{full:.2f} → {packed:.2f} MB" if outcome == "quantized" else ""
        names = [site["fqn"] for site in members]
        rows.append(
            SiteRow(
                names=names,
                role=role,
                shape=shape,
                outcome=outcome,
                kernel=kernel,
                weight=weight,
                reason=reason,
            )
        )
    return rows


def _shape(site: dict[str, Any]) -> str:
    return f"{site['rows']} × {site['depth']} × {site['width']}"
