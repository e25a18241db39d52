"""Run a model once and gather the reports of every viditq graph that ran."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from viditq_fx.backend import read_options
from viditq_fx.calibration.findings import Findings
from viditq_fx.errors import ViditqError
from viditq_fx.inspection.errors import ErrorReport, error_report, plain_numbers
from viditq_fx.inspection.files import check_writable, write_text
from viditq_fx.inspection.retrace import options_of, options_of_call
from viditq_fx.inspection.snapshots import Outcome, Snapshot, check_traceable, trace
from viditq_fx.inspection.steps import StepHistory, step_histories
from viditq_fx.ops.packed_weights import full_bytes, is_released, packed_bytes
from viditq_fx.options import split_options
from viditq_fx.passes.work import ATTENTION
from viditq_fx.quant_conv import is_linear_layer
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.report import Declined, PassTrace, RangesReport, SiteReport
from viditq_fx.runtime import Execution, executions

if TYPE_CHECKING:
    from viditq_fx.inspection.flow_graph import FlowGraph


@dataclass(kw_only=True)
class ExplainedSite(SiteReport):
    """A site under its full module path, merged over the graphs and calls that ran it."""

    calls: int = 1
    """Times that it ran during the one call of the model; `flops` and the expected times are their sums."""
    resident_full: int = 0
    """Bytes of the full-precision weight in memory now."""
    resident_packed: int = 0
    """Bytes of its packed forms in memory now."""


@dataclass(kw_only=True)
class ExplainReport:
    """Every linear and attention call of a model that ran, with its outcome; totals; whole graphs refused."""

    model: str
    schemes: tuple[str, ...]
    device: str
    graphs: int
    """Compiled graphs that ran."""
    graph_runs: int
    """Times a compiled graph ran: more than `graphs` under regional compilation."""
    sites: list[ExplainedSite] = field(default_factory=list)
    attention: list[ExplainedSite] = field(default_factory=list)
    """Attention calls that are no sites: M = batch x heads x queries, K = head width, N = keys."""
    rejects: list[str] = field(default_factory=list)
    passes: list[PassTrace] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    """What passes left as it was and why, each place once, under its full path."""
    notes: list[str] = field(default_factory=list)
    """What to know of the call that this report is of."""
    unseen: list[str] = field(default_factory=list)
    """Linears of the model that no compiled graph runs: dead for this input, or run eagerly."""
    snapshots: list[Snapshot] = field(default_factory=list)
    """The graphs before and after each pass, under `explain(..., graphs=True)`."""
    errors: ErrorReport | None = None
    """Where quantization errors come from, under `explain(..., errors=findings)`."""
    ranges: list[RangesReport] = field(default_factory=list)
    """Bits of all ranges of the timestep, where a recipe has ranges; everything else is of this call's range."""
    steps: list[StepHistory] = field(default_factory=list)
    """What each step before this call ran at, where the model switches its bits."""
    model_bytes: int = 0
    """Bytes of memory of the model's parameters and buffers and of all packed weights now."""
    model_bytes_before: int = 0
    """Bytes of the model in full precision."""

    def count(self, outcome: str) -> int:
        """How many sites have this outcome, see `SiteReport.outcome`."""
        return sum(site.outcome == outcome for site in self.sites)

    def totals(self) -> dict[str, int]:
        """Counts of sites and bytes of memory; weights that several sites share count once."""
        unique = {site.weight or site.fqn: site for site in self.sites if site.done is not None}.values()
        return {
            "sites": len(self.sites),
            "quantized": self.count("quantized"),
            "simulated": self.count("simulated"),
            "kept": self.count("kept"),
            "refused": self.count("refused"),
            "quantized_weight_bytes_before": sum(site.bytes_full for site in unique),
            "quantized_weight_bytes_packed": sum(site.resident_packed for site in unique),
            "quantized_weight_bytes_full_resident": sum(site.resident_full for site in unique),
            "model_bytes_before": self.model_bytes_before,
            "model_bytes": self.model_bytes,
        }

    def expected_times(self) -> dict[str, float] | None:
        """Microseconds that all linears should take, "us" as they run and "full_us" in full precision.

        An estimate made before compiling (see cost_model); None where one of them is not known.
        """
        full = [site.expected_full_us for site in self.sites]
        run = [s.expected_us if s.outcome == "quantized" else s.expected_full_us for s in self.sites]
        if not full or None in full or None in run:
            return None
        return {"us": sum(us for us in run if us), "full_us": sum(us for us in full if us)}

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for JSON: what was found, its breakdown by role, kernel and pass.

        Graphs, if the report has them, stand under "blocks", those that are alike once. Of what stands under "errors"
        and "steps", numbers that are not finite are the strings "inf" and "nan": JSON has no others.
        """
        from viditq_fx.inspection.blocks import find_blocks
        from viditq_fx.inspection.breakdown import breakdown

        data = asdict(replace(self, snapshots=[]))
        del data["snapshots"]
        data["errors"] = plain_numbers(data["errors"])
        data["steps"] = [plain_numbers(history.to_dict()) for history in self.steps]
        data["blocks"] = [block.to_dict() for block in find_blocks(self.snapshots)]
        for key, sites in (("sites", self.sites), ("attention", self.attention)):
            for entry, site in zip(data[key], sites, strict=True):
                entry["outcome"] = site.outcome
        return {**data, "totals": self.totals(), "expected": self.expected_times(), **breakdown(self)}

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one HTML page that needs nothing beside itself; it shows graphs if the report has them.

        Raises ViditqError where the file cannot be written, or without jinja2.
        """
        from viditq_fx.inspection.page import render_page

        check_writable(path)
        return write_text(path, render_page(self))

    def to_svg(
        self, path: str | os.PathLike[str], *, block: str | None = None, after: str | None = None
    ) -> Path:
        """Write a picture of one block (its path; by default of the kind that occurs most often) after a pass.

        `after` is "captured", the name of a pass, or None for the last. Raises ViditqError where there
        is no such block or pass, or the file cannot be written.
        """
        from viditq_fx.inspection.drawing import to_svg

        check_writable(path)
        return write_text(path, to_svg(self.flow_graph(block, after)))

    def to_dot(
        self, path: str | os.PathLike[str], *, block: str | None = None, after: str | None = None
    ) -> Path:
        """Write the same block as Graphviz text."""
        from viditq_fx.inspection.drawing import to_dot

        check_writable(path)
        return write_text(path, to_dot(self.flow_graph(block, after)))

    def flow_graph(self, block: str | None = None, after: str | None = None) -> FlowGraph:
        """One block after one pass, ready to draw; see to_svg."""
        from viditq_fx.inspection.blocks import choose_block, find_blocks
        from viditq_fx.inspection.flow_graph import flow_graph

        if not self.snapshots:
            raise ViditqError("this report holds no graphs: call explain(..., graphs=True)")
        blocks = find_blocks(self.snapshots)
        chosen = choose_block(blocks, block)
        if chosen is None:
            names = ", ".join(repr(name) for b in blocks for name in (b.name, *b.alike))
            raise ViditqError(f"no block {block!r}; there are {names}")
        stage = next((s for s in chosen.stages if s.after == after), None if after else chosen.stages[-1])
        if stage is None:
            raise ViditqError(f"no pass {after!r}; there are {', '.join(s.after for s in chosen.stages)}")
        return flow_graph(chosen, stage)

    def __str__(self) -> str:
        from viditq_fx.inspection.render import render_text

        return render_text(self)


def explain(
    model: Any,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    graphs: bool = False,
    errors: Findings | None = None,
    **kwargs: Any,
) -> ExplainReport:
    """Run `model` once on `args` and `kwargs` and report every site of every viditq graph that ran.

    `model` is a compiled model (torch.compile with backend="viditq", also regionally), or a plain
    module, which is then compiled with `options`. What is reported is what ran: the graphs tell.
    With `graphs=True` the plain model runs once more, eagerly, to show every graph before and after
    each pass; without, no graph is kept.
    `errors`, the findings of `vq.collect` on this model, adds where quantization errors come from at every site
    (ViDiT-Q section 3.2) and what 4 bits do to its weight. Where the model switches its bits (DVD-Quant section 3.4)
    the report has the steps that it ran before.
    Raises OptionError for a wrong option, ViditqError when no viditq graph ran or `options`
    is given for a compiled model, or graphs are asked for and its weights are released, or its
    blocks were compiled with different passes, or `errors` are no findings or another model's.
    """
    read_options(options)  # a wrong option is an error of ours, not one wrapped by torch.compile
    compiled, plain = model, getattr(model, "_orig_mod", model)
    # Before anything is compiled: that may release the weights, and this call is no step of a sampler's.
    measured = None if errors is None else error_report(errors, plain)
    steps = step_histories(plain)
    if graphs:
        check_traceable(plain)
    traced = None
    if isinstance(model, nn.Module) and not _is_compiled(model):
        if graphs:  # before it is compiled: releasing its weights would leave nothing to trace
            ours = options_of_call(plain, args, kwargs, split_options(options)[0])
            traced = trace(plain, args, kwargs, ours)
        compiled = torch.compile(model, backend="viditq", options=dict(options) if options else None)
    elif options:
        raise ViditqError(
            "explain: this model is compiled already; its options are those it was compiled with"
        )
    with executions() as ran, torch.no_grad():
        compiled(*args, **kwargs)
    if not ran:
        raise ViditqError(
            "explain: no viditq graph ran; compile the model with torch.compile(model, backend='viditq') and "
            "check that torch.compile is not disabled"
        )
    report = _gather(model, ran)
    report.errors, report.steps = measured, steps
    report.notes += _notes_of_call(plain, measured)
    if graphs:
        traced = traced or trace(plain, args, kwargs, options_of(ran, report))
        report.snapshots = traced.snapshots(
            {
                (site.fqn, site.role == ATTENTION): Outcome(
                    role=site.role, outcome=site.outcome, reason=site.reason
                )
                for site in (*report.sites, *report.attention)
            }
        )
    return report


def _notes_of_call(plain: Any, measured: ErrorReport | None) -> list[str]:
    notes = []
    if (
        torch.is_grad_enabled()
        and isinstance(plain, nn.Module)
        and any(p.requires_grad for p in plain.parameters())
    ):
        notes.append(
            "This report is of a call under torch.no_grad(); where gradients are enabled, this model (its parameters "
            "require them) is left to plain Inductor and nothing is quantized."
        )
    missing = (
        [entry.site for entry in measured.sites if measured.weight(entry.site) is None] if measured else []
    )
    if missing:
        notes.append(
            f"The weights of {len(missing)} sites, e.g. {missing[0]}, are released: what 4 bits do to them is not "
            "shown. It is where explain(..., errors=...) comes before they are."
        )
    return notes


def _is_compiled(model: nn.Module) -> bool:
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())


def _gather(model: Any, ran: Sequence[Execution]) -> ExplainReport:
    module = getattr(model, "_orig_mod", model)
    names = _names(module) if isinstance(module, nn.Module) else {}
    unique = {id(run.report): run.report for run in ran}
    report = ExplainReport(
        model=type(module).__name__,
        schemes=tuple(sorted({r.scheme for r in unique.values()})),
        device=", ".join(sorted({r.device for r in unique.values()})),
        graphs=len(unique),
        graph_runs=len(ran),
        rejects=[reason for r in unique.values() for reason in r.rejects],
        passes=[trace for r in unique.values() for trace in r.passes],
    )
    sites, attention, declined = [], [], []
    for one in unique.values():
        if one.ranges is not None:
            report.ranges.append(one.ranges)
            report.notes.append(f"{one.told_ranges()}.")
    for run in ran:
        made = [
            _explain_site(entry, run.weights.get(entry.weight or ""), names) for entry in run.report.sites
        ]
        calls = [ExplainedSite(**asdict(entry)) for entry in run.report.attention]
        prefix = _prefix(run, made)
        for site in (*(s for s in made if s.weight is None), *calls):
            site.fqn = (prefix + site.fqn).rstrip(".")
        for site in made:
            site.joined = prefix + site.joined if site.joined is not None else None
        sites += made
        attention += calls
        declined += [replace(item, fqn=(prefix + item.fqn).rstrip(".")) for item in run.report.declined]
    report.sites, report.attention = _merge(sites), _merge(attention)
    report.declined = list(dict.fromkeys(declined))
    if isinstance(module, nn.Module):
        report.model_bytes, report.model_bytes_before = _model_bytes(module)
        _fill_quant_linears(module, report)
        report.unseen = _unseen(module, report)
    return report


def _merge(sites: Sequence[ExplainedSite]) -> list[ExplainedSite]:
    """One entry for all calls of a site with one outcome."""
    merged: dict[tuple[Any, ...], ExplainedSite] = {}
    for site in sites:
        key = (site.fqn, site.role, site.done, site.kernel, site.reason)
        if key not in merged:
            merged[key] = site
            continue
        merged[key].calls += 1
        merged[key].flops += site.flops
        for name in ("expected_us", "expected_full_us"):
            one, more = getattr(merged[key], name), getattr(site, name)
            setattr(merged[key], name, None if one is None or more is None else one + more)
        merged[key].flops_hinted |= site.flops_hinted
    return list(merged.values())


def _prefix(run: Execution, sites: Sequence[ExplainedSite]) -> str:
    """What a compiled block's paths lack of the model's: only the weights of a run tell which block it was."""
    for entry, site in zip(run.report.sites, sites, strict=True):
        if entry.weight is not None and entry.fqn:
            return site.fqn[: -len(entry.fqn)] if site.fqn.endswith(f".{entry.fqn}") else ""
    return ""


def _unseen(module: nn.Module, report: ExplainReport) -> list[str]:
    covered = {site.fqn for site in report.sites}
    opaque = tuple(site.fqn + "." if site.fqn else "" for site in report.sites if site.width == 0)
    names = ((site_name(name), layer) for name, layer in module.named_modules())
    linears = (name for name, layer in names if isinstance(layer, QuantLinear) or is_linear_layer(layer))
    return [name for name in linears if name not in covered and not (opaque and name.startswith(opaque))]


def _names(module: nn.Module) -> dict[int, str]:
    names: dict[int, str] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        names.setdefault(id(tensor), name.replace("_orig_mod.", "").rpartition(".")[0])
    return names


def _explain_site(entry: SiteReport, weight: Tensor | None, names: Mapping[int, str]) -> ExplainedSite:
    site = ExplainedSite(**asdict(entry))
    if weight is None:
        return site
    site.fqn = names.get(id(weight), site.fqn)
    site.weight = site.fqn + ".weight"
    if weight.is_floating_point():
        site.resident_full, site.resident_packed = full_bytes(weight), packed_bytes(weight)
    return site


def _model_bytes(module: nn.Module) -> tuple[int, int]:
    """(bytes in memory now, bytes in full precision) of a model's tensors, shared storage counted once."""
    now, before, seen = 0, 0, set()
    quantized = {id(m._weight_q): m for m in module.modules() if isinstance(m, QuantLinear)}
    keys = (layer._weight_q for layer in quantized.values())  # plain attributes: see ops.blocked
    for tensor in (*module.parameters(), *module.buffers(), *keys):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        nbytes = tensor.numel() * tensor.element_size()
        if id(tensor) in quantized:
            layer = quantized[id(tensor)]
            now += layer.resident_bytes() - layer.weight_scale.untyped_storage().nbytes()
            before += layer.in_features * layer.out_features * layer.weight_dtype.itemsize
            continue
        now += (0 if is_released(tensor) else nbytes) + packed_bytes(tensor)
        before += nbytes
    scales = sum(m.weight_scale.untyped_storage().nbytes() for m in quantized.values())
    return now, before - scales


def _fill_quant_linears(module: nn.Module, report: ExplainReport) -> None:
    layers = {site_name(name): m for name, m in module.named_modules() if isinstance(m, QuantLinear)}
    for site in report.sites:
        layer = layers.get(site.fqn)
        if layer is not None:
            site.bytes_full = layer.in_features * layer.out_features * layer.weight_dtype.itemsize
            site.resident_packed, site.resident_full = layer.resident_bytes(), 0


def site_name(path: str) -> str:
    """Module path without torch.compile's wrapper steps."""
    return ".".join(step for step in path.split(".") if step != "_orig_mod")
