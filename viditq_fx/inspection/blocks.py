"""Snapshots cut into blocks, each as text before and after every pass; blocks that are alike are told once."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from viditq_fx.inspection.breakdown import ROOT, block_of
from viditq_fx.inspection.snapshots import Snapshot, SnapshotNode

_REFERENCE = re.compile(r"%(\w+)")
_NUMBER = re.compile(r"(_default)?(_\d+)?$")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One block as one pass left it."""

    after: str
    nodes: tuple[SnapshotNode, ...]
    outside: dict[str, SnapshotNode]
    """Nodes of other blocks that this one reads, by name."""
    exported: frozenset[str]
    """Names of the nodes that other blocks read."""
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Diff:
    """What one pass changed in a block."""

    name: str
    text: str
    """Unified diff; empty when nothing changed."""
    added: int
    removed: int


@dataclass(kw_only=True)
class Block:
    """One block of one graph, through all passes."""

    name: str
    graph: int
    stages: tuple[Stage, ...]
    alike: list[str] = field(default_factory=list)
    """Other blocks with the same text at every stage."""

    @property
    def sites(self) -> int:
        """Sites in it, at the last stage."""
        return sum(node.site is not None and node.part is None for node in self.stages[-1].nodes)

    @property
    def quantized(self) -> int:
        """Of these, the quantized ones."""
        nodes = self.stages[-1].nodes
        return sum(node.outcome == "quantized" and node.part is None for node in nodes)

    def to_dict(self) -> dict[str, Any]:
        """The block as plain data: its graph after the last pass, and what each pass changed."""
        nodes = [asdict(node) for node in self.stages[-1].nodes]
        diffs = [asdict(diff) for diff in self.diffs]
        return {"name": self.name, "graph": self.graph, "alike": self.alike, "nodes": nodes, "diffs": diffs}

    @cached_property
    def diffs(self) -> tuple[Diff, ...]:
        """One entry a pass."""
        pairs = zip(self.stages, self.stages[1:], strict=False)
        return tuple(_diff(before, after) for before, after in pairs)


def find_blocks(snapshots: Sequence[Snapshot]) -> list[Block]:
    """The blocks of all graphs in order of their first node, alike ones merged."""
    graphs: dict[int, list[Snapshot]] = defaultdict(list)
    for snapshot in snapshots:
        graphs[snapshot.graph].append(snapshot)
    found: dict[tuple[tuple[str, ...], ...], Block] = {}
    for index, stages in graphs.items():
        for block in _blocks_of(index, stages):
            same = found.setdefault(tuple(stage.lines for stage in block.stages), block)
            if same is not block:
                same.alike.append(block.name)
    return list(found.values())


def choose_block(blocks: Sequence[Block], name: str | None = None) -> Block | None:
    """The block with this name, or the typical one; None when there is none.

    Typical is the kind that occurs most often - a model's first block often differs from all others - and of
    several such the one with most quantized sites.
    """
    if name is not None:
        return next((b for b in blocks if name in {b.name, *b.alike}), None)
    inside = [b for b in blocks if b.name != ROOT] or list(blocks)
    with_sites = [b for b in inside if b.sites] or inside
    return max(with_sites, key=lambda b: (len(b.alike), b.quantized, b.sites), default=None)


def _home(node: SnapshotNode) -> str:
    return block_of(node.target if node.parameter else node.module)


def _blocks_of(index: int, stages: Sequence[Snapshot]) -> list[Block]:
    members: dict[str, list[list[SnapshotNode]]] = {}
    for position, snapshot in enumerate(stages):
        for node in snapshot.nodes:
            if node.op != "output":
                lists = members.setdefault(_home(node), [[] for _ in stages])
                lists[position].append(node)
    tables = [{node.name: node for node in snapshot.nodes} for snapshot in stages]
    return [_block(name, index, stages, lists, tables) for name, lists in members.items()]


def _block(
    name: str,
    index: int,
    stages: Sequence[Snapshot],
    members: list[list[SnapshotNode]],
    tables: list[dict[str, SnapshotNode]],
) -> Block:
    labels = _Labels(name)
    made = []
    for snapshot, nodes, table in zip(stages, members, tables, strict=True):
        inside = {node.name for node in nodes}
        read = {source for node in nodes for source in node.inputs} - inside
        exported = {s for n in snapshot.nodes if n.name not in inside for s in n.inputs if s in inside}
        outside = {source: table[source] for source in sorted(read)}
        lines = tuple(labels.line(node, outside) for node in nodes)
        stage = Stage(
            after=snapshot.after,
            nodes=tuple(nodes),
            outside=outside,
            exported=frozenset(exported),
            lines=lines,
        )
        made.append(stage)
    return Block(name=name, graph=index, stages=tuple(made))


class _Labels:
    """Names within one block, the same at every stage and in every block that is alike."""

    def __init__(self, block: str) -> None:
        self._prefix = "" if block == ROOT else block
        self._names: dict[str, str] = {}
        self._taken: dict[str, int] = defaultdict(int)

    def line(self, node: SnapshotNode, outside: dict[str, SnapshotNode]) -> str:
        """label: type = call(arguments)  # site"""

        def rename(match: re.Match[str]) -> str:
            other = outside.get(match.group(1))
            return self._label(match.group(1), other, "outer.")

        label = self._label(node.name, node if node.parameter else None, "")
        args = _REFERENCE.sub(rename, node.args)
        call = "input" if node.op == "placeholder" else f"{node.target}({args})"
        kind = f": {node.dtype}[{node.shape}]" if node.shape else ""
        return f"{label}{kind} = {call}{self._comment(node)}"

    def _comment(self, node: SnapshotNode) -> str:
        if node.site is None or not (node.annotated or node.part):
            return ""
        if node.members:
            return "  # one GEMM for " + ", ".join(
                f"{self.relative(path)} {role}" for path, role in node.members
            )
        path = self.relative(node.site)
        words = [path, f"({node.part})" if node.part else node.role, None if node.part else node.outcome]
        return "  # " + " ".join(word for word in words if word)

    def relative(self, path: str) -> str:
        return relative(path, self._prefix)

    def _label(self, name: str, node: SnapshotNode | None, prefix: str) -> str:
        if name not in self._names:
            if node is not None and node.parameter:
                base = self.relative(node.target)
            else:
                base = (prefix if node is not None else "") + base_name(name)
            count = self._taken[base]
            self._taken[base] += 1
            self._names[name] = f"{base}_{count}" if count else base
        return self._names[name]


def base_name(name: str) -> str:
    """A node's name without what FX added to make it unique: "linear_w8a8_default_3" -> "linear_w8a8"."""
    stripped = _NUMBER.sub("", name.strip("_"))
    for start in ("l_kwargs_", "l_args_", "l_"):
        stripped = stripped.removeprefix(start)
    return stripped or name


def relative(path: str, block: str) -> str:
    """A path inside a block as the block sees it."""
    return path.removeprefix(f"{block}.") if block and path != block else path if path != block else "(block)"


def _diff(before: Stage, after: Stage) -> Diff:
    lines = list(difflib.unified_diff(before.lines, after.lines, before.after, after.after, "", "", 2, ""))
    body = lines[2:]
    return Diff(
        name=after.after,
        text="\n".join(lines),
        added=sum(line.startswith("+") for line in body),
        removed=sum(line.startswith("-") for line in body),
    )
