"""Recognise every softmax attention, plan it, and rewrite what is planned.

scaled_dot_product_attention(q, k, v, ...)  ->  attention_int8(q, k, v, mask, is_causal, scale, enable_gqa)
softmax(scale * q @ k^T + mask) @ v         ->  the same

or attention_int8_fp8, attention_int8_int8, by option `attention`.

A call stays SDPA, with its reason, where no kernel of ours is faster or its form cannot be honoured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from viditq_fx import ops
from viditq_fx.graph_edit import call, example
from viditq_fx.ops.attention import MAX_HEAD
from viditq_fx.ops.fp8 import why_no_fp8
from viditq_fx.passes.annotate_sites import SITE_KEY, fqn_of_node, hint
from viditq_fx.passes.attention_form import FORM_KEY, PART_KEY, AttentionForm, is_sdpa, read_attention
from viditq_fx.passes.attention_spelled import SpelledAttention, read_spelled
from viditq_fx.passes.base import Match, Pass, PassContext, Reject
from viditq_fx.passes.dataflow import DataFlow, same_size
from viditq_fx.passes.effects import Writes, op_name
from viditq_fx.passes.pattern import why_written
from viditq_fx.passes.policy import keeps
from viditq_fx.passes.spelling import arguments, constant
from viditq_fx.report import SiteReport
from viditq_fx.site import Site

ROLE = "attention"
PLANS = {
    "int8": ("int8-qk", ops.ATTENTION_INT8),
    "int8-fp8": ("int8-qk-fp8-pv", ops.ATTENTION_INT8_FP8),
    "int8-int8": ("int8-qk-int8-pv", ops.ATTENTION_INT8_INT8),
}
"""Option `attention` -> (the scheme's name in reports, op)."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class AnnotateAttention(Pass):
    """Give each softmax attention a Site, its form, and a plan or a reason."""

    name: ClassVar[str] = "annotate_attention"
    changes_numerics: ClassVar[bool] = False

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> tuple[Match | Reject, ...]:
        results: list[Match | Reject] = []
        flow: DataFlow | None = None
        writes = Writes(gm.graph)
        for node in gm.graph.nodes:
            if node.name in ctx.sites or not (is_sdpa(node) or read_spelled(node)):
                continue
            flow = flow or DataFlow(gm.graph)
            form = read_attention(node, flow)
            if form is not None:
                results.append(_annotate(node, form, ctx, writes))
        return tuple(results)


@dataclass(frozen=True, kw_only=True)
class QuantizeAttention(Pass):
    """Rewrite the planned attention calls."""

    name: ClassVar[str] = "quantize_attention"
    changes_numerics: ClassVar[bool] = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> tuple[Match | Reject, ...]:
        results: list[Match | Reject] = []
        for node in [n for n in gm.graph.nodes if FORM_KEY in n.meta and n.name in ctx.sites]:
            entry, form = ctx.sites[node.name], node.meta[FORM_KEY]
            if entry.planned is None or entry.reason is not None or entry.done is not None:
                continue
            scale = constant(form.scale)
            options = (form.is_causal, None if scale is None else float(scale), form.enable_gqa)
            with gm.graph.inserting_before(node):
                operands = _operands(gm.graph, node)
                scheme, op = PLANS[ctx.attention]
                fused = call(gm.graph, op.overload, (*operands, *options), node)
            fused.meta[SITE_KEY], fused.meta[FORM_KEY] = node.meta[SITE_KEY], form
            spelled = read_spelled(node)
            node.replace_all_uses_with(_as_dtype(gm.graph, fused, node))
            gm.graph.erase_node(node)
            for idle in spelled.interior if spelled else ():
                if not idle.users:
                    gm.graph.erase_node(idle)
            del ctx.sites[node.name]
            ctx.sites[fused.name] = entry
            entry.done = scheme
            results.append(Match(site=fused.meta[SITE_KEY], detail=str(form)))
        return tuple(results)


def _operands(graph: fx.Graph, node: fx.Node) -> tuple[object, ...]:
    """Query, key, value and mask as the graph has them now: a pass may have replaced what was read."""
    spelled = read_spelled(node)
    if spelled is None:
        given = arguments(node, ("query", "key", "value", "attn_mask"), attn_mask=None)
        return tuple(given[name] for name in ("query", "key", "value", "attn_mask"))
    key = spelled.key
    if not spelled.key_is_transposed:
        key = call(graph, torch.transpose, (key, -2, -1), node)
    return spelled.query, key, spelled.value, spelled.mask


def _as_dtype(graph: fx.Graph, fused: fx.Node, node: fx.Node) -> fx.Node:
    """The op's result, in queries' dtype, as what it replaces has it: scores may be upcast, autocast chooses."""
    dtype = example(node).dtype
    if example(fused).dtype == dtype:
        return fused
    with graph.inserting_before(node):
        return call(graph, torch.ops.aten.to.dtype, (fused, dtype), node)


def _annotate(node: fx.Node, form: AttentionForm, ctx: PassContext, writes: Writes) -> Match | Reject:
    site = Site(fqn_of_node(node), ROLE)
    entry = _describe(node, form)
    node.meta[SITE_KEY], node.meta[FORM_KEY] = site, form
    spelled = read_spelled(node)
    if spelled is not None:
        spelled.scores.meta[PART_KEY] = True
    ctx.sites[node.name] = entry
    ctx.report.attention.append(entry)
    entry.reason = _reason_to_keep(entry, node, ctx)
    if entry.reason is None:
        entry.planned = PLANS[ctx.attention][0]
        entry.reason = _why_impossible(form) or _why_misshapen(form) or _why_open(spelled, writes)
        entry.reason = entry.reason or _why_no_fp8(node, ctx) or _why_no_values(node, ctx)
    return (
        Match(site=site, detail=str(form)) if entry.reason is None else Reject(site=site, reason=entry.reason)
    )


def _describe(node: fx.Node, form: AttentionForm) -> SiteReport:
    q, v = example(form.query).shape, example(form.value).shape
    return SiteReport(
        fqn=fqn_of_node(node),
        role=ROLE,
        rows=str(math.prod(q[:-1])),
        depth=hint(q[-1]) or 0,
        width=hint(v[-2]) or 0,
        prologue=str(form),
    )


def _reason_to_keep(entry: SiteReport, node: fx.Node, ctx: PassContext) -> str | None:
    for pattern in ctx.keep:
        if keeps(pattern, entry):
            return f"kept by pattern {pattern!r}"
    if ctx.attention == "keep":
        return "kept by option attention='keep'"
    if ctx.attention == "auto":
        if example(node).device.type == "cuda":
            return "our int8 attention kernel was not measured against SDPA yet: attention='int8' takes it"
        device = example(node).device.type
        return f"no int8 attention kernel of ours for {device}: SDPA is faster (attention='int8' forces it)"
    return None


def _why_impossible(form: AttentionForm) -> str | None:
    operands = (form.query, form.key, form.value)
    values = [example(operand) for operand in operands]
    if constant(form.dropout) not in (0, 0.0):
        return f"attention dropout {form.dropout}: for training"
    if any(value.dtype not in _DTYPES for value in values):
        return f"operands of {sorted({str(v.dtype) for v in values})}: fp32, bf16 and fp16 are quantized"
    head = values[0].shape[-1]
    if min(value.dim() for value in values) < 3 or not isinstance(head, int) or head > MAX_HEAD:
        return f"head width {head}: a fixed width of at most {MAX_HEAD} is quantized"
    if form.is_causal and form.mask is not None:
        return "a mask beside is_causal"
    return None


def _why_no_fp8(node: fx.Node, ctx: PassContext) -> str | None:
    """fp8 runs where it is multiplied and is simulated nowhere; what computes instead has another error and name."""
    lack = why_no_fp8(example(node).device) if ctx.attention == "int8-fp8" else None
    return lack and f"{lack}; attention='int8-int8' and 'int8' need none"


def _why_no_values(node: fx.Node, ctx: PassContext) -> str | None:
    device = example(node).device
    if ctx.attention not in ("int8-fp8", "int8-int8") or device.type != "cuda":
        return None
    from viditq_fx.triton_templates.attention_tiles import why_no_eight_bit_values

    return why_no_eight_bit_values(torch.cuda.get_device_capability(device))


def _why_misshapen(form: AttentionForm) -> str | None:
    """Torch broadcasts operands and masks in more ways than the op does."""
    q, k, v = (example(operand).shape for operand in (form.query, form.key, form.value))
    shared = -3 if form.enable_gqa else -2
    one_batch = all(len(q) == len(s) and all(map(same_size, q[:shared], s[:shared])) for s in (k, v))
    if not one_batch or not all(map(same_size, k[:-2], v[:-2])):
        shapes = ", ".join(str(list(shape)) for shape in (q, k, v))
        return (
            f"operands of shapes {shapes}: those of one batch and as many heads (or enable_gqa) are quantized"
        )
    if form.mask is None:
        return None
    mask, scores = example(form.mask), (*q[:-1], v[-2])
    fits = 2 <= mask.dim() <= len(scores) and all(
        same_size(size, 1) or same_size(size, whole)
        for size, whole in zip(reversed(mask.shape), reversed(scores), strict=False)
    )
    if not fits:
        return f"a mask of shape {list(mask.shape)} over scores {list(scores)}: [..., Lq or 1, Lk or 1] is honoured"
    if form.spelled and mask.dtype == torch.bool:
        return "a bool mask that is added: as a number, not as what takes part"
    return None


def _why_open(spelled: SpelledAttention | None, writes: Writes) -> str | None:
    if spelled is None:
        return None
    reader = spelled.read_outside()
    if reader is not None:
        return f"its scores or probabilities are also read by {op_name(reader)}"
    operands = [n for n in (spelled.query, spelled.key, spelled.value, spelled.mask) if n is not None]
    return why_written(spelled.root, spelled.interior, operands, writes)
