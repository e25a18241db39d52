"""What one attention call computes, read from its arguments and from the data flow in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from viditq_fx.graph_edit import example
from viditq_fx.passes.attention_spelled import read_spelled
from viditq_fx.passes.convolution import is_pointwise_conv
from viditq_fx.passes.dataflow import DataFlow, Taint
from viditq_fx.passes.effects import op_name
from viditq_fx.passes.roles import is_linear, linear_input
from viditq_fx.passes.spelling import arguments

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_NORMS = {"layer_norm": "layer_norm", "rms_norm": "rms_norm", "rsqrt": "rms_norm"}
_PRODUCTS = frozenset({"mul", "imul", "mul_", "addcmul", "addcmul_", "matmul", "einsum"})


FORM_KEY = "viditq_attention"
"""Key of an attention node's meta that holds its AttentionForm."""
PART_KEY = "viditq_attention_part"
"""Key of the meta of a product that is part of an attention which another node stands for."""


@dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """One softmax attention: a call of scaled_dot_product_attention, whatever its form, or products."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    dropout: Any
    is_causal: bool
    scale: Any
    enable_gqa: bool
    kind: str
    """"self", "cross" (keys and values from another input) or "joint" (two streams in one sequence)."""
    qk_norm: str | None
    """Norm between projection and attention: "layer_norm", "rms_norm" or None."""
    rope: bool
    """Queries and keys are multiplied by positions between projection and attention."""
    spelled: bool = False
    """Written as two products and a softmax; `key` may then be [..., D, Lk]."""

    def __str__(self) -> str:
        parts = [self.kind]
        if self.qk_norm:
            parts.append(f"qk {self.qk_norm}")
        if self.rope:
            parts.append("RoPE")
        if self.mask is not None:
            dtype = getattr(example(self.mask), "dtype", None)
            parts.append("bool mask" if dtype == torch.bool else "additive mask")
        parts += ["causal"] if self.is_causal else []
        parts += ["GQA"] if self.enable_gqa else []
        parts += ["spelled as products"] if self.spelled else []
        return ", ".join(parts)


def is_sdpa(node: fx.Node) -> bool:
    """Whether a node is torch's softmax attention in one call."""
    return node.op == "call_function" and op_name(node) == "scaled_dot_product_attention"


def read_attention(node: fx.Node, flow: DataFlow) -> AttentionForm | None:
    """The form of an SDPA call, or of the attention whose last product a node is; None for anything else."""
    if is_sdpa(node):
        defaults = dict(attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False)
        got = arguments(node, _NAMES, **defaults)
        return _form(got, flow, spelled=False)
    spelled = read_spelled(node)
    # Queries may be learned: a fixed set of latents that reads the content.
    if spelled is None or not all(map(flow.is_content, (spelled.key, spelled.value))):
        return None
    got = {"query": spelled.query, "key": spelled.key, "value": spelled.value, "attn_mask": spelled.mask}
    got |= {"dropout_p": 0.0, "is_causal": False, "scale": spelled.scale, "enable_gqa": False}
    return _form(got, flow, spelled=True)


def _form(got: dict[str, Any], flow: DataFlow, *, spelled: bool) -> AttentionForm:
    front = {name: in_front(got[name], flow) for name in ("query", "key", "value")}
    return AttentionForm(
        query=got["query"],
        key=got["key"],
        value=got["value"],
        mask=got["attn_mask"],
        dropout=got["dropout_p"],
        is_causal=bool(got["is_causal"]),
        scale=got["scale"],
        enable_gqa=bool(got["enable_gqa"]),
        kind=_kind(*(linears for linears, _ in front.values())),
        qk_norm=next((_NORMS[op_name(n)] for n in front["query"][1] if op_name(n) in _NORMS), None),
        rope=any(_positions(n, flow) for n in front["query"][1]),
        spelled=spelled,
    )


def in_front(start: Any, flow: DataFlow) -> tuple[list[fx.Node], list[fx.Node]]:
    """(linears that a value comes from, nodes between them and the value)."""
    queue, seen, linears, between = [start], set(), [], []
    while queue:
        node = queue.pop()
        if node in seen or not isinstance(node, fx.Node):
            continue
        seen.add(node)
        if is_linear(node) or is_pointwise_conv(node):
            linears.append(node)
            continue
        between.append(node)
        queue.extend(n for n in flow.inputs(node) if flow.is_content(n))
    return linears, between


def _kind(q: list[fx.Node], k: list[fx.Node], v: list[fx.Node]) -> str:
    read = [{linear_input(n) for n in linears} for linears in (q, k, v)]
    if read[0] & read[1]:
        return "joint" if len(read[0]) > 1 or len(q) > 1 else "self"
    return "cross"


def _positions(node: fx.Node, flow: DataFlow) -> bool:
    """A product of a projection with a table that has passed no linear: cosines and sines, or their likes."""
    if op_name(node) not in _PRODUCTS:
        return False
    tensors = [n for n in node.all_input_nodes if isinstance(example(n), torch.Tensor)]
    tables = [n for n in tensors if Taint.PROJECTED not in flow.taint[n]]
    # A norm's weight has one dimension; a table has positions as well as channels.
    return len(tables) < len(tensors) and any(example(n).dim() >= 2 for n in tables)
