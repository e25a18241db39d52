"""One block at one stage as a small graph to draw: what computes is a node, what only reshapes is an edge."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from viditq_fx.inspection.blocks import Block, Stage, base_name, relative
from viditq_fx.inspection.breakdown import ROOT
from viditq_fx.inspection.snapshots import SnapshotNode

TRIVIAL = frozenset(
    {"getitem", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "chunk", "split", "unbind"}
    | {
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "contiguous",
        "to",
        "type_as",
        "float",
        "half",
        "bfloat16",
    }
    | {"split_with_sizes", "tensor_split", "narrow", "movedim", "detach", "size", "getattr", "view_as", "t"}
    | {"repeat_interleave", "select", "clone", "alias", "swapaxes", "double", "reshape_as", "sym_size"}
)
"""Views, casts and tuple items: they move values and compute none."""

_WRAP = 26
"""Characters of a line in a box of several ops."""

KINDS = {
    "quantized": "quantized site",
    "step": "quantize step",
    "simulated": "rounded, in floating point",
    "kept": "kept in full precision",
    "refused": "refused",
    "other": "not a site",
    "port": "input or output of the block",
}
"""Kind of a node -> what the legend says."""


@dataclass(frozen=True, kw_only=True)
class FlowNode:
    """A box."""

    key: str
    kind: str
    lines: tuple[str, ...]
    """What is written in it: op, site and role, type."""
    tooltip: str
    part: str = ""
    """Of a site: the part of the block that it stands in, the first step of its path."""


@dataclass(frozen=True, kw_only=True)
class FlowGraph:
    """Boxes and arrows."""

    title: str
    nodes: tuple[FlowNode, ...]
    edges: tuple[tuple[str, str], ...]


def flow_graph(block: Block, stage: Stage) -> FlowGraph:
    """The graph to draw for a block at a stage."""
    return _Builder(block, stage).build()


class _Builder:
    def __init__(self, block: Block, stage: Stage) -> None:
        self._block, self._stage = block, stage
        self._inside = {node.name: node for node in stage.nodes}
        self._prefix = "" if block.name == ROOT else block.name

    def build(self) -> FlowGraph:
        shown = [node for node in self._stage.nodes if _is_shown(node)]
        edges: dict[tuple[str, str], None] = {}
        ports: dict[str, FlowNode] = {}
        for node in shown:
            for source in self._sources(node.inputs):
                if source not in self._inside:
                    ports[source] = self._port(source)
                edges[source, node.name] = None
        outputs: dict[str, FlowNode] = {}
        for name in sorted(self._stage.exported, key=list(self._inside).index):
            for source in self._sources([name]):
                if source in self._inside:
                    key = f"out:{source}"
                    outputs[key] = FlowNode(key=key, kind="port", lines=("output",), tooltip=base_name(name))
                    edges[source, key] = None
        nodes = (*ports.values(), *map(self._node, shown), *outputs.values())
        alike = f" and {len(self._block.alike)} alike" if self._block.alike else ""
        title = f"{self._block.name}{alike}, {_moment(self._stage.after)}"
        return _folded(FlowGraph(title=title, nodes=nodes, edges=tuple(edges)))

    def _sources(self, names: Iterable[str]) -> list[str]:
        """The shown nodes that the named ones are, or are views of."""
        found: dict[str, None] = {}
        queue = list(names)
        seen: set[str] = set()
        while queue:
            name = queue.pop(0)
            if name in seen:
                continue
            seen.add(name)
            inside = self._inside.get(name)
            node = inside or self._stage.outside[name]
            if node.parameter or not node.shape:
                continue
            if inside is None or _is_shown(node):
                found[name] = None
            else:
                queue += node.inputs
        return list(found)

    def _port(self, name: str) -> FlowNode:
        node = self._stage.outside[name]
        part = base_name(name) == "getitem" and node.inputs  # say of what
        label = node.target if node.op == "placeholder" else base_name(node.inputs[0] if part else name)
        return FlowNode(
            key=name, kind="port", lines=(label, _type(node)), tooltip=f"from {node.module or 'outside'}"
        )

    def _node(self, node: SnapshotNode) -> FlowNode:
        if node.op == "placeholder":
            return FlowNode(
                key=node.name, kind="port", lines=(node.target, _type(node)), tooltip="model input"
            )
        lines = [node.target]
        if node.site is not None:
            path = relative(node.site, self._prefix)
            members = [f"{relative(member, self._prefix)} · {role}" for member, role in node.members]
            lines += members or [f"for {path}" if node.part else f"{path} · {node.role}"]
        tooltip = [f"{node.target} in {node.module or 'the model'}"]
        if node.outcome is not None and node.part is None:
            tooltip.append(f"{node.outcome}{': ' + node.reason if node.reason else ''}")
        is_step = node.part is not None and not node.members
        kind = "other" if node.site is None else "step" if is_step else str(node.outcome)
        path = "" if node.site is None or is_step else relative(node.site, self._prefix)
        return FlowNode(
            key=node.name,
            kind=kind,
            lines=(*lines, _type(node)),
            tooltip="\n".join(tooltip),
            part=path.partition(".")[0].strip("()") if path != "(block)" else "",
        )


def _folded(graph: FlowGraph) -> FlowGraph:
    """Ops that are no sites and lead to one such op alone, as one box with it: a gate and its residual, RoPE.

    Whatever leaves such a box leaves it from its last op, so no arrow can come to lead back.
    """
    kinds = {node.key: node.kind for node in graph.nodes}
    users: dict[str, list[str]] = defaultdict(list)
    for source, target in graph.edges:
        users[source].append(target)
    home = {key: key for key in kinds}
    for node in reversed(graph.nodes):  # in order of the graph: users come later
        homes = {home[user] for user in users[node.key]}
        if node.kind == "other" and len(homes) == 1 and kinds[next(iter(homes))] == "other":
            home[node.key] = homes.pop()
    members: dict[str, list[FlowNode]] = defaultdict(list)
    for node in graph.nodes:
        members[home[node.key]].append(node)
    edges = dict.fromkeys((home[a], home[b]) for a, b in graph.edges if home[a] != home[b])
    nodes = tuple(_as_one(members[node.key]) for node in graph.nodes if node.key in members)
    return replace(graph, nodes=nodes, edges=tuple(edges))


def _as_one(nodes: list[FlowNode]) -> FlowNode:
    """One box for several ops, in their order; the last one's type is what leaves it."""
    last = nodes[-1]
    if len(nodes) == 1:
        return last
    counts = Counter(node.lines[0] for node in nodes)
    words = [name if count == 1 else f"{name} ×{count}" for name, count in counts.items()]
    lines = textwrap.wrap(", ".join(words), _WRAP, break_long_words=False)
    tooltip = "\n".join(f"{node.tooltip}: {node.lines[-1]}" for node in nodes)
    return replace(last, lines=(*lines, last.lines[-1]), tooltip=tooltip)


def _moment(after: str) -> str:
    return "as captured" if after == "captured" else f"after {after}"


def _is_shown(node: SnapshotNode) -> bool:
    return not node.parameter and bool(node.shape) and node.target not in TRIVIAL


def _type(node: SnapshotNode) -> str:
    return f"{node.dtype} {node.shape}".strip()
