"""The torch.compile backend "viditq": options, passes, kernel selection, Inductor, runtime."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._logging._internal import trace_structured

from viditq_fx.errors import OptionError, RecipeError, StrictError
from viditq_fx.options import CompileOptions, split_options, unknown_option
from viditq_fx.recipe import Recipe
from viditq_fx.report import CompileReport

if TYPE_CHECKING:
    from viditq_fx.runtime import CompiledGraph


def viditq_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph quantized; `torch.compile(model, backend="viditq")` calls this.

    `options` holds viditq's keys (see CompileOptions) and Inductor's, `mode` is Inductor's.
    Raises OptionError or SchemeError for a wrong option, StrictError for a refusal under
    `strict=True`. A graph that wants gradients is compiled by plain Inductor, with a Reject.
    """
    ours, inductor = read_options(options, mode)
    report = CompileReport(scheme=str(ours.scheme), device=_device(example_inputs))
    # Imported late: Dynamo loads this module to look the backend up, also for other backends.
    from viditq_fx.runtime import CompiledGraph, wants_gradients

    if wants_gradients(example_inputs):
        reason = "the graph wants gradients: run it under torch.no_grad() or torch.inference_mode()"
        _refuse_graph(report, reason, ours)
        compiled = inductor(gm, example_inputs)
        return CompiledGraph(
            compiled=compiled,
            passed_through=range(len(example_inputs)),
            weights=(),
            full_weights=_parameters(gm),
            report=report,
            options=ours,
        )
    if ours.low_scheme is not None:
        return _compile_pair(gm, example_inputs, ours, (mode, options), report)
    if ours.recipe is not None and ours.recipe.ranges > 1:
        return _compile_ranges(gm, example_inputs, ours, (mode, options), report)
    return _compile_quantized(gm, example_inputs, ours, inductor, report)


def _compile_pair(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    ours: CompileOptions,
    asked: tuple[str | None, Mapping[str, Any] | None],
    report: CompileReport,
) -> Callable[..., Any]:
    """Compile a graph in both schemes; each call then runs one (switching.py). The report is that of the high one."""
    from viditq_fx.passes.dataflow import is_parameter
    from viditq_fx.switching_graph import SwitchingGraph
    from viditq_fx.timestep import TIMESTEP_NAMES

    assert ours.low_scheme is not None
    # Both quantize the same sites: the high one weighs none either.
    recipe = None if ours.recipe is None else ours.recipe.with_inputs_of(ours.low_scheme)
    low = replace(ours, scheme=ours.low_scheme, recipe=recipe, low_scheme=None, selection="always")
    low_report = CompileReport(scheme=str(low.scheme), device=report.device)
    runs = []
    for options, told in ((low, low_report), (ours, report)):
        runs.append(_compile_quantized(gm, example_inputs, options, _fresh_inductor(asked, ours), told))
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    timestep = _timestep_position(placeholders, example_inputs, TIMESTEP_NAMES)
    if timestep is None:
        report.rejects.append(
            f"no argument of this graph is called {', '.join(TIMESTEP_NAMES)}: it runs in {ours.scheme} unless "
            "viditq_fx.switch_bits(model) decides for the whole model"
        )
    return SwitchingGraph(
        low=runs[0],
        high=runs[1],
        rule=ours.rule,
        timestep=timestep,
        weights=[index for index, node in enumerate(placeholders) if is_parameter(node)],
        report=report,
    )


def _compile_ranges(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    ours: CompileOptions,
    asked: tuple[str | None, Mapping[str, Any] | None],
    report: CompileReport,
) -> Callable[..., Any]:
    """Compile a graph once for each distinct plan that a recipe has by range; each call runs one (range_graph.py).

    Raises RecipeError where the graph has sites with ranges, and no timestep to choose by.
    """
    from viditq_fx.range_graph import RangeGraph, ranges_report
    from viditq_fx.timestep import TIMESTEP_NAMES

    recipe = ours.recipe
    assert recipe is not None
    plans = [tuple(p.by_range[i] for p in recipe.sites.values() if p.by_range) for i in range(recipe.ranges)]
    distinct = list(dict.fromkeys(plans))
    sites = _ranged_sites(gm, ours, recipe) if len(distinct) > 1 else []
    if not sites:
        single = replace(ours, recipe=recipe.at_range(0))
        return _compile_quantized(gm, example_inputs, single, _fresh_inductor(asked, ours), report)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    wanted = TIMESTEP_NAMES if recipe.timestep is None else (recipe.timestep,)
    timestep = _timestep_position(placeholders, example_inputs, wanted)
    if timestep is None:
        raise RecipeError(
            f"{sites[0]}: the recipe has a scheme for each of {recipe.ranges} ranges of the timestep, but this graph "
            f"has no tensor argument {' or '.join(map(repr, wanted))}: compile the whole model in one graph, and not "
            "its blocks; pass the timestep as a tensor; or take one range for all steps, recipe.at_range(i)"
        )
    reports = [report, *(CompileReport(scheme=report.scheme, device=report.device) for _ in distinct[1:])]
    graphs = []
    for plan, told in zip(distinct, reports, strict=True):
        told.in_ranges = tuple(i for i, other in enumerate(plans) if other == plan)
        options = replace(ours, recipe=recipe.at_range(told.in_ranges[0]))
        inductor = _fresh_inductor(asked, ours)
        graphs.append(_compile_quantized(gm, example_inputs, options, inductor, told))
    graph_of = [distinct.index(plan) for plan in plans]
    whole = ranges_report(recipe.range_edges, graph_of, graphs, example_inputs)
    for told in reports:
        told.ranges = whole
    return RangeGraph(
        graphs=graphs,
        graph_of=graph_of,
        edges=recipe.range_edges,
        timestep=timestep,
        release=ours.weights == "release",
    )


def _ranged_sites(gm: fx.GraphModule, ours: CompileOptions, recipe: Recipe) -> list[str]:
    """Paths of the sites of a graph that have schemes by range."""
    from viditq_fx.graph_edit import copy_graph_module
    from viditq_fx.passes.annotate_sites import AnnotateSites
    from viditq_fx.passes.normalize import Normalize
    from viditq_fx.passes.pipeline import context_of

    report = CompileReport(scheme=str(ours.scheme), device="")
    ctx = context_of(replace(ours, recipe=recipe.at_range(0)), report)
    graph = copy_graph_module(gm)
    for step in (Normalize(), AnnotateSites()):
        step.run(graph, ctx)
    planned = [entry.fqn for entry in report.sites if entry.planned is not None]
    return [fqn for fqn in planned if fqn in recipe.sites and recipe.sites[fqn].by_range]


def _timestep_position(
    placeholders: Sequence[fx.Node], example_inputs: Sequence[Any], wanted: Sequence[str]
) -> int | None:
    """Which argument of a graph is a tensor of one of these names, the first of them first."""
    names = _source_names(placeholders)
    found = [
        index
        for known in wanted
        for index, name in enumerate(names)
        if name.endswith(f"[{known!r}]") and isinstance(example_inputs[index], Tensor)
    ]
    return found[0] if found else None


def _fresh_inductor(asked: tuple[str | None, Mapping[str, Any] | None], ours: CompileOptions) -> Any:
    """A compiler object of its own for each graph: compiling writes into the compiler's options."""
    mode, options = asked
    known = CompileOptions.names()
    theirs = {key: value for key, value in (options or {}).items() if key not in known}
    return _inductor(mode or ours.mode, theirs)


def _compile_quantized(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    ours: CompileOptions,
    inductor: Any,
    report: CompileReport,
) -> CompiledGraph:
    from viditq_fx.graph_edit import copy_graph_module
    from viditq_fx.lowering.select import compile_with_kernels
    from viditq_fx.lowering.templates import extra_templates
    from viditq_fx.passes.pipeline import build_pipeline, context_of
    from viditq_fx.passes.site_plan import unseen_sites
    from viditq_fx.runtime import CompiledGraph

    original = [node for node in gm.graph.nodes if node.op == "placeholder"]
    quantized = copy_graph_module(gm)
    ctx = context_of(ours, report)
    pipeline = build_pipeline(ours, report, _trace)
    pipeline.run(quantized, ctx)
    unseen = unseen_sites(ours.recipe, report)
    report.rejects += unseen
    if ours.strict:
        _raise_refusals(report, unseen)
    _warn_unmatched(ours.keep, report)

    positions = {node.name: index for index, node in enumerate(original)}
    values, passed_through = _arguments(quantized, positions, example_inputs)
    sources = _source_names(original)
    templates = extra_templates(ours, report)
    compiled = compile_with_kernels(
        quantized,
        values,
        inductor,
        templates=templates,
        foreign=_foreign(pipeline.extra, templates),
        quantize_kernels=ours.quantize_kernels,
    )
    for name, entry in ctx.sites.items():
        if entry.done is not None and entry.kernel is None:
            choice = compiled.choice(*ctx.computed_by.get(name, (name, entry.fqn)))
            entry.kernel, entry.reason = choice.kernel, choice.reason or entry.reason
    return CompiledGraph(
        compiled=compiled.run,
        passed_through=passed_through,
        constants=[slot.value for slot in ctx.constant_slots],
        weights=_weight_arguments(ctx.weight_slots, positions, sources),
        biases=[tuple(positions[name] for name in slot.sources) for slot in ctx.bias_slots],
        full_weights=[(i, sources[i]) for i in passed_through if sources[i].endswith("['weight']")],
        report=report,
        options=ours,
    )


def _arguments(
    quantized: fx.GraphModule, positions: Mapping[str, int], example_inputs: Sequence[Any]
) -> tuple[list[Any], list[int]]:
    """(example inputs of the quantized graph, which of the original graph's it still takes)."""
    from viditq_fx.graph_edit import example
    from viditq_fx.passes.site_plan import SLOT_KEY

    values: list[Any] = []
    passed_through: list[int] = []
    for node in quantized.graph.nodes:
        if node.op != "placeholder":
            continue
        if SLOT_KEY in node.meta:
            values.append(example(node))
        else:
            passed_through.append(positions[node.name])
            values.append(example_inputs[positions[node.name]])
    return values, passed_through


def _foreign(passes: Sequence[Any], templates: Sequence[Any]) -> tuple[str, ...] | None:
    """What identifies the code from outside in cache keys; None where its files are not known."""
    from viditq_fx.plugins import class_files, identity, package_files

    return identity(
        [(f"{type(step).__qualname__} {step!r}", class_files(type(step))) for step in passes]
        + [(f"{t.name} {t.configs}", package_files(t.source_file)) for t in templates]
    )


def _warn_unmatched(keep: tuple[str, ...], report: CompileReport) -> None:
    from viditq_fx.passes.policy import unmatched

    roles = ", ".join(sorted({site.role for site in report.sites}))
    for pattern in unmatched(keep, report.sites) if report.sites else ():
        warnings.warn(
            f"viditq: keep={pattern!r} names none of the {len(report.sites)} linears of this graph; paths are "
            f"relative to what is compiled (a block, under regional compilation), e.g. {report.sites[-1].fqn!r}; "
            f"roles here are {roles}",
            stacklevel=2,
        )


def _trace(name: str, gm: fx.GraphModule) -> None:
    """Put the graph that a pass left into torch's structured trace (TORCH_TRACE), where tlparse shows it."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"viditq_{name}", "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False),
    )


def _weight_arguments(
    slots: Sequence[Any], positions: Mapping[str, int], sources: Sequence[str]
) -> list[Any]:
    from viditq_fx.runtime import WeightArgument

    return [
        WeightArgument(
            indices=tuple(positions[name] for name in slot.sources),
            names=tuple(sources[positions[name]] for name in slot.sources),
            form=slot.form,
            frees_source=slot.frees_source,
        )
        for slot in slots
    ]


def _source_names(placeholders: Sequence[fx.Node]) -> list[str]:
    from viditq_fx.passes.dataflow import source_name

    return [source_name(node) or node.name for node in placeholders]


def _parameters(gm: fx.GraphModule) -> list[tuple[int, str]]:
    from viditq_fx.passes.dataflow import is_parameter

    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    names = _source_names(placeholders)
    return [(i, names[i]) for i, node in enumerate(placeholders) if is_parameter(node)]


def read_options(options: Mapping[str, Any] | None, mode: str | None = None) -> tuple[CompileOptions, Any]:
    """Our options, and Inductor's compiler object that holds the rest.

    Raises OptionError (SchemeError for a scheme) for what neither knows or for a value of a wrong type.
    """
    ours, theirs = split_options(options)
    if ours.extra_passes:
        from viditq_fx.passes.pipeline import arrange_extra

        arrange_extra(ours)
    return ours, _inductor(mode or ours.mode, theirs)


def _inductor(mode: str | None, options: dict[str, Any]) -> Any:
    """Inductor's own compiler object: it checks mode and options as backend="inductor" does."""
    try:
        return torch._TorchCompileInductorWrapper(mode, options, None)
    except RuntimeError as error:
        text = str(error)
        for key in options:
            if text.startswith(f"Unexpected optimization option {key},"):
                known = text.partition("[")[2].rstrip("]").replace("'", "").split(", ")
                raise unknown_option(key, known) from error
        raise OptionError(f"Inductor refuses an option or mode: {text}") from error


def _device(example_inputs: Sequence[Any]) -> str:
    for value in example_inputs:
        if isinstance(value, Tensor):
            return value.device.type
    return "cpu"


def _refuse_graph(report: CompileReport, reason: str, options: CompileOptions) -> None:
    if options.strict:
        raise StrictError(f"strict=True: {reason}")
    report.rejects.append(reason)
    warnings.warn(f"viditq: compiled by plain Inductor, not quantized: {reason}", stacklevel=2)


def _raise_refusals(report: CompileReport, unseen: Sequence[str]) -> None:
    refused = [
        entry
        for entry in (*report.sites, *report.attention)
        if entry.planned is not None and entry.done is None
    ]
    if refused:
        lines = "\n".join(f"  {entry.fqn}: {entry.reason}" for entry in refused)
        raise StrictError(
            f"strict=True: {len(refused)} planned sites were refused:\n{lines}\n"
            "Name them in options={'keep': [...]} to leave them in full precision on purpose"
        )
    if unseen:
        raise StrictError(
            f"strict=True: {len(unseen)} linears are not in the recipe:\n  " + "\n  ".join(unseen) + "\n"
            "Calibrate this model, with samples that reach them, or name them in options={'keep': [...]}"
        )
