"""What each linear is expected to take on its GPU, and which are faster left in full precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import fx

from viditq_fx.cost_model import Problem, device_of, full_us, quantized_us
from viditq_fx.graph_edit import example
from viditq_fx.passes.base import PassContext
from viditq_fx.passes.convolution import CONVOLUTIONS
from viditq_fx.passes.effects import aliased_chain, is_mutation, op_name
from viditq_fx.passes.roles import ATTENTION_NAMES, MATMULS, is_linear, linear_input
from viditq_fx.passes.site_plan import site_plan
from viditq_fx.report import SiteReport
from viditq_fx.scheme import QuantScheme

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_TAKES_NOTHING_IN = MATMULS | ATTENTION_NAMES | CONVOLUTIONS
"""What Inductor does not fuse a quantize into, linears beside: it needs whole rows, which no tile holds."""
_ELEMENTWISE = frozenset({"relu", "dropout"})
"""What may return its argument, and is a kernel nevertheless."""


def weigh(rows: Mapping[fx.Node, int | None], ctx: PassContext) -> dict[fx.Node, str]:
    """Fill in the expected times of these sites; node -> why it stays in full precision, where that is faster.

    `rows`: M of each, None where it is not known. Nothing is known off CUDA or on an architecture that
    `cost_model.RATES` does not list. Nothing stays under `ctx.selection == "always"`, nor what a recipe plans.
    """
    rows = {node: count for node, count in rows.items() if isinstance(example(node), torch.Tensor)}
    planned = {n for n in rows if _is_planned(ctx.sites[n.name])}
    readers = Counter(linear_input(node) for node in planned)
    devices = {device: device_of(device) for device in {example(n).device for n in rows}}
    slower: dict[fx.Node, str] = {}
    for node, count in rows.items():
        entry, value = ctx.sites[node.name], example(node)
        device = devices[value.device]
        if device is None or not count or value.dtype not in _NAMES or not entry.width * entry.depth:
            continue
        problem = Problem(rows=count, width=entry.width, depth=entry.depth, dtype=value.dtype)
        entry.expected_full_us = full_us(problem, device)
        if entry.planned is None or entry.reason is not None:
            continue
        source, scheme = linear_input(node), QuantScheme.parse(entry.planned)
        # The input of a layer that quantize_ packed is quantized by nodes that stand in the graph already.
        fused = node not in planned or (is_fusible(source) and not scheme.rotate)
        entry.expected_us = quantized_us(problem, scheme, device, fused=fused, readers=readers[source] or 1)
        asked = ctx.selection == "always" or site_plan(entry.fqn, ctx) is not None
        if node not in planned or asked or entry.expected_us is None:
            continue
        if entry.expected_us >= entry.expected_full_us:
            slower[node] = (
                f"{_NAMES[value.dtype]} is as fast or faster on {device.name}: {entry.expected_full_us:.1f} us "
                f"expected, {entry.expected_us:.1f} us in {scheme}"
                f"{'' if fused else ' with a pass that quantizes the input'}; selection='always' quantizes it"
            )
    return slower


def _is_planned(entry: SiteReport) -> bool:
    """To be quantized; not so already."""
    return entry.planned is not None and entry.reason is None and entry.done is None


def is_fusible(source: fx.Node) -> bool:
    """Whether what computes a linear's input is a kernel of Inductor's own, which then quantizes it too."""
    chain = tuple(aliased_chain(source))
    if any(is_mutation(node) or op_name(node) in _ELEMENTWISE for node in chain):
        return True
    root = chain[-1]
    if root.op in {"placeholder", "get_attr"} or is_linear(root):
        return False
    return op_name(root) not in _TAKES_NOTHING_IN
