"""Fold the balance of an input's channels into the adaLN modulation that makes the input.

    q((n * (1 + scale) + shift) * m)  ->  q(n * ((1 + scale) * m) + shift * m)        n a norm

q quantizes, rotated or not, and m is the recipe's multiplier, 1 / s of ViDiT-Q section 4.2. Scale and shift may each be
absent, or a factor given whole. They are vectors for a sample or a frame, and so are their products with m: what
follows is plain adaLN, which `fuse_norm_quantize` takes in, or a rotation that multiplies by no m. A norm that nothing
modulates is multiplied by m where it is made. The weight, which has 1 / m, stays as it is.

Shapes: m fp32 [K]; n [..., K]; scale, factor and shift broadcast to [..., K].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from torch import fx
from torch.nn import functional as F

from viditq_fx import ops
from viditq_fx.graph_edit import call as insert
from viditq_fx.graph_edit import example
from viditq_fx.ops.weight_forms import Multiplier
from viditq_fx.passes.annotate_sites import SITE_KEY
from viditq_fx.passes.base import PassContext
from viditq_fx.passes.dataflow import same_shape
from viditq_fx.passes.fuse_norm_quantize import (
    MODULATIONS,
    NORMS,
    label_of,
    spelled_rms_norm_affine,
    unmodulated,
)
from viditq_fx.passes.pattern import (
    Example,
    Expression,
    Found,
    Pattern,
    Rewrite,
    call,
    number,
    variable,
    whole,
)
from viditq_fx.passes.quantize_roots import UNFUSED_KEY
from viditq_fx.passes.site_plan import CONSTANT_KEY
from viditq_fx.recipe import Recipe, SitePlan
from viditq_fx.scheme import QuantScheme
from viditq_fx.site import Site


def multiplied(value: Expression) -> Expression:
    return value * variable("multiplier")


def rotated(value: Expression) -> Expression:
    return call("rotate", value, variable("multiplier"), number("block"))


def rotated_and_quantized(value: Expression) -> Expression:
    operands = (variable("multiplier"), number("block"), number("bits"), number("group"))
    return call("rotate_quantize", value, *operands)


_BALANCES = (multiplied, rotated, rotated_and_quantized)
"""What `insert_qdq` balances an input by."""


def _patterns() -> Iterator[Pattern]:
    # What multiplies a spelled norm first is its modulation, be it a weight, before it is a part of the norm.
    norms = sorted(NORMS, key=lambda norm: norm is spelled_rms_norm_affine)
    for balance, norm, modulation in product(_BALANCES, norms, MODULATIONS):
        made = norm(variable("x"))
        if modulation is not unmodulated:
            inner = Pattern.of(modulation, whole("norm", made)).expression
        elif balance is multiplied or norm is spelled_rms_norm_affine:
            continue  # norm * m is folded as it stands; and x * rsqrt(...) * weight is modulated, by the weight
        else:
            inner = made
        yield Pattern(label_of(norm, modulation), balance(inner))


def multiplier_of(node: fx.Node) -> fx.Node | None:
    """The recipe's multiplier by which a node balances an input; None if it does not, or no more."""
    if (
        node.target not in (torch.mul, ops.ROTATE.overload, ops.ROTATE_QUANTIZE.overload)
        or len(node.args) < 2
    ):
        return None
    given = node.args[1]
    known = isinstance(given, fx.Node) and isinstance(given.meta.get(CONSTANT_KEY), Multiplier)
    return given if known else None  # type: ignore[return-value]


def adaln(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The plain spelling, for an example."""
    return F.linear(F.layer_norm(x, (64,)) * (1 + scale[:, None]) + shift[:, None], w)


def read_twice(x: torch.Tensor, scale: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The modulated value goes elsewhere too, where it is not balanced."""
    h = F.layer_norm(x, (64,)) * (1 + scale[:, None])
    return F.linear(h, w) + h


def by_token(x: torch.Tensor, scale: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Modulated by as many numbers as there are values."""
    return F.linear(F.layer_norm(x, (64,)) * (1 + scale), w)


def _drawn(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    gen = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=gen) for shape in shapes)


def _balanced(scheme: str = "w8a8", rotation: int = 1) -> Recipe:
    """A recipe for an example: it balances every linear of 64 channels, with signs."""
    values = torch.linspace(0.5, 2.0, 64) * torch.where(torch.arange(64) % 3 == 0, -1.0, 1.0)
    parsed = QuantScheme.parse(scheme)
    return Recipe(scheme=parsed, sites={"": SitePlan(scheme=parsed, multiplier=values, rotation=rotation)})


@dataclass(frozen=True, kw_only=True)
class FoldBalance(Rewrite):
    """Multiply the vectors that modulate a norm, and no longer what they have modulated."""

    name: ClassVar[str] = "fold_balance"
    changes_numerics: ClassVar[bool] = True
    patterns: ClassVar[tuple[Pattern, ...]] = tuple(_patterns())
    examples: ClassVar[tuple[Example, ...]] = (
        Example(
            label="adaLN, balanced",
            program=adaln,
            inputs=lambda: _drawn((2, 20, 64), (2, 64), (2, 64), (64, 64)),
            matches=1,
            recipe=_balanced(),
        ),
        Example(
            label="adaLN, balanced and rotated",
            program=adaln,
            inputs=lambda: _drawn((2, 20, 64), (2, 64), (2, 64), (64, 64)),
            matches=1,
            recipe=_balanced("w8a8-rot", 64),
        ),
        Example(
            label="the balanced value is used as it is, too",
            program=read_twice,
            inputs=lambda: _drawn((2, 20, 64), (2, 64), (64, 64)),
            matches=0,
            reason="also read by",
            recipe=_balanced(),
        ),
        Example(
            label="modulated by token, balanced",
            program=by_token,
            inputs=lambda: _drawn((2, 20, 64), (2, 20, 64), (64, 64)),
            matches=0,
            reason="scale has as many numbers as what it modulates",
            recipe=_balanced(),
        ),
    )

    def roots(self, gm: fx.GraphModule, ctx: PassContext) -> Iterator[fx.Node]:
        return (node for node in gm.graph.nodes if multiplier_of(node) is not None)

    def site(self, root: fx.Node) -> Site:
        stamped = next((node for node in (root, *root.users) if SITE_KEY in node.meta), root)
        return super().site(stamped)

    def together(self, root: fx.Node) -> Sequence[fx.Node]:
        return _alike(root)

    def declined(self, root: fx.Node, reason: str, ctx: PassContext) -> None:
        for reader in root.users if root.target is torch.mul else ():
            reader.meta[UNFUSED_KEY] = f"its balance is a multiplication by itself: {reason}"

    def accept(self, found: Found, ctx: PassContext) -> str | None:
        x = found.root.args[0]
        assert isinstance(x, fx.Node)
        shape = example(x).shape
        norm = found.values.get("norm")
        if isinstance(norm, fx.Node) and not same_shape(example(norm).shape, shape):
            return "scale or shift broadcasts the norm's result to another shape"
        for name in ("scale", "factor", "shift"):
            value = found.values.get(name)
            if value is None or isinstance(value, int | float):
                continue
            tensor = example(value)
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                return f"{name} is no tensor of floats"
            # Its product with m has all channels: a number for each token becomes one for each element.
            if tensor.dim() and same_shape(torch.Size((*tensor.shape[:-1], shape[-1])), shape):
                return f"{name} has as many numbers as what it modulates: to balance them is no less work"
        if example(x).dtype == torch.float16 and not all(map(_is_product, (found.root, *_alike(found.root)))):
            return "what a rotation reads would be balanced in fp16, which ends at 65504; the rotation does it in fp32"
        return None

    def replace(self, gm: fx.GraphModule, found: Found, ctx: PassContext) -> str:
        root = found.root
        x = root.args[0]
        group = sorted((root, *_alike(root)))
        with gm.graph.inserting_before(group[0]):
            wide = _modulated(gm.graph, found, group[0])
            # What a rotation reads is written to memory: no wider than it was.
            kept = _cast(gm.graph, wide, example(x).dtype, group[0])  # type: ignore[arg-type]
        for node in group:
            if _is_product(node):
                node.replace_all_uses_with(wide)
            else:
                node.update_arg(0, kept)
                node.update_arg(1, None)
            if not node.users and node is not root:
                gm.graph.erase_node(node)
        if kept is not wide and not kept.users:
            gm.graph.erase_node(kept)
        return found.pattern


def _modulated(graph: fx.Graph, found: Found, like: fx.Node) -> fx.Node:
    """Insert the norm's result times m, modulated: fp32, with vectors in fp32, as bf16 would lose half of m's bits."""
    values, m = found.values, found.values["multiplier"]

    def times(value: Any) -> fx.Node:
        return insert(graph, torch.mul, (m, _cast(graph, value, torch.float32, like)), like)

    factor = m
    if "scale" in values:
        wide = _cast(graph, values["scale"], torch.float32, like)
        factor = times(
            insert(graph, torch.add, (wide, 1.0), like) if isinstance(wide, fx.Node) else wide + 1.0
        )
    elif "factor" in values:
        factor = times(values["factor"])
    norm = values.get("norm", found.root.args[0])
    value = insert(graph, torch.mul, (norm, factor), like)
    if "shift" in values:
        value = insert(graph, torch.add, (value, times(values["shift"])), like)
    return value


def _cast(graph: fx.Graph, value: Any, dtype: torch.dtype, like: fx.Node) -> Any:
    if not isinstance(value, fx.Node) or example(value).dtype == dtype:
        return value
    return insert(graph, torch.Tensor.to, (value, dtype), like)


def _alike(root: fx.Node) -> list[fx.Node]:
    """What else balances the same value by the same multiplier."""
    x, m = root.args[:2]
    return [user for user in x.users if user is not root and multiplier_of(user) is m]  # type: ignore[union-attr]


def _is_product(root: fx.Node) -> bool:
    """Whether x * m is all that a root computes."""
    if root.target is ops.ROTATE.overload:
        return int(root.args[2]) == 1  # type: ignore[arg-type]
    return root.target is torch.mul
