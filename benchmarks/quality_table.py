"""Tables (Markdown) and a figure of what `quality.py` measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality_rows import FP32, SECTIONS, Row

KINDS = ("plain", "stressed")
FIGURES = ("step", "samples", "FD", "acc.")
HEAD = ("row", "bits W / A", *(f"{kind}: {name}" for kind in KINDS for name in FIGURES))


def table(record: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Markdown tables of every section that has rows."""
    video = record["model"] == "video"
    head = [*HEAD, *(f"{kind}: motion" for kind in KINDS if video)]
    parts = []
    for letter, title in SECTIONS.items():
        found = [(row.labels[letter], row.name) for row in rows if letter in row.labels]
        found = [(label, name) for label, name in found if any(name in record["rows"][k] for k in KINDS)]
        if not found:
            continue
        lines = [f"{letter}. {title}, {record['model']} model:", "", _line(head), _line(["---"] * len(head))]
        parts.append(
            "\n".join([*lines, *(_row(record, label, name) for label, name in [(FP32, FP32), *found])])
        )
    return "\n\n".join(parts)


def _row(record: Mapping[str, Any], label: str, name: str) -> str:
    by_kind = [record["rows"][kind].get(name) for kind in KINDS]
    cells = [label, "32 / 32"]
    if name != FP32:
        cells = [label, f"{_bits(by_kind, 'weight_bits')} / {_bits(by_kind, 'input_bits')}"]
    for kind, found in zip(KINDS, by_kind, strict=True):
        cells += ["", "", "", ""] if found is None else _figures(found, record["rows"][kind].get(FP32))
    if record["model"] == "video":
        cells += [
            "" if found is None else f"{100 * mean_of(found['frame_difference']):+.1f}%" for found in by_kind
        ]
    return _line(cells)


def _bits(by_kind: Sequence[Mapping[str, Any] | None], what: str) -> str:
    """Average bits of the plain and the stressed model, once where they are alike."""
    return "-".join(dict.fromkeys(f"{found[what]:.3g}" for found in by_kind if found is not None))


def _figures(found: Mapping[str, Any], full: Mapping[str, Any] | None) -> list[str]:
    """SQNR of a step and of the samples, FD (and its change against fp32's from the same noise), accuracy."""
    distance = f"{mean_of(found['fd']):.4g} ± {statistics.stdev(found['fd']):.2g}"
    if full is not None and full is not found:
        changes = [100.0 * (own / exact - 1.0) for own, exact in zip(found["fd"], full["fd"], strict=True)]
        distance += f" ({mean_of(changes):+.1f} ± {statistics.stdev(changes):.1f}%)"
    return [
        _db(found["step_db"]),
        _db(found["sqnr_db"]),
        distance,
        f"{mean_of(found['accuracy']):.3f}",
    ]


def _db(values: Sequence[float | None] | None) -> str:
    if values is None:
        return "-"
    return "exact" if any(value is None for value in values) else f"{mean_of(values):.1f}"


def mean_of(values: Sequence[Any]) -> float:
    """Mean of the numbers."""
    return statistics.mean(values)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def figure(record: Mapping[str, Any], rows: Sequence[Row], path: Path) -> Path:
    """Bars of the samples' SQNR by row, plain beside stressed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [row.name for row in rows if any(row.name in record["rows"][kind] for kind in KINDS)]
    drawn, axes = plt.subplots(figsize=(9, 0.28 * len(names) + 1.4))
    for shift, kind in enumerate(KINDS):
        found = record["rows"][kind]
        at = [y + 0.4 * shift for y, name in enumerate(names) if name in found]
        lengths = [mean_of(found[name]["sqnr_db"]) for name in names if name in found]
        axes.barh(at, lengths, height=0.4, label=kind)
    axes.set_yticks([y + 0.2 for y in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel("SQNR of the samples against fp32's from the same noise, dB")
    axes.set_title(f"{record['model']} model, {record['settings']['steps']} steps")
    axes.legend()
    drawn.tight_layout()
    drawn.savefig(path, dpi=80)
    return path
