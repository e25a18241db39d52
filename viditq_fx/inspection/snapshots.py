"""Light copies of the graph before and after each pass, taken from a trace made for that purpose alone.

Compiling keeps no copy of any graph: a model that is not looked at pays nothing.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from viditq_fx.errors import ViditqError
from viditq_fx.graph_edit import copy_graph_module, example
from viditq_fx.ops.packed_weights import is_released
from viditq_fx.options import CompileOptions
from viditq_fx.passes.annotate_sites import SITE_KEY, fqn_of_node
from viditq_fx.passes.dataflow import is_parameter, source_name
from viditq_fx.passes.effects import op_name
from viditq_fx.passes.pipeline import build_pipeline, context_of
from viditq_fx.passes.place_weights import SLOT_KEY
from viditq_fx.passes.roles import ATTENTION_NAMES
from viditq_fx.passes.work import ATTENTION
from viditq_fx.quantize import _fresh_call
from viditq_fx.report import CompileReport, SiteReport
from viditq_fx.site import fqn_of_source

CAPTURED = "captured"
"""The stage before the first pass."""
_DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64", "int64": "i64"}
_DTYPES |= {"int32": "i32", "int8": "i8", "uint8": "u8", "bool": "b8"}
_INPUT = re.compile(r"""^L\[['"](?:kwargs['"]\]\[['"])?([^'"]+)['"]\](.*)$""")
_LONGEST = 16


@dataclass(frozen=True, kw_only=True)
class SnapshotNode:
    """One node of a graph, as text."""

    name: str
    op: str
    """FX's kind: placeholder, get_attr, call_function, call_method, call_module, output."""
    target: str
    """Bare name of what is called; the source of a placeholder, e.g. "blocks.0.q.weight"."""
    args: str
    """Arguments as text, nodes as %name."""
    inputs: tuple[str, ...]
    shape: str
    """E.g. "2x40x64"; empty for what is no tensor."""
    dtype: str
    module: str
    """Path of the innermost module that the node comes from."""
    parameter: bool = False
    """A placeholder of a parameter, a buffer, or a packed weight."""
    annotated: bool = False
    """Some pass had made it a site by then; what became of it is told at every stage."""
    site: str | None = None
    """Path of the site that the node is, or belongs to."""
    part: str | None = None
    """None for the site itself; "input" or "weight" for a step of its quantization; "wide" for one GEMM that
    computes several sites, which then are slices of it."""
    members: tuple[tuple[str, str], ...] = ()
    """(path, role) of the sites that a wide GEMM computes."""
    role: str | None = None
    outcome: str | None = None
    """See `SiteReport.outcome`; None where the node is no site."""
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One graph as one pass left it."""

    graph: int
    """Dynamo makes several graphs of a model that it cannot trace whole: 0, 1, ..."""
    after: str
    """Name of the pass, or "captured" for Dynamo's own graph."""
    nodes: tuple[SnapshotNode, ...]


SiteKey = tuple[str, bool]
"""(path, whether it is an attention call): a block's own path may name its attention."""


@dataclass(kw_only=True)
class Outcome:
    """What the report says about a site; the trace for snapshots must agree with what ran."""

    role: str
    outcome: str
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one trace recorded; outcomes are filled in when it is known what ran."""

    recorders: tuple[_Recorder, ...]

    def snapshots(self, outcomes: Mapping[SiteKey, Outcome]) -> list[Snapshot]:
        """All graphs at all stages; `outcomes` (site path -> what ran) goes before what the trace itself found."""
        return [snapshot for recorder in self.recorders for snapshot in recorder.snapshots(outcomes)]


def trace(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], options: CompileOptions) -> Trace:
    """Run `model` once, eagerly, under a trace that runs only the passes and records each graph round each.

    The passes are those that the backend would run with these options, extra ones and plugins included.
    Raises ViditqError for what is no module, or cannot run eagerly any more.
    """
    check_traceable(model)
    recorders: list[_Recorder] = []

    def capture(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        recorder = _Recorder(index=len(recorders))
        recorders.append(recorder)
        recorder.run(copy_graph_module(gm), options)
        return gm.forward

    with torch.no_grad(), _uncompiled(model):
        # dynamic=False: what shapes other models were called with must not show in this one's.
        torch.compile(_fresh_call(model), backend=capture, dynamic=False)(*args, **kwargs)
    return Trace(recorders=tuple(recorders))


def check_traceable(model: Any) -> None:
    """Raise ViditqError where `trace` cannot run the model: it needs a module that still runs eagerly."""
    if not isinstance(model, nn.Module):
        raise ViditqError(
            f"graphs=True needs a torch.nn.Module, not {type(model).__name__}: it is traced once more"
        )
    if any(is_released(parameter) for parameter in model.parameters()):
        raise ViditqError(
            "graphs=True runs the plain model once, and its full-precision weights are released: explain the plain "
            "model with options={...} before it is compiled, or compile with weights='keep'"
        )


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Take `module.compile()` away for a while, so that the whole model is traced and not its compiled blocks."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


@dataclass(kw_only=True)
class _Recorder:
    """Copies one graph's nodes after each pass; outcomes are known only after the last."""

    index: int
    stages: list[tuple[str, list[dict[str, Any]]]] = field(default_factory=list)
    entries: dict[str, SiteReport] = field(default_factory=dict)
    """Name of every node that is a site at some stage -> its report."""
    wide: dict[str, dict[str, SiteReport]] = field(default_factory=dict)
    """Name of a node that computes several sites -> those, by the name of their slice."""

    def run(self, gm: fx.GraphModule, options: CompileOptions) -> None:
        report = CompileReport(scheme=str(options.scheme), device="")
        ctx = context_of(options, report)
        self._copy(CAPTURED, gm, ())

        def observe(name: str, left: fx.GraphModule) -> None:
            self.entries |= ctx.sites
            for part, (computing, _) in ctx.computed_by.items():
                if part in ctx.sites:
                    self.wide.setdefault(computing, {})[part] = ctx.sites[part]
            self._copy(name, left, ctx.sites)

        build_pipeline(options, report, observe).run(gm, ctx)

    def _copy(self, after: str, gm: fx.GraphModule, sites: Container[str]) -> None:
        nodes = [_describe(node) | {"annotated": node.name in sites} for node in gm.graph.nodes]
        self.stages.append((after, nodes))

    def snapshots(self, outcomes: Mapping[SiteKey, Outcome]) -> Iterator[Snapshot]:
        for after, nodes in self.stages:
            finished = tuple(self._finish(node, outcomes) for node in nodes)
            yield Snapshot(graph=self.index, after=after, nodes=finished)

    def _finish(self, raw: dict[str, Any], outcomes: Mapping[SiteKey, Outcome]) -> SnapshotNode:
        raw = dict(raw)
        part_of: Any = raw.pop("part_of")
        entry = self.entries.get(raw["name"])
        if entry is not None:
            known = outcomes.get((entry.fqn, entry.role == ATTENTION)) or Outcome(
                role=entry.role, outcome=entry.outcome, reason=entry.reason
            )
            raw |= {"site": entry.fqn, "role": known.role, "outcome": known.outcome, "reason": known.reason}
        elif raw["name"] in self.wide:
            members = [(entry.fqn, entry.role) for entry in self.wide[raw["name"]].values()]
            raw |= {"site": members[0][0], "part": "wide", "members": tuple(members), "outcome": "quantized"}
        elif part_of is not None:
            known = outcomes.get(part_of.fqn)
            raw |= {
                "site": part_of.fqn,
                "part": part_of.role,
                "outcome": known.outcome if known else "quantized",
            }
        elif raw["target"] in ATTENTION_NAMES and raw["op"] == "call_function":
            raw |= {"site": raw["module"], "role": ATTENTION, "outcome": "kept"}
        return SnapshotNode(**raw)


def _describe(node: fx.Node) -> dict[str, Any]:
    shape, dtype = _type_of(example(node))
    slot = SLOT_KEY in node.meta
    part_of = node.meta.get(SITE_KEY)
    return {
        "name": node.name,
        "op": node.op,
        "target": _source(node, part_of) if node.op in {"placeholder", "get_attr"} else op_name(node),
        "args": "" if node.op == "placeholder" else _arguments(node),
        "inputs": tuple(source.name for source in node.all_input_nodes),
        "shape": shape,
        "dtype": dtype,
        "module": fqn_of_node(node),
        "parameter": slot or is_parameter(node),
        "part_of": part_of,
    }


def _source(node: fx.Node, site: Any) -> str:
    """Where a placeholder comes from: a parameter's path, an argument's name, or a packed weight."""
    if SLOT_KEY in node.meta and site is not None:
        kind = node.name.rpartition("_")[2]
        return f"{site.fqn}.bias.joined" if kind == "joined" else f"{site.fqn}.weight.{kind}"
    source = source_name(node) or str(node.target)
    if is_parameter(node):
        return fqn_of_source(source)
    match = _INPUT.match(source)
    return match.group(1) + match.group(2) if match else source


def _type_of(value: Any) -> tuple[str, str]:
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return "x".join(str(size) for size in value.shape), _DTYPES.get(name, name)
    if isinstance(value, tuple | list):
        shapes = [_type_of(item)[0] for item in value]
        return ("(" + ", ".join(shapes) + ")", "") if any(shapes) else ("", "")
    return "", ""


def _arguments(node: fx.Node) -> str:
    text = [_text(arg) for arg in node.args] + [f"{key}={_text(arg)}" for key, arg in node.kwargs.items()]
    return ", ".join(text)


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, tuple | list):
        shown = [*map(_text, value[:_LONGEST]), *(["..."] if len(value) > _LONGEST else [])]
        return "(" + ", ".join(shown) + ")"
    if isinstance(value, slice):
        return ":".join("" if x is None else _text(x) for x in (value.start, value.stop, value.step))
    return str(value).removeprefix("torch.")
