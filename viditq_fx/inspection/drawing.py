"""A flow graph as SVG or as Graphviz text, coloured by what happened to each site, with its legend."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from html import escape

from viditq_fx.inspection.columns import COLUMN_GAP, Column, in_columns
from viditq_fx.inspection.flow_graph import KINDS, FlowGraph, FlowNode
from viditq_fx.inspection.layout import Point, Size, lay_out

_CHAR, _LINE, _PAD = 6.7, 14.0, 8.0
_MARGIN, _TITLE, _LEGEND = 16.0, 32.0, 30.0
_HEAD, _HEAD_CHAR, _BADGE = 18.0, 7.0, 8.0
_LINK_LEGEND = 190.0
_LONGEST = 48
_SHRINK = 0.8
"""A page may draw it this much smaller before it scrolls: 11 pixels of text become 9."""


@dataclass(frozen=True, kw_only=True)
class Colour:
    """Fill, border and text of a kind of node."""

    fill: str
    line: str
    text: str


LIGHT = {
    "quantized": Colour(fill="#c4ecd2", line="#11703b", text="#0b3d21"),
    "step": Colour(fill="#eef9f1", line="#7fbf98", text="#285c3d"),
    "simulated": Colour(fill="#faf0c8", line="#8a6a00", text="#4d3b00"),
    "kept": Colour(fill="#dbe7fb", line="#2f62b5", text="#173a73"),
    "refused": Colour(fill="#fbd9c9", line="#b23c0e", text="#6b2408"),
    "other": Colour(fill="#f5f6f8", line="#b4bac4", text="#3a404b"),
    "port": Colour(fill="#ffffff", line="#b4bac4", text="#5a6270"),
}
DARK = {
    "quantized": Colour(fill="#1b4d31", line="#6fcf97", text="#dcf7e6"),
    "step": Colour(fill="#1a2c22", line="#3f7d5a", text="#a9d8bd"),
    "simulated": Colour(fill="#453a10", line="#e0bd4a", text="#f8efcf"),
    "kept": Colour(fill="#20365c", line="#7fa8ea", text="#dbe7fb"),
    "refused": Colour(fill="#5c2a14", line="#f0a07c", text="#fde6db"),
    "other": Colour(fill="#252b33", line="#4d5562", text="#c5cad3"),
    "port": Colour(fill="#15181d", line="#4d5562", text="#a2a9b6"),
}


def to_svg(graph: FlowGraph) -> str:
    """A stand-alone SVG picture, light or dark as the reader's browser is; the same for the same graph."""
    arrow = f"vq-arrow-{zlib.crc32(repr(graph).encode()):08x}"  # pictures on one page need ids of their own
    columns = in_columns(graph, {node.key: _size(_texts(node)) for node in graph.nodes})
    drawn = [_column(column, arrow, titled=len(columns) > 1) for column in columns]
    inner = sum(width for width, _, _ in drawn) + COLUMN_GAP * max(len(drawn) - 1, 0)
    linked = any(column.numbers for column in columns)
    width = max(inner, sum(_legend_widths()) + (_LINK_LEGEND if linked else 0.0)) + 2 * _MARGIN
    top = _MARGIN + _TITLE + _LEGEND
    height = max((height for _, height, _ in drawn), default=0.0) + top + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="vq-graph" role="img" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" style="min-width:{_SHRINK * width:.0f}px">',
        f"<title>{escape(graph.title)}</title>",
        f"<style>{_style()}</style>",
        f'<rect class="back" width="{width:.0f}" height="{height:.0f}"/>',
        f'<defs><marker id="{arrow}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        f'<text class="title" x="{_MARGIN:.0f}" y="{_MARGIN + 10:.0f}">{escape(graph.title)}</text>',
        *_legend(linked=linked),
    ]
    x = (width - inner) / 2
    for index, (wide, _, body) in enumerate(drawn):
        if index:
            rule = x - COLUMN_GAP / 2
            parts.append(f'<path class="rule" d="M{rule:.1f} {top - 8:.0f} V{height - _MARGIN:.0f}"/>')
        parts += [f'<g class="column" transform="translate({x:.1f} {top:.1f})">', *body, "</g>"]
        x += wide + COLUMN_GAP
    return "\n".join([*parts, "</svg>"]) + "\n"


def _column(column: Column, arrow: str, *, titled: bool) -> tuple[float, float, list[str]]:
    """(width, height, what to draw) of one column."""
    texts = {node.key: _texts(node) for node in column.nodes}
    sizes = {key: _size(lines) for key, lines in texts.items()}
    layout = lay_out(sizes, column.edges)
    head = _HEAD if titled else 0.0
    title = column.title if titled else ""
    width = max(layout.width, len(title) * _HEAD_CHAR) + 2 * _BADGE
    body = [
        *(
            [f'<text class="head" x="{width / 2:.1f}" y="10" text-anchor="middle">{escape(title)}</text>']
            * bool(title)
        ),
        f'<g transform="translate({(width - layout.width) / 2:.1f} {head + _BADGE:.1f})">',
        *(_edge(layout.curves[edge], arrow) for edge in column.edges if edge in layout.curves),
        *(
            _box(n, texts[n.key], sizes[n.key], layout.centres[n.key], column.numbers.get(n.key))
            for n in column.nodes
        ),
        "</g>",
    ]
    return width, layout.height + head + 2 * _BADGE, body


def to_dot(graph: FlowGraph) -> str:
    """The graph as Graphviz text, with the same colours and a legend."""
    keys = {node.key: f"n{index}" for index, node in enumerate(graph.nodes)}
    lines = [
        "digraph viditq {",
        f'  label="{_quoted(graph.title)}"; labelloc=t; fontname="Helvetica"; nodesep=0.2; ranksep=0.35;',
        '  node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=10];',
        '  edge [color="#8a919e", arrowsize=0.6];',
    ]
    for node in graph.nodes:
        label = "\\n".join(_quoted(line) for line in node.lines if line)
        lines.append(
            f'  {keys[node.key]} [label="{label}", tooltip="{_quoted(node.tooltip)}", {_dot_colour(node.kind)}];'
        )
    lines += [f"  {keys[source]} -> {keys[target]};" for source, target in graph.edges]
    lines.append('  subgraph cluster_legend { label="legend"; color="#d5d9e0";')
    for kind, meaning in KINDS.items():
        lines.append(f'    legend_{kind} [label="{meaning}", {_dot_colour(kind)}];')
    return "\n".join([*lines, "  }", "}"]) + "\n"


def _dot_colour(kind: str) -> str:
    colour = LIGHT[kind]
    return f'class="{kind}", fillcolor="{colour.fill}", color="{colour.line}", fontcolor="{colour.text}"'


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _texts(node: FlowNode) -> tuple[str, ...]:
    """The lines of a box; a long path has its role on a line of its own."""
    lines: list[str] = []
    for line in filter(None, node.lines):
        path, dot, role = line.partition(" · ")
        lines += [path, f"· {role}"] if dot and len(line) > _LONGEST else [line]
    return tuple(map(_short, lines))


def _short(text: str) -> str:
    """The end of a path says more than its beginning."""
    return text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"


def _size(lines: tuple[str, ...]) -> Size:
    return max(len(line) for line in lines) * _CHAR + 2 * _PAD, len(lines) * _LINE + _PAD


def _style() -> str:
    base = (
        ".vq-graph{font:11px ui-monospace,Menlo,Consolas,monospace}"
        ".vq-graph .title{font:600 14px system-ui,sans-serif}.vq-graph .legend text{font:12px system-ui,sans-serif}"
        ".vq-graph path.edge{fill:none;stroke-width:1.2}.vq-graph text.head{font-weight:600}"
        ".vq-graph .badge text{font:600 10px system-ui,sans-serif}.vq-graph path.rule{fill:none;stroke-dasharray:2 4}"
        ".vq-graph .column>.head{font:600 13px system-ui,sans-serif}"
        ".vq-graph .refused rect{stroke-width:2.5}.vq-graph .quantized rect{stroke-width:1.8}"
        ".vq-graph .kept rect{stroke-dasharray:5 3;stroke-width:1.8}"
    )
    dark = _themed(DARK, back="#15181d", text="#e6e8ec", edge="#6b7482")
    light = _themed(LIGHT, back="#fff", text="#1d2129", edge="#8a919e")
    return f"{base}{light}@media (prefers-color-scheme:dark){{{dark}}}"


def _themed(colours: dict[str, Colour], *, back: str, text: str, edge: str) -> str:
    rules = [
        f".vq-graph .back{{fill:{back}}}.vq-graph .title,.vq-graph .legend text{{fill:{text}}}",
        f".vq-graph path.edge,.vq-graph path.rule{{stroke:{edge}}}.vq-graph .tip{{fill:{edge}}}",
        f".vq-graph .column>.head{{fill:{text}}}.vq-graph .badge circle{{fill:{text}}}",
    ]
    for kind, colour in colours.items():
        scope = f".vq-graph .{kind}"
        rules.append(
            f"{scope} rect{{fill:{colour.fill};stroke:{colour.line}}}{scope} text{{fill:{colour.text}}}"
        )
    rules.append(f".vq-graph .badge text{{fill:{back}}}")
    return "".join(rules)


def _legend_widths() -> list[float]:
    return [18 + 6.4 * len(meaning) + 18 for meaning in KINDS.values()]


def _legend(*, linked: bool) -> list[str]:
    parts, x, y = ['<g class="legend">'], _MARGIN, _MARGIN + _TITLE
    for (kind, meaning), width in zip(KINDS.items(), _legend_widths(), strict=True):
        swatch = f'<g class="{kind}"><rect x="{x:.0f}" y="{y - 9:.0f}" width="12" height="12" rx="3"/></g>'
        parts.append(f'{swatch}<text x="{x + 18:.0f}" y="{y + 1:.0f}">{escape(meaning)}</text>')
        x += width
    if linked:
        parts.append(_badge(x + 6, y - 3, 1))
        parts.append(f'<text x="{x + 20:.0f}" y="{y + 1:.0f}">same number, same value</text>')
    return [*parts, "</g>"]


def _badge(x: float, y: float, number: int) -> str:
    """A value's number, on the box that computes it and on those that stand for it in later columns."""
    disc = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_BADGE:.0f}"/>'
    return (
        f'<g class="badge">{disc}<text x="{x:.1f}" y="{y + 3.5:.1f}" text-anchor="middle">{number}</text></g>'
    )


def _edge(points: tuple[Point, ...], arrow: str) -> str:
    (x, y), *rest = points
    curve = " ".join(f"{a:.1f} {b:.1f}" for a, b in rest)
    return f'<path class="edge" marker-end="url(#{arrow})" d="M{x:.1f} {y:.1f} C{curve}"/>'


def _box(node: FlowNode, lines: tuple[str, ...], size: Size, centre: Point, number: int | None) -> str:
    (x, y), (width, height) = centre, size
    left, top = x - width / 2, y - height / 2
    radius = height / 2 if node.kind == "port" else 5
    rect = f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:.0f}"/>'
    first = top + _PAD / 2 + 0.78 * _LINE
    texts = [
        f'<text{" class=" + chr(34) + "head" + chr(34) if index == 0 else ""} x="{x:.1f}" '
        f'y="{first + index * _LINE:.1f}" text-anchor="middle">{escape(line)}</text>'
        for index, line in enumerate(lines)
    ]
    badge = "" if number is None else _badge(left + width - 2, top + 2, number)
    return f'<g class="{node.kind}"><title>{escape(node.tooltip)}</title>{rect}{"".join(texts)}{badge}</g>'
