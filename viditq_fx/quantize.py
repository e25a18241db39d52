"""Quantize a model in place: linears and 1x1 convolutions hold int8 weights, their full-precision memory is gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from viditq_fx.errors import OptionError, RecipeError, StrictError, ViditqError
from viditq_fx.layer_plan import Packed
from viditq_fx.options import CompileOptions, split_options
from viditq_fx.passes.annotate_sites import AnnotateSites
from viditq_fx.passes.base import PassContext
from viditq_fx.passes.dataflow import weight_parameter
from viditq_fx.passes.normalize import Normalize
from viditq_fx.passes.policy import keeps
from viditq_fx.passes.site_plan import unseen_sites
from viditq_fx.quant_conv import Convolution, is_linear_layer, quantized_layer, why_not_pointwise
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.recipe import Recipe
from viditq_fx.report import CompileReport, SiteReport
from viditq_fx.scheme import QuantScheme
from viditq_fx.site import site_of_module
from viditq_fx.timestep import clock_for


def quantize_(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    scheme: str | QuantScheme | None = None,
    keep: str | Sequence[str] = (),
    strict: bool = False,
    recipe: Recipe | str | PathLike[str] | None = None,
) -> CompileReport:
    """Replace what the policy quantizes, in place: linears by `QuantLinear`, 1x1 convolutions by `QuantPointwiseConv`.

    `args` and `kwargs` are one example call: the model runs once (without gradients), because roles
    are found in its graph. `keep` adds globs over module paths, or roles, to what stays in full
    precision; `scheme` is "w8a8" unless given. A `recipe` (of `calibrate`, or the directory of a saved one)
    brings schemes, balance and rotation by site, and its own scheme and keep. Layers that would run faster in full
    precision are quantized too: this is for memory. The model then runs eagerly and compiled, moves, copies and
    saves in int8.

    Returns the report of every site; its `rejects` name each such layer that no graph of the call showed.
    Raises SchemeError, OptionError or RecipeError for wrong arguments (a recipe with ranges of the timestep is for
    compiled models), ViditqError without an example call,
    StrictError for a refused or unseen linear under `strict=True`; in each case the model is as it was.
    """
    asked = {"keep": keep, "strict": strict, "recipe": recipe}
    options, _ = split_options(asked if scheme is None else asked | {"scheme": scheme})
    if options.low_scheme is not None:
        raise OptionError(
            f"quantize_: scheme={scheme!r} chooses its bits at every step, which compiled graphs do: pass it to "
            f'torch.compile(model, backend="viditq", options={{"scheme": {scheme!r}}})'
        )
    if options.recipe is not None and options.recipe.ranges > 1:
        raise RecipeError(
            f"quantize_: the recipe has other schemes in each of {options.recipe.ranges} ranges of the timestep, and a "
            "layer holds its weight in one: compile the model, which runs each call in its range, "
            'torch.compile(model, backend="viditq", options={"recipe": recipe}), or take one range for all steps, '
            "quantize_(..., recipe=recipe.at_range(i))"
        )
    if not isinstance(model, nn.Module):
        raise ViditqError(f"quantize_: expected a torch.nn.Module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    if isinstance(args, Tensor) or not isinstance(kwargs, Mapping | None):
        raise ViditqError("quantize_: args is a tuple, args=(x,), and kwargs a dict, kwargs={'t': t}")
    if not args and not kwargs:
        raise ViditqError(
            "quantize_: pass one example call, quantize_(model, args=(...), kwargs={...}): the linears to keep "
            "in full precision are found by running the model once"
        )
    report = CompileReport(scheme=str(options.scheme), device=_device_of(model))
    plans = _trace(model, args, kwargs or {}, _Capture(options, report))
    strangers = unseen_sites(options.recipe, report)
    report.rejects += strangers
    chosen = _choose(model, plans)
    unseen = _unseen(model, plans, options.keep)
    report.rejects += [f"{fqn}: {_UNSEEN}" for fqn in unseen]
    if options.strict:
        sites = (entry for entries in plans.values() for _, entry in entries)
        refused = [f"  {entry.fqn}: {entry.reason}" for entry in sites if entry.planned and entry.reason]
        refused += [f"  {line}" for line in strangers]
        refused += [f"  {fqn}: {_UNSEEN}; name it in keep= where that is meant" for fqn in unseen]
        if refused:
            raise StrictError(f"strict=True: {len(refused)} sites were refused:\n" + "\n".join(refused))
    _swap(model, chosen, options)
    return report


_Plans = dict[int, list[tuple[Tensor, SiteReport]]]


class _Capture:
    """Backend of the one traced call: plans every linear of every graph, and runs the graphs as they are.

    Dynamo keeps a backend for as long as the process lives, so it gives everything up afterwards.
    """

    def __init__(self, options: CompileOptions, report: CompileReport) -> None:
        self._options, self._report = options, report
        self._plans: _Plans = {}
        self._graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        from viditq_fx.graph_edit import copy_graph_module

        annotated = copy_graph_module(gm)
        asked = self._options
        ctx = PassContext(scheme=asked.scheme, keep=asked.keep, recipe=asked.recipe, report=self._report)
        Normalize().run(annotated, ctx)
        AnnotateSites().run(annotated, ctx)
        positions = {n.name: i for i, n in enumerate(m for m in gm.graph.nodes if m.op == "placeholder")}
        for node in annotated.graph.nodes:
            entry = ctx.sites.get(node.name)
            weight = node.args[1] if entry is not None and len(node.args) > 1 else None
            parameter = weight_parameter(weight) if isinstance(weight, fx.Node) else None
            if entry is not None and parameter is not None and parameter.name in positions:
                tensor = example_inputs[positions[parameter.name]]
                self._plans.setdefault(id(tensor), []).append((tensor, entry))
        index = len(self._graphs)
        self._graphs.append(gm)
        return lambda *args: self._graphs[index].forward(*args)

    def take(self) -> tuple[_Plans, int]:
        """(the plans, how many graphs were captured); nothing of the model is held afterwards."""
        plans, graphs = self._plans, len(self._graphs)
        self._plans, self._graphs, self._report = {}, [], CompileReport(scheme="", device="")
        return plans, graphs


def _trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    capture: _Capture,
) -> _Plans:
    """Run the model once under Dynamo; plan every linear of every graph that it captures."""
    try:
        with torch.no_grad():
            torch.compile(_fresh_call(model), backend=capture)(*args, **kwargs)
    finally:
        plans, graphs = capture.take()
    if not graphs:
        raise ViditqError(
            "quantize_: Dynamo captured no graph of this call, so no linear was found; check that torch.compile is "
            "not disabled (TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE, torch.compiler.disable)"
        )
    return plans


def _fresh_call(model: nn.Module) -> Callable[..., Any]:
    """A function that calls `model`, with code of its own.

    Dynamo counts recompilations by code object and gives up after eight: the tracing must neither
    run into that limit nor use up what the user's own torch.compile(model) has.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)


def _choose(model: nn.Module, plans: _Plans) -> dict[str, nn.Module]:
    """Module path -> layer to replace; entries of what cannot be replaced get their reason."""
    chosen: dict[str, nn.Module] = {}
    replaceable: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")  # its own: wrappers (LoRA) pass their layer's on
        if not isinstance(weight, nn.Parameter) or id(weight) not in plans:
            continue
        entries = [entry for _, entry in plans[id(weight)]]
        reason = next((e.reason for e in entries if e.reason is not None), None) or why_not_replaced(module)
        if reason is None:
            chosen[path] = module
            replaceable.add(id(weight))
        for entry in entries:
            entry.reason = reason
            entry.done = None if reason else entry.planned
            entry.fqn = site_of_module(path).fqn if len(entries) == 1 else entry.fqn
    for key, entries in plans.items():
        for _, entry in entries:
            if key not in replaceable and entry.planned and entry.reason is None:
                entry.reason, entry.done = (
                    "its weight belongs to no layer that can be replaced: torch.compile packs it instead",
                    None,
                )
            if entry.done:
                form = QuantScheme.parse(entry.done).weight_form
                entry.bytes_packed = form.nbytes(entry.width, entry.depth)
    return chosen


_UNSEEN = (
    "no graph of the call shows this layer (not called, or called where Dynamo or the passes do not look)"
)


def _unseen(model: nn.Module, plans: _Plans, keep: tuple[str, ...]) -> list[str]:
    """Paths of the linears that the traced call did not show, and that no pattern keeps."""
    unseen: list[str] = []
    for path, module in model.named_modules():
        if is_linear_layer(module) and id(module._parameters.get("weight")) not in plans:
            assert isinstance(module.weight, Tensor)
            width, depth = module.weight.shape[:2]
            site = SiteReport(fqn=site_of_module(path).fqn, role="", rows="", depth=depth, width=width)
            if not any(keeps(pattern, site) for pattern in keep):
                unseen.append(site.fqn)
    return unseen


_REPLACED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def why_not_replaced(module: nn.Module) -> str | None:
    """Why a linear layer cannot be replaced by one that holds integers; None if it can."""
    kind = next((base for base in _REPLACED if isinstance(module, base)), None)
    own = kind is None or type(module).forward is not kind.forward
    if own or getattr(type(module), "_conv_forward", None) is not getattr(kind, "_conv_forward", None):
        return (
            f"{type(module).__name__} has a forward of its own: only nn.Linear and convolutions are replaced"
        )
    if isinstance(module, Convolution) and (reason := why_not_pointwise(module)) is not None:
        return reason
    if "forward" in module.__dict__:
        return "its forward is wrapped (an offloading or casting hook): remove the hook first"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized"
    assert isinstance(module.weight, Tensor)
    if module.weight.device.type == "meta":
        return "its weight is on the meta device: load it first"
    return None


def _swap(model: nn.Module, chosen: Mapping[str, nn.Module], options: CompileOptions) -> None:
    """Pack everything first, then replace: a failure half-way leaves the model as it was."""
    made: dict[int, QuantLinear] = {}
    packed: Packed = {}
    planned = options.recipe.sites if options.recipe is not None else {}
    for path, layer in chosen.items():
        if id(layer) not in made:
            plan = planned.get(site_of_module(path).fqn, options.scheme)
            made[id(layer)] = quantized_layer(layer, plan, path, packed)
    clocked = [layer for layer in made.values() if layer.scheme.input_range == "timestep"]
    if clocked:
        assert options.recipe is not None
        clock = clock_for(model, options.recipe.edges, options.recipe.timestep)
        for layer in clocked:
            layer.clock = clock
    for path, layer in chosen.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made[id(layer)])


def _device_of(model: nn.Module) -> str:
    first = next(model.parameters(), None)
    return "cpu" if first is None else first.device.type
