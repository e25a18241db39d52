"""What the recipe, or a scheme alone, asks of one site, and the vectors of it as inputs of the graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from viditq_fx.errors import RecipeError, other_positions
from viditq_fx.graph_edit import call, example
from viditq_fx.ops.rotate import rotation_block
from viditq_fx.ops.static_scale import positions_of
from viditq_fx.ops.weight_forms import Multiplier
from viditq_fx.passes.base import ConstantSlot, PassContext
from viditq_fx.passes.dataflow import is_argument, is_constant_argument
from viditq_fx.recipe import Recipe, SitePlan
from viditq_fx.report import CompileReport
from viditq_fx.scheme import QuantScheme

SLOT_KEY = "viditq_slot"
"""Key of a placeholder's meta: this input holds a packed weight or a part of it, or a vector of the recipe."""
CONSTANT_KEY = "viditq_constant"
"""Key of a placeholder's meta that holds the Multiplier, or the table of scales, that it stands for."""


@dataclass(frozen=True, kw_only=True)
class Transform:
    """What is done to a linear's input and weight before they are quantized."""

    multiplier: Multiplier | None = None
    rotation: int = 1

    def __bool__(self) -> bool:
        return self.multiplier is not None or self.rotation > 1


def transform_of(fqn: str, depth: int, scheme: QuantScheme, ctx: PassContext) -> Transform:
    """The transform of the site at a module path, whose input has `depth` channels.

    Raises RecipeError for a plan that does not fit the site.
    """
    plan = site_plan(fqn, ctx)
    if plan is None:
        return Transform(rotation=rotation_block(depth) if scheme.rotate else 1)
    values = plan.multiplier
    if values is not None and tuple(values.shape) != (depth,):
        raise RecipeError(
            f"{fqn}: the recipe's multiplier has shape {tuple(values.shape)}, but the site's input has {depth} "
            "channels: the recipe was made for another model"
        )
    if depth % plan.rotation:
        raise RecipeError(
            f"{fqn}: the recipe rotates blocks of {plan.rotation}, which do not divide K={depth}"
        )
    return Transform(multiplier=None if values is None else Multiplier.of(values), rotation=plan.rotation)


def site_plan(fqn: str, ctx: PassContext) -> SitePlan | None:
    """The recipe's plan for a module path; None without one."""
    return None if ctx.recipe is None else ctx.recipe.sites.get(fqn)


def unseen_sites(recipe: Recipe | None, report: CompileReport) -> list[str]:
    """A line for each linear that a recipe says nothing of, though it is quantized; calibrated recipes know all.

    Raises RecipeError where the recipe names none of the linears: it is that of another model, or of a part or a
    wrapper of this one, and would do nothing.
    """
    known = {} if recipe is None else {**recipe.sites, **recipe.shapes}
    # A layer of `quantize_` is done already, and its weight is no full one.
    planned = [entry.fqn for entry in report.sites if entry.planned is not None and entry.bytes_full]
    if recipe is None or not known or not planned:
        return []
    if not any(entry.fqn in known for entry in report.sites):
        raise RecipeError(
            f"the recipe names none of the linears that are compiled here: these are called {planned[0]!r} and so on, "
            f"the recipe's {min(known)!r}. Apply it to the module that was calibrated: torch.compile that whole (no "
            "block of it, no module around it), or call quantize_(module, ..., recipe=recipe) and compile what you like"
        )
    lines = f"the recipe does not know this linear: it runs in {recipe.scheme} without balance or a scale of its own"
    return [f"{fqn}: {lines}" for fqn in planned if recipe.shapes and fqn not in known]


def constant_input(
    graph: fx.Graph, values: Tensor, key: object, name: str, like: fx.Node, ctx: PassContext
) -> fx.Node:
    """The graph input that holds a vector of the recipe: one for each `key`, kept on the device of `like`'s value."""
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta.get(CONSTANT_KEY) == key:
            return node
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    device = example(like).device
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.target = node.name
    with torch.inference_mode(False), torch.no_grad():
        held = values.detach().to(device, torch.float32).contiguous()
    node.meta = {
        "example_value": example(like).fake_mode.from_tensor(held, static_shapes=True),
        "tensor_dict": {"_dynamo_static_input_type": "unguarded"},
        SLOT_KEY: node.name,
        CONSTANT_KEY: key,
    }
    node._dynamo_source = None  # type: ignore[attr-defined]
    ctx.constant_slots.append(ConstantSlot(name=node.name, value=held))
    return node


def input_scale(graph: fx.Graph, fqn: str, scheme: QuantScheme, linear: fx.Node, ctx: PassContext) -> fx.Node:
    """Insert what gives the calibrated scale of a site's input, fp32 [1], or [S] by position; at the insertion point.

    Raises RecipeError where the recipe has none or one of other positions, or the graph no timestep to choose by.
    """
    plan = site_plan(fqn, ctx)
    wanted = 0 if scheme.input_range == "static" else 1
    if ctx.recipe is None or plan is None or plan.input_scale is None or plan.input_scale.dim() != wanted:
        raise RecipeError(
            f"{fqn}: scheme {str(scheme)!r} takes its input's scale from calibration, and there is none for this site; "
            f"run viditq_fx.calibrate(model, run, scheme={str(scheme)!r}) and pass its recipe"
        )
    x = linear.args[0]
    assert isinstance(x, fx.Node)
    values = plan.input_scale.reshape(-1)
    if not (bool(torch.isfinite(values).all()) and bool((values > 0).all())):
        raise RecipeError(f"{fqn}: the recipe's input scales are not positive numbers")
    if scheme.input_range == "position":
        check_positions(fqn, values.numel(), positions_of(example(x)))
    # By value: q, k and v have the scales of one plan, and share one quantize and one wide GEMM by them.
    table = constant_input(graph, values, Multiplier.of(values), "input_scale", x, ctx)
    if scheme.input_range != "timestep":
        return table
    if values.numel() != len(ctx.recipe.edges) + 1:
        raise RecipeError(
            f"{fqn}: {values.numel()} scales for {len(ctx.recipe.edges) + 1} ranges of the timestep"
        )
    bucket = _bucket(graph, fqn, linear, ctx)
    operands = (table, 0, bucket)
    known = (node for node in table.users if node.target is torch.index_select and node.args == operands)
    return next(known, None) or call(graph, torch.index_select, operands, linear)


def check_positions(fqn: str, known: int, read: int | torch.SymInt) -> None:
    """Raise RecipeError where a site reads tokens at other positions than the `known` ones that it has scales for.

    A number that is a symbol is compared too, and so becomes a guard of the graph: a call with another number is
    compiled anew, and comes here again, in place of taking scales that are of other tokens.
    """
    symbolic = isinstance(read, torch.SymInt)
    if symbolic and free_unbacked_symbols(read):
        raise RecipeError(
            f"{fqn}: the recipe has scales for {known} positions of a token, and how many tokens this graph reads is "
            "known only while it runs; choose a scheme without '-position'"
        )
    if read != known:
        raise other_positions(fqn, known, int(read))


def _bucket(graph: fx.Graph, fqn: str, linear: fx.Node, ctx: PassContext) -> fx.Node:
    """The number of the timestep's range, int64 [1]: computed once, in front of the first site that asks."""
    known = next((n for n in graph.nodes if n.meta.get(CONSTANT_KEY) == "bucket"), None)
    if known is not None:
        return known
    assert ctx.recipe is not None
    name = ctx.recipe.timestep
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    timestep = next((n for n in placeholders if name and is_argument(n, name)), None)
    if timestep is None or not isinstance(example(timestep), torch.Tensor):
        number = timestep is not None or (name is not None and is_constant_argument(name))
        todo = (
            f"it was given as a Python number: pass a tensor, such as torch.tensor([{name}])"
            if number
            else "compile the whole model and not its blocks"
        )
        raise RecipeError(
            f"{fqn}: scheme with input ranges by timestep, but this graph has no tensor argument {name!r}: {todo}, or "
            "choose a scheme without '-timestep'"
        )
    edges = torch.tensor(ctx.recipe.edges, dtype=torch.float32)
    first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    held = constant_input(graph, edges, "edges", "timestep_edges", timestep, ctx)
    with graph.inserting_before(first):
        # As timestep.bucket_of, in nodes that compilers' caches know.
        largest = call(graph, torch.amax, (timestep,), linear)
        as_float = call(graph, torch.Tensor.to, (largest, torch.float32), linear)
        index = call(graph, torch.bucketize, (as_float, held), linear, right=True)
        bucket = call(graph, torch.Tensor.reshape, (index, (1,)), linear)
    bucket.meta[CONSTANT_KEY] = "bucket"
    return bucket


def multiplier_input(
    graph: fx.Graph, transform: Transform, like: fx.Node, ctx: PassContext
) -> fx.Node | None:
    """The graph input that holds a transform's multiplier, or None."""
    if transform.multiplier is None:
        return None
    return constant_input(graph, transform.multiplier.values, transform.multiplier, "multiplier", like, ctx)
