"""Where boxes and arrows go: Graphviz where it is installed, else a small layered layout of our own.

Ours, after Sugiyama: layers by longest path, order by barycentres, positions by least squares.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

GAP_X, GAP_Y = 18.0, 30.0
_SWEEPS = 16
_DUMMY_WIDTH = 6.0
_DOT_SECONDS = 30
_POINTS_PER_INCH = 72.0

Size = tuple[float, float]
Point = tuple[float, float]
Edge = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Centres of boxes, and for each edge the points of its cubic curve (1 + 3 n of them)."""

    width: float
    height: float
    centres: dict[str, Point]
    curves: dict[Edge, tuple[Point, ...]]


def lay_out(sizes: Mapping[str, Size], edges: Sequence[Edge]) -> Layout:
    """Place boxes of these sizes; by `dot` when it is there and works, else by ourselves."""
    binary = shutil.which("dot")
    if binary is not None and sizes:
        found = _by_dot(binary, sizes, edges)
        if found is not None:
            return found
    return lay_out_in_layers(sizes, edges)


def lay_out_in_layers(sizes: Mapping[str, Size], edges: Sequence[Edge]) -> Layout:
    """Our own layout: the same for the same input, with nothing installed."""
    if not sizes:
        return Layout(width=0, height=0, centres={}, curves={})
    layer = layers_of(list(sizes), edges)
    chains = {edge: _chain(edge, layer) for edge in edges}
    rows: dict[int, list[str]] = defaultdict(list)
    for name in sizes:
        rows[layer[name]].append(name)
    for chain in chains.values():
        for offset, dummy in enumerate(chain[1:-1], start=1):
            rows[layer[chain[0]] + offset].append(dummy)
    ordered = [rows[index] for index in range(max(rows) + 1)]
    links = [pair for chain in chains.values() for pair in pairwise(chain)]
    above, below = _neighbours(links)
    _order(ordered, above, below)
    widths = {name: sizes[name][0] if name in sizes else _DUMMY_WIDTH for row in ordered for name in row}
    xs = _positions(ordered, widths, above, below)
    return _finish(ordered, xs, sizes, chains)


def layers_of(names: Sequence[str], edges: Sequence[Edge]) -> dict[str, int]:
    """Longest path from the sources; these, and what hangs on them alone, sink to just above their first users."""
    inputs: dict[str, list[str]] = defaultdict(list)
    users: dict[str, list[str]] = defaultdict(list)
    for source, target in edges:
        inputs[target].append(source)
        users[source].append(target)
    layer: dict[str, int] = {}
    waiting = {name: len(inputs[name]) for name in names}
    ready = [name for name in names if not waiting[name]]
    while ready:
        name = ready.pop(0)
        layer[name] = max((layer[source] + 1 for source in inputs[name]), default=0)
        for user in users[name]:
            waiting[user] -= 1
            if not waiting[user]:
                ready.append(user)
    assert len(layer) == len(names), "a data-flow graph has no cycles"
    hangs: set[str] = set()
    for name in layer:
        if all(
            not inputs[source] or (source in hangs and len(users[source]) == 1) for source in inputs[name]
        ):
            hangs.add(name)
    for name in reversed(list(layer)):
        if name in hangs and users[name]:
            layer[name] = min(layer[user] for user in users[name]) - 1
    return layer


def _chain(edge: Edge, layer: Mapping[str, int]) -> list[str]:
    source, target = edge
    between = range(layer[source] + 1, layer[target])
    return [source, *(f"{source}>{target}>{index}" for index in between), target]


def _neighbours(links: Sequence[Edge]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    above: dict[str, list[str]] = defaultdict(list)
    below: dict[str, list[str]] = defaultdict(list)
    for source, target in links:
        above[target].append(source)
        below[source].append(target)
    return above, below


def _order(rows: list[list[str]], above: Mapping[str, list[str]], below: Mapping[str, list[str]]) -> None:
    """Sort each row by where its neighbours stand, down and up in turn; keep the order with fewest crossings."""
    best, fewest = [list(row) for row in rows], _crossings(rows, below)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for index in range(1, len(rows)) if down else range(len(rows) - 2, -1, -1):
            _sort_row(rows[index], rows[index - 1 if down else index + 1], above if down else below)
        crossings = _crossings(rows, below)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    rows[:] = best


def _sort_row(row: list[str], fixed: Sequence[str], near: Mapping[str, list[str]]) -> None:
    place = {name: i for i, name in enumerate(fixed)}
    centres: dict[str, float] = {}
    for index, name in enumerate(row):
        found = [place[n] for n in near.get(name, ()) if n in place]
        centres[name] = sum(found) / len(found) if found else float(index)
    row.sort(key=centres.__getitem__)


def _crossings(rows: Sequence[Sequence[str]], below: Mapping[str, list[str]]) -> int:
    count = 0
    for row, after in pairwise(rows):
        place = {name: i for i, name in enumerate(after)}
        ends = [sorted(place[n] for n in below.get(name, ()) if n in place) for name in row]
        for index, mine in enumerate(ends):
            for theirs in ends[index + 1 :]:
                count += sum(other < own for own in mine for other in theirs)
    return count


def _positions(
    rows: Sequence[Sequence[str]],
    widths: Mapping[str, float],
    above: Mapping[str, list[str]],
    below: Mapping[str, list[str]],
) -> dict[str, float]:
    xs: dict[str, float] = {}
    for row in rows:
        left = 0.0
        for name in row:
            xs[name] = left + widths[name] / 2
            left += widths[name] + GAP_X
    for sweep in range(2 * _SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            near = {name: [*above.get(name, ()), *below.get(name, ())] for name in row}
            wanted = [
                sum(xs[n] for n in near[name]) / len(near[name]) if near[name] else xs[name] for name in row
            ]
            xs.update(zip(row, _apart(wanted, [widths[name] for name in row]), strict=True))
    return xs


def _apart(wanted: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Positions nearest to the wanted ones, in order and without overlap: least squares by pooling neighbours."""
    offsets = [0.0]
    for one, other in pairwise(widths):
        offsets.append(offsets[-1] + (one + other) / 2 + GAP_X)
    pools: list[list[float]] = []  # [sum, count]
    for want, offset in zip(wanted, offsets, strict=False):
        pools.append([want - offset, 1.0])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    flat = [total / count for total, count in pools for _ in range(int(count))]
    return [value + offset for value, offset in zip(flat, offsets, strict=False)]


def _finish(
    rows: Sequence[Sequence[str]],
    xs: Mapping[str, float],
    sizes: Mapping[str, Size],
    chains: Mapping[Edge, Sequence[str]],
) -> Layout:
    left = min(xs[name] - (sizes[name][0] / 2 if name in sizes else 0) for row in rows for name in row)
    right = max(xs[name] + (sizes[name][0] / 2 if name in sizes else 0) for row in rows for name in row)
    points: dict[str, Point] = {}
    top = 0.0
    for row in rows:
        height = max((sizes[name][1] for name in row if name in sizes), default=0.0)
        for name in row:
            points[name] = (xs[name] - left, top + height / 2)
        top += height + GAP_Y
    curves = {edge: _curve(chain, points, sizes) for edge, chain in chains.items()}
    centres = {name: points[name] for name in sizes}
    return Layout(width=right - left, height=top - GAP_Y, centres=centres, curves=curves)


def _curve(chain: Sequence[str], points: Mapping[str, Point], sizes: Mapping[str, Size]) -> tuple[Point, ...]:
    stops = [points[name] for name in chain]
    stops[0] = (stops[0][0], stops[0][1] + sizes[chain[0]][1] / 2)
    stops[-1] = (stops[-1][0], stops[-1][1] - sizes[chain[-1]][1] / 2)
    lengths = [abs(b[1] - a[1]) for a, b in pairwise(stops)]
    slopes = [
        0.0,
        *((c[0] - a[0]) / max(c[1] - a[1], 1.0) for a, c in zip(stops, stops[2:], strict=False)),
        0.0,
    ]
    curve = [stops[0]]
    for index, ((x0, y0), (x1, y1)) in enumerate(pairwise(stops)):
        reach = lengths[index] / 3 if len(stops) > 2 else lengths[index] / 2
        curve += [
            (x0 + reach * slopes[index], y0 + reach),
            (x1 - reach * slopes[index + 1], y1 - reach),
            (x1, y1),
        ]
    return tuple(curve)


def _by_dot(binary: str, sizes: Mapping[str, Size], edges: Sequence[Edge]) -> Layout | None:
    """Graphviz's positions; None when it fails, for a picture matters more than whose layout it is."""
    keys = {name: f"n{index}" for index, name in enumerate(sizes)}
    text = ["digraph {", "node [shape=box, fixedsize=true]; edge [dir=none]; nodesep=0.2; ranksep=0.35;"]
    for name, (width, height) in sizes.items():
        inches = f"width={width / _POINTS_PER_INCH:.3f}, height={height / _POINTS_PER_INCH:.3f}"
        text.append(f'{keys[name]} [label="", {inches}];')
    text += [f"{keys[source]} -> {keys[target]};" for source, target in edges]
    try:
        done = subprocess.run(
            [binary, "-Tplain"],
            input="\n".join([*text, "}"]),
            capture_output=True,
            text=True,
            check=True,
            timeout=_DOT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return _read_plain(done.stdout, {key: name for name, key in keys.items()})


def _read_plain(text: str, names: Mapping[str, str]) -> Layout:
    width = height = 0.0
    centres: dict[str, Point] = {}
    curves: dict[Edge, tuple[Point, ...]] = {}
    for words in map(str.split, text.splitlines()):
        if words[0] == "graph":
            width, height = float(words[2]) * _POINTS_PER_INCH, float(words[3]) * _POINTS_PER_INCH
        elif words[0] == "node":
            centres[names[words[1]]] = _flip(words[2], words[3], height)
        elif words[0] == "edge":
            count = int(words[3])
            pairs = zip(words[4 : 4 + 2 * count : 2], words[5 : 5 + 2 * count : 2], strict=True)
            curves[names[words[1]], names[words[2]]] = tuple(_flip(x, y, height) for x, y in pairs)
    return Layout(width=width, height=height, centres=centres, curves=curves)


def _flip(x: str, y: str, height: float) -> Point:
    return float(x) * _POINTS_PER_INCH, height - float(y) * _POINTS_PER_INCH
