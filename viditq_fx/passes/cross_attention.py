"""Which linears belong to cross-attention: those in front of it and those that project its result.

An attention is one of another stream where its keys come from an input that owes nothing to what its queries are made
of: text, say. Keys of the same stream, pooled or otherwise made fewer (PixArt at high resolution), are self-attention.
"""

from __future__ import annotations

from torch import fx

from viditq_fx.passes.attention_form import AttentionForm, in_front, read_attention
from viditq_fx.passes.convolution import is_pointwise_conv
from viditq_fx.passes.dataflow import DataFlow
from viditq_fx.passes.roles import is_linear, linear_input


def cross_attention_linears(graph: fx.Graph, flow: DataFlow | None = None) -> set[fx.Node]:
    """Linears that serve cross-attention and no other: q, k, v and out. `flow` is the graph's, if at hand."""
    flow = flow or DataFlow(graph)
    forms = {node: form for node in graph.nodes if (form := read_attention(node, flow)) is not None}
    crossing = {node for node, form in forms.items() if _crosses(form, flow)}
    serves: dict[fx.Node, set[bool]] = {}
    for node, form in forms.items():
        for operand in (form.query, form.key, form.value):
            for linear in in_front(operand, flow)[0]:
                serves.setdefault(linear, set()).add(node in crossing)
    for linear in graph.nodes:
        if _is_site(linear) and flow.is_content(linear):
            for node in _attentions_behind(linear, set(forms), flow):
                serves.setdefault(linear, set()).add(node in crossing)
    return {linear for linear, kinds in serves.items() if kinds == {True}}


def _is_site(node: fx.Node) -> bool:
    return is_linear(node) or is_pointwise_conv(node)


def _crosses(form: AttentionForm, flow: DataFlow) -> bool:
    queries, keys = (in_front(operand, flow)[0] for operand in (form.query, form.key))
    if form.kind != "cross" or not queries or not keys:
        return False
    origins = _origins([linear_input(linear) for linear in keys], flow)
    return not origins & {linear_input(linear) for linear in queries}


def _origins(starts: list[fx.Node], flow: DataFlow) -> set[fx.Node]:
    """All that some values are computed from, themselves included."""
    queue, seen = list(starts), set()
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            queue.extend(flow.inputs(node))
    return seen


def _attentions_behind(linear: fx.Node, attentions: set[fx.Node], flow: DataFlow) -> set[fx.Node]:
    """Attentions whose result a linear reads before any other linear, and not beside a residual stream."""
    queue, seen, found = [linear_input(linear)], set(), set()
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in attentions:
            found.add(node)
        elif _is_site(node) or node.op == "placeholder":
            return set()  # a sum with something else: the residual stream
        else:
            queue.extend(n for n in flow.inputs(node) if flow.is_content(n))
    return found
