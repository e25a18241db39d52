"""What must hold between passes; a violation is a bug of a pass and raises VerifyError."""

from __future__ import annotations

import operator

import torch
from torch import fx

from viditq_fx import ops
from viditq_fx.errors import VerifyError
from viditq_fx.graph_edit import example
from viditq_fx.ops.fp8 import E4M3
from viditq_fx.passes.base import PassContext
from viditq_fx.passes.effects import op_name
from viditq_fx.passes.insert_qdq import QUANTIZE_WEIGHT, SCHEME_KEY
from viditq_fx.passes.site_plan import SLOT_KEY
from viditq_fx.scheme import BLOCK, group_of

_QUANTIZE = (
    ops.QUANTIZE_PER_TOKEN.overload,
    ops.QUANTIZE_FP8_PER_TOKEN.overload,
    ops.ROTATE_QUANTIZE.overload,
    ops.QUANTIZE_PER_BLOCK.overload,
    ops.QUANTIZE_STATIC.overload,
    *QUANTIZE_WEIGHT,
    ops.NORM_MODULATE_QUANTIZE.overload,
    ops.ACTIVATION_QUANTIZE.overload,
)
"""Ops that return (integers, scales)."""
_LINEARS = frozenset(op.overload for op in ops.LINEARS)


def verify(gm: fx.GraphModule, ctx: PassContext, after: str) -> None:
    """Check the invariants that hold after every pass, and those that pass `after` establishes.

    Raises VerifyError naming the pass and the node.
    """
    try:
        gm.graph.lint()
    except RuntimeError as error:  # its first line names the node, the others are the whole graph
        problem = str(error).partition("\n")[0]
        raise VerifyError(f"after pass {after!r}: the graph is not well formed: {problem}") from error
    for node in gm.graph.nodes:
        problem = _problem(node)
        if problem is not None:
            raise VerifyError(f"after pass {after!r}: {node.format_node()}: {problem}")
    names = {node.name for node in gm.graph.nodes}
    lost = [name for name in ctx.sites if name not in names]
    if lost:
        raise VerifyError(f"after pass {after!r}: sites lost their node: {lost}")
    for name, entry in ctx.sites.items():
        if after == "place_weights" and entry.planned and entry.done is None and entry.reason is None:
            raise VerifyError(
                f"after pass {after!r}: site {entry.fqn!r} ({name}) was planned as "
                f"{entry.planned}, not done, with no reason"
            )


def _problem(node: fx.Node) -> str | None:
    if node.target in _QUANTIZE and not node.users:
        return "orphan quantize: nothing reads its integers"
    if SCHEME_KEY in node.meta and example(node) is None:
        return "a node of the dialect carries no example value"
    if SLOT_KEY in node.meta and not node.users:
        return "a packed weight that nothing reads"
    if node.target in _LINEARS:
        return _linear_problem(node)
    if node.target is operator.getitem and node.args and isinstance(node.args[0], fx.Node):
        if node.args[0].target in _QUANTIZE and not node.users:
            return "an output of quantize that nothing reads"
    return None


def _linear_problem(node: fx.Node) -> str | None:
    x, x_scale, w, w_scale = (example(arg) for arg in node.args[:4])  # type: ignore[arg-type]
    blocks = node.target in (ops.LINEAR_W4A8_BLOCK.overload, ops.LINEAR_W4A4.overload)
    nibbles = blocks or node.target is ops.LINEAR_W4A8.overload
    wanted = {
        ops.LINEAR_W4A8.overload: (torch.int8, torch.uint8),
        ops.LINEAR_W4A8_BLOCK.overload: (torch.int8, torch.uint8),
        ops.LINEAR_W4A4.overload: (torch.uint8, torch.uint8),
        ops.LINEAR_W8A8_FP8.overload: (E4M3, E4M3),
    }
    if (x.dtype, w.dtype) != wanted.get(node.target, (torch.int8, torch.int8)):
        return f"{op_name(node)} over {x.dtype} x {w.dtype}"
    if x_scale.dtype != torch.float32 or w_scale.dtype != torch.float32:
        return "scales are fp32"
    depth = node.args[6] if x.dtype == torch.uint8 else x.shape[-1]
    scales = -(-depth // BLOCK) if blocks else 1  # type: ignore[operator]
    fits = w_scale.dim() == 1 or (
        w_scale.dim() == 2 and nibbles and group_of(w_scale.shape[0], depth) is not None  # type: ignore[arg-type]
    )
    if w_scale.shape[-1] != w.shape[0] or not fits or x_scale.shape[-1] != scales:
        return f"scale shapes {tuple(x_scale.shape)}, {tuple(w_scale.shape)} match neither token nor channel"
    return None
