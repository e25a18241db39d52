"""A tall graph cut into columns that stand side by side, as text is: what crosses a cut becomes a numbered link.

Arrows never lead from one column to another. A value that a later column reads stands there again, as a small box
with the number that the box which computes it bears; an input of the block is simply repeated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from viditq_fx.inspection.flow_graph import FlowGraph, FlowNode
from viditq_fx.inspection.layout import GAP_X, GAP_Y, Edge, Size, layers_of

PAGE_WIDTH = 1330.0
"""What a page of 1400 pixels has room for."""
PAGE_HEIGHT = 640.0
"""What can be seen at once: a picture of this height gains nothing by being cut."""
COLUMN_GAP = 36.0
_COLUMN_COST = 60.0
_LINK_COST = 40.0
_OVERFLOW_COST = 1.0
_LANE = 18.0
"""Room for an arrow that passes a layer."""
_LIMITS = 24


@dataclass(frozen=True, kw_only=True)
class Column:
    """Boxes and arrows that stand together, top to bottom."""

    nodes: tuple[FlowNode, ...]
    edges: tuple[Edge, ...]
    numbers: Mapping[str, int]
    """Key of a box -> the number of its value, which a later column reads, or an earlier one computes."""

    @property
    def title(self) -> str:
        """The parts of the block whose sites stand in it."""
        return ", ".join(dict.fromkeys(node.part for node in self.nodes if node.part))


def in_columns(graph: FlowGraph, sizes: Mapping[str, Size]) -> list[Column]:
    """Cut a graph so that it fits a page, at places where few values cross; one column if it is short."""
    if not graph.nodes:
        return []
    cutter = _Cutter(graph, sizes)
    starts = cutter.cut()
    return _build(graph, cutter.assign(starts))


class _Cutter:
    """Cuts between layers, so that all arrows lead from earlier columns to later ones."""

    def __init__(self, graph: FlowGraph, sizes: Mapping[str, Size]) -> None:
        self._graph, self._sizes = graph, sizes
        self._layer = layers_of([node.key for node in graph.nodes], graph.edges)
        self._rows: list[list[FlowNode]] = [[] for _ in range(max(self._layer.values()) + 1)]
        for node in graph.nodes:
            self._rows[self._layer[node.key]].append(node)
        self._heights = [max((sizes[n.key][1] for n in row), default=0.0) + GAP_Y for row in self._rows]
        self._widths = [sum(sizes[n.key][0] + GAP_X for n in row) for row in self._rows]
        self._inputs: dict[str, list[str]] = defaultdict(list)
        for source, target in graph.edges:
            self._inputs[target].append(source)
        self._ports = {node.key for node in graph.nodes if node.kind == "port"}
        count = len(self._rows)
        self._passing: list[list[int]] = [[] for _ in range(count)]
        """For each layer: the layers from which arrows come that pass it."""
        for source, target in graph.edges:
            for row in range(self._layer[source] + 1, self._layer[target]):
                self._passing[row].append(self._layer[source])
        self._segments = {(a, b): self._measure(a, b) for a in range(count) for b in range(a + 1, count + 1)}

    def _measure(self, start: int, end: int) -> tuple[float, float, int]:
        """(width, height, values from earlier columns) of the layers start .. end - 1, before they are laid out."""
        passing = [sum(first >= start for first in self._passing[row]) for row in range(start, end)]
        widths = [0.0, *(w + _LANE * n for w, n in zip(self._widths[start:end], passing, strict=True))]
        links: set[str] = set()
        for index, row in enumerate(self._rows[start:end]):
            for source in (s for node in row if node.key not in self._ports for s in self._inputs[node.key]):
                if self._layer[source] < start and source not in links:
                    links.add(source)
                    widths[index] += self._sizes[source][0] + GAP_X  # right above the first that reads it
        height = sum(self._heights[start:end]) + (max(self._heights) if widths[0] else 0.0)
        return max(widths), height, len(links - self._ports)

    def cut(self) -> list[int]:
        """The first layer of each column."""
        whole = sum(self._heights)
        found = [self._cut_at_most(whole * step / _LIMITS) for step in range(1, _LIMITS + 1)]
        return min((starts for starts in found if starts), key=self._cost)

    def _cut_at_most(self, limit: float) -> list[int]:
        """The cheapest columns of at most this height; none if a single layer is higher."""
        best: list[tuple[float, list[int]] | None] = [(0.0, [])]
        for end in range(1, len(self._rows) + 1):
            ways = []
            for start in range(end):
                before, (width, height, links) = best[start], self._segments[start, end]
                if before is not None and height <= limit:
                    ways.append((before[0] + width + _LINK_COST * links, [*before[1], start]))
            best.append(min(ways, default=None))
        last = best[-1]
        return last[1] if last is not None else []

    def _cost(self, starts: list[int]) -> float:
        parts = [self._segments[pair] for pair in zip(starts, [*starts[1:], len(self._rows)], strict=True)]
        width = sum(part[0] + COLUMN_GAP for part in parts)
        links = sum(part[2] for part in parts)
        overflow = max(0.0, width - PAGE_WIDTH)
        tallest = max(PAGE_HEIGHT, *(part[1] for part in parts))
        return tallest + _LINK_COST * links + _COLUMN_COST * len(parts) + _OVERFLOW_COST * overflow

    def assign(self, starts: list[int]) -> dict[str, set[int]]:
        """Key -> the columns in which it stands; inputs of the block stand wherever they are read."""
        column = {
            key: sum(layer >= start for start in starts) - 1
            for key, layer in self._layer.items()
            if key not in self._ports
        }
        placed = {key: {index} for key, index in column.items()}
        for source, target in self._graph.edges:
            # An output stands with what computes it.
            index = column.get(source, 0) if target in self._ports else column[target]
            placed.setdefault(target, set()).add(index)
            if source in self._ports:
                placed.setdefault(source, set()).add(index)
        for key in self._ports:
            placed.setdefault(key, {0})
        return placed


def _build(graph: FlowGraph, placed: Mapping[str, set[int]]) -> list[Column]:
    nodes = {node.key: node for node in graph.nodes}
    members: dict[int, dict[str, FlowNode]] = defaultdict(dict)
    for key, node in nodes.items():
        for index in placed[key]:
            members[index][_in(key, index, placed)] = replace(node, key=_in(key, index, placed))
    numbers: dict[str, int] = {}
    edges: dict[int, dict[Edge, None]] = defaultdict(dict)
    for source, target in graph.edges:
        (index,) = placed[target]
        key = _in(source, index, placed)
        if index not in placed[source]:
            numbers.setdefault(source, len(numbers) + 1)
            key = f"link:{index}:{source}"
            members[index][key] = _link(nodes[source], key)
        edges[index][key, target] = None
    columns = []
    for index in sorted(members):
        shown = {key: numbers[_origin(key)] for key in members[index] if _origin(key) in numbers}
        columns.append(Column(nodes=tuple(members[index].values()), edges=tuple(edges[index]), numbers=shown))
    return columns


def _in(key: str, index: int, placed: Mapping[str, set[int]]) -> str:
    """A box's key in a column: boxes of one picture need keys of their own."""
    return f"port:{index}:{key}" if len(placed[key]) > 1 and index in placed[key] else key


def _origin(key: str) -> str:
    return key.split(":", 2)[2] if key.startswith("link:") else key


def _link(node: FlowNode, key: str) -> FlowNode:
    return FlowNode(
        key=key,
        kind="port",
        lines=(node.lines[0], node.lines[-1]),
        tooltip=f"from an earlier column:\n{node.tooltip}",
    )
