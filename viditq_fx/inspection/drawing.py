"""A flow graph as SVG or as Graphviz text, coloured by what happened to each site, with its legend."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from html import escape

from viditq_fx.inspection.flow_graph import KINDS, FlowGraph, FlowNode
from viditq_fx.inspection.layout import Layout, Point, Size, lay_out

_CHAR, _LINE, _PAD = 6.7, 14.0, 8.0
_MARGIN, _TITLE, _LEGEND = 16.0, 32.0, 30.0
_LONGEST = 44


@dataclass(frozen=True, kw_only=True)
class Colour:
    """Fill, border and text of a kind of node."""

    fill: str
    line: str
    text: str


LIGHT = {
    "quantized": Colour(fill="#c4ecd2", line="#11703b", text="#0b3d21"),
    "step": Colour(fill="#eef9f1", line="#7fbf98", text="#285c3d"),
    "kept": Colour(fill="#dbe7fb", line="#2f62b5", text="#173a73"),
    "refused": Colour(fill="#fbd9c9", line="#b23c0e", text="#6b2408"),
    "other": Colour(fill="#f5f6f8", line="#b4bac4", text="#3a404b"),
    "port": Colour(fill="#ffffff", line="#b4bac4", text="#5a6270"),
}
DARK = {
    "quantized": Colour(fill="#1b4d31", line="#6fcf97", text="#dcf7e6"),
    "step": Colour(fill="#1a2c22", line="#3f7d5a", text="#a9d8bd"),
    "kept": Colour(fill="#20365c", line="#7fa8ea", text="#dbe7fb"),
    "refused": Colour(fill="#5c2a14", line="#f0a07c", text="#fde6db"),
    "other": Colour(fill="#252b33", line="#4d5562", text="#c5cad3"),
    "port": Colour(fill="#15181d", line="#4d5562", text="#a2a9b6"),
}


def to_svg(graph: FlowGraph) -> str:
    """A stand-alone SVG picture, light or dark as the reader's browser is; the same for the same graph."""
    arrow = f"vq-arrow-{zlib.crc32(repr(graph).encode()):08x}"  # pictures on one page need ids of their own
    texts = {node.key: tuple(_short(line) for line in node.lines if line) for node in graph.nodes}
    sizes = {key: _size(lines) for key, lines in texts.items()}
    layout = lay_out(sizes, graph.edges)
    legend_width = sum(_legend_widths()) + 2 * _MARGIN
    width = max(layout.width + 2 * _MARGIN, legend_width)
    height = layout.height + 2 * _MARGIN + _TITLE + _LEGEND
    shift = (width - layout.width) / 2, _MARGIN + _TITLE + _LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="vq-graph" role="img" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}">',
        f"<title>{escape(graph.title)}</title>",
        f"<style>{_style()}</style>",
        f'<rect class="back" width="{width:.0f}" height="{height:.0f}"/>',
        f'<defs><marker id="{arrow}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        f'<text class="title" x="{_MARGIN:.0f}" y="{_MARGIN + 10:.0f}">{escape(graph.title)}</text>',
        *_legend(),
        f'<g transform="translate({shift[0]:.1f} {shift[1]:.1f})">',
        *(_edge(layout.curves[edge], arrow) for edge in graph.edges if edge in layout.curves),
        *(_box(node, texts[node.key], sizes[node.key], layout) for node in graph.nodes),
        "</g></svg>",
    ]
    return "\n".join(parts) + "\n"


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


def _short(text: str) -> str:
    """The end of a path says more than its beginning, and its role stands there."""
    if len(text) <= _LONGEST:
        return text
    return f"…{text[1 - _LONGEST :]}" if "·" in text else f"{text[: _LONGEST - 1]}…"


def _size(lines: tuple[str, ...]) -> Size:
    return max(len(line) for line in lines) * _CHAR + 2 * _PAD, len(lines) * _LINE + _PAD


def _style() -> str:
    base = (
        ".vq-graph{font:11px ui-monospace,Menlo,Consolas,monospace}"
        ".vq-graph .title{font:600 14px system-ui,sans-serif}.vq-graph .legend text{font:12px system-ui,sans-serif}"
        ".vq-graph path.edge{fill:none;stroke-width:1.2}.vq-graph text.head{font-weight:600}"
        ".vq-graph .refused rect{stroke-width:2.5}.vq-graph .quantized rect{stroke-width:1.8}"
        ".vq-graph .kept rect{stroke-dasharray:5 3;stroke-width:1.8}"
    )
    dark = _themed(DARK, back="#15181d", text="#e6e8ec", edge="#6b7482")
    light = _themed(LIGHT, back="#fff", text="#1d2129", edge="#8a919e")
    return f"{base}{light}@media (prefers-color-scheme:dark){{{dark}}}"


def _themed(colours: dict[str, Colour], *, back: str, text: str, edge: str) -> str:
    rules = [
        f".vq-graph .back{{fill:{back}}}.vq-graph .title,.vq-graph .legend text{{fill:{text}}}",
        f".vq-graph path.edge{{stroke:{edge}}}.vq-graph .tip{{fill:{edge}}}",
    ]
    for kind, colour in colours.items():
        scope = f".vq-graph .{kind}"
        rules.append(
            f"{scope} rect{{fill:{colour.fill};stroke:{colour.line}}}{scope} text{{fill:{colour.text}}}"
        )
    return "".join(rules)


def _legend_widths() -> list[float]:
    return [18 + 6.4 * len(meaning) + 18 for meaning in KINDS.values()]


def _legend() -> list[str]:
    parts, x, y = ['<g class="legend">'], _MARGIN, _MARGIN + _TITLE
    for (kind, meaning), width in zip(KINDS.items(), _legend_widths(), strict=True):
        swatch = f'<g class="{kind}"><rect x="{x:.0f}" y="{y - 9:.0f}" width="12" height="12" rx="3"/></g>'
        parts.append(f'{swatch}<text x="{x + 18:.0f}" y="{y + 1:.0f}">{escape(meaning)}</text>')
        x += width
    return [*parts, "</g>"]


def _edge(points: tuple[Point, ...], arrow: str) -> str:
    (x, y), *rest = points
    curve = " ".join(f"{a:.1f} {b:.1f}" for a, b in rest)
    return f'<path class="edge" marker-end="url(#{arrow})" d="M{x:.1f} {y:.1f} C{curve}"/>'


def _box(node: FlowNode, lines: tuple[str, ...], size: Size, layout: Layout) -> str:
    (x, y), (width, height) = layout.centres[node.key], size
    left, top = x - width / 2, y - height / 2
    radius = height / 2 if node.kind == "port" else 5
    rect = f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:.0f}"/>'
    first = top + _PAD / 2 + 0.78 * _LINE
    texts = [
        f'<text{" class=" + chr(34) + "head" + chr(34) if index == 0 else ""} x="{x:.1f}" '
        f'y="{first + index * _LINE:.1f}" text-anchor="middle">{escape(line)}</text>'
        for index, line in enumerate(lines)
    ]
    return f'<g class="{node.kind}"><title>{escape(node.tooltip)}</title>{rect}{"".join(texts)}</g>'
