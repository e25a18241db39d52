"""The role of every linear, from data flow alone: no name of a model, module or attribute decides.

Three primitives: linear, attention, taint. Walking back from an attention's operands to the first
linears gives q, k and v; a linear whose input walks back to an attention without crossing a
residual add or a norm is its output; through an activation to other linears it is an FFN's down,
and those are its up. A linear without content in its input is conditioning. Before the first and
after the last of these are stem and head.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import fx

from viditq_fx.graph_edit import example
from viditq_fx.ops import LINEARS
from viditq_fx.passes.attention_spelled import spelled_attentions
from viditq_fx.passes.convolution import is_pointwise_conv, out_channels
from viditq_fx.passes.dataflow import DataFlow, same_size
from viditq_fx.passes.effects import op_name

ATTENTION_NAMES = frozenset(
    {"scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward"}
    | {"_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"}
)
MATMULS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "mm", "addmm"})
_ACTIVATIONS = frozenset(
    {
        "gelu",
        "silu",
        "relu",
        "relu_",
        "mish",
        "leaky_relu",
        "elu",
        "sigmoid",
        "tanh",
        "hardswish",
        "quick_gelu",
    }
)
_NORMS = frozenset({"layer_norm", "rms_norm", "group_norm", "batch_norm", "rsqrt", "native_layer_norm"})
_ADDS = frozenset({"add", "add_", "iadd", "addcmul", "addcmul_", "lerp"})
_SCALES = frozenset(
    {"mul", "imul", "mul_", "truediv", "to", "type_as", "float", "half", "bfloat16", "dropout"}
)
_OPERAND_KEYS = ("query", "key", "value")

_LINEARS = frozenset(op.overload for op in LINEARS)

_Edges = Callable[[fx.Node], tuple[fx.Node, ...]]

CONDITION, STEM, HEAD, OTHER = "cond", "stem", "head", "other"


def is_linear(node: fx.Node) -> bool:
    """A linear with whole weight: F.linear, or an integer linear of the dialect."""
    if node.op != "call_function":
        return False
    return node.target is torch.nn.functional.linear or node.target in _LINEARS


def linear_input(node: fx.Node) -> fx.Node:
    """The activation operand of a linear."""
    operand = node.args[0] if len(node.args) > 0 else node.kwargs["input"]
    assert isinstance(operand, fx.Node)
    return operand


def find_roles(graph: fx.Graph, flow: DataFlow | None = None) -> dict[fx.Node, str]:
    """Role of each linear (pointwise convolutions included) of a graph; `flow` is the graph's, if at hand."""
    return _RoleFinder(graph, flow or DataFlow(graph)).roles()


def _parts_of_products(graph: fx.Graph) -> dict[fx.Node, list[tuple[str, fx.Node]]]:
    parts: dict[fx.Node, list[tuple[str, fx.Node]]] = {}
    for attention in spelled_attentions(graph):
        parts[attention.scores] = [("q", attention.query), ("k", attention.key)]
        parts[attention.root] = [("v", attention.value)]
    return parts


class _RoleFinder:
    def __init__(self, graph: fx.Graph, flow: DataFlow) -> None:
        self.flow = flow
        self.linears = [n for n in graph.nodes if is_linear(n) or is_pointwise_conv(n)]
        self.content = {n for n in self.linears if self.flow.is_content(n)}
        self.attentions = [n for n in graph.nodes if self._is_attention(n)]
        self._parts = _parts_of_products(graph)
        """Product of an attention that is spelled out -> its operands that are q, k or v."""
        self._barrier = self.content | set(self.attentions)
        self._adapted = self._adapted_sums()
        """Each linear(x) + B(A(x)) (LoRA) -> its linear."""
        self._base = {n: base for add, base in self._adapted.items() for n in self._low_rank(add, base)}
        """Each A and B -> the linear that it adapts."""
        self._found: dict[fx.Node, set[str]] = defaultdict(set)
        self._operands: set[fx.Node] = set()
        """Linears that feed an attention spelled as matmuls."""
        self._kinds: dict[fx.Node, frozenset[str]] = {}

    def _is_attention(self, node: fx.Node) -> bool:
        name = op_name(node)
        if name in ATTENTION_NAMES or self._is_opaque_attention(node):
            return True
        if name not in MATMULS and node.target is not operator.matmul:
            return False
        operands = [a for a in node.all_input_nodes if isinstance(example(a), torch.Tensor)]
        return len(operands) >= 2 and all(self.flow.is_content(a) for a in operands[:2])

    def _is_opaque_attention(self, node: fx.Node) -> bool:
        """A custom op whose first three operands look like q, k and v: a kernel from outside."""
        if not isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            return False
        if str(node.target).split(".")[0] in {"aten", "prims", "viditq"}:
            return False
        operands = node.all_input_nodes[:3]
        values = [example(a) for a in operands]
        if len(operands) < 3 or not all(isinstance(v, torch.Tensor) and v.dim() >= 3 for v in values):
            return False
        q, k, v = (value.shape for value in values)
        alike = same_size(q[0], k[0]) and same_size(k[0], v[0]) and same_size(q[-1], k[-1])
        return alike and all(self.flow.is_content(a) for a in operands)

    def roles(self) -> dict[fx.Node, str]:
        for attention in self.attentions:
            self._label_operands(attention)
        for linear in self.linears:
            if linear in self.content:
                self._label_by_input(linear)
        self._after_linears = self._reached(self._barrier, self._users())
        self._after_attention = self._reached(self.attentions, self._users())
        self._before_attention = self._reached(self.attentions, self.flow.inputs)
        return {n: self._decide(n) for n in self.linears}

    def _decide(self, node: fx.Node) -> str:
        if node not in self.content:
            return CONDITION
        if node in self._base:
            return self._decide(self._base[node])
        found = self._found.get(node, set())
        letters = "".join(x for x in "qkv" if f"attn.{x}" in found)
        if letters:
            return f"attn.{letters}"
        if self.attentions and node not in self._after_linears and found and self._embeds(node):
            return STEM
        if self.attentions and self._follows_stem(node) and not self._in_residual(node):
            return STEM
        if found:
            return "+".join(sorted(found))
        if not self.attentions or node in self._operands:
            return OTHER
        if node not in self._after_attention:
            return STEM
        return OTHER if node in self._before_attention else HEAD

    def _embeds(self, node: fx.Node) -> bool:
        """An up-projection of the model's input whose branch is not added back to that input."""
        downs = [n for n in self.content if n is not node and node in self._ups_of(n)]
        return bool(downs) and not any(self._in_residual(down) for down in downs)

    def _follows_stem(self, node: fx.Node) -> bool:
        ups = self._ups_of(node)
        return bool(ups) and all(up not in self._after_linears for up in ups)

    def _in_residual(self, node: fx.Node) -> bool:
        """Whether the linear's result is added to something that its own branch also reads."""
        up_inputs = {linear_input(up) for up in self._ups_of(node)} | {linear_input(node)}
        ancestors = self._ancestors(up_inputs)
        queue, seen = [node], set()
        while queue:
            current = queue.pop()
            if current in seen:
                continue
            seen.add(current)
            for user in current.users:
                if op_name(user) in _ADDS:
                    others = [a for a in self.flow.inputs(user) if a is not current]
                    if any(o in ancestors and self.flow.is_content(o) for o in others):
                        return True
                if user not in self._barrier and op_name(user) not in _NORMS:
                    queue.append(user)
        return False

    def _ancestors(self, starts: set[fx.Node]) -> set[fx.Node]:
        queue, seen = list(starts), set()
        while queue:
            current = queue.pop()
            if current not in seen:
                seen.add(current)
                queue.extend(self.flow.inputs(current))
        return seen

    def _adapted_sums(self) -> dict[fx.Node, fx.Node]:
        sums: dict[fx.Node, fx.Node] = {}
        for node in self.flow.nodes:
            operands = [n for n in self.flow.inputs(node) if self.flow.is_content(n)]
            if op_name(node) not in _ADDS or len(operands) != 2:
                continue
            for one, other in (operands, reversed(operands)):
                base, up = sums.get(one) or self._unscaled(one), self._unscaled(other)
                down = self._unscaled(linear_input(up)) if up in self.content else None
                if down is not None and {base, down} <= self.content and self._adapts(down, base):
                    sums[node] = base
                    break
        return sums

    def _low_rank(self, add: fx.Node, base: fx.Node) -> list[fx.Node]:
        ups = [n for n in map(self._unscaled, self.flow.inputs(add)) if n in self.content and n is not base]
        return [n for up in ups for n in (up, self._unscaled(linear_input(up)))]

    def _unscaled(self, node: fx.Node) -> fx.Node:
        """What a value is but for scaling, casts and idle dropout."""
        while op_name(node) in _SCALES:
            sources = [n for n in self.flow.inputs(node) if self.flow.is_content(n)]
            if len(sources) != 1:
                break
            node = sources[0]
        return node

    def _adapts(self, down: fx.Node, base: fx.Node) -> bool:
        """Whether two linears read the same input, and the first makes fewer channels of it."""
        same = self._unscaled(linear_input(down)) is self._unscaled(linear_input(base))
        return same and out_channels(down) < out_channels(base)

    def _label_operands(self, attention: fx.Node) -> None:
        if op_name(attention) == "multi_head_attention_forward":
            return  # its projections are inside it: what it reads are no queries yet
        if attention in self._parts:
            for letter, operand in self._parts[attention]:
                for linear in self._first_linears(operand):
                    self._found[linear].add(f"attn.{letter}")
            return
        if op_name(attention) not in ATTENTION_NAMES and not self._is_opaque_attention(attention):
            # A product of two activations: which operand plays which part is not known.
            for operand in attention.all_input_nodes:
                self._operands |= self._first_linears(operand)
            return
        operands = list(zip("qkv", (a for a in attention.args[:3] if isinstance(a, fx.Node)), strict=False))
        if self._is_opaque_attention(attention):
            operands = list(zip("qkv", attention.all_input_nodes, strict=False))
        for letter, key in zip("qkv", _OPERAND_KEYS, strict=True):
            value = attention.kwargs.get(key)
            if isinstance(value, fx.Node):
                operands.append((letter, value))
        for letter, operand in operands:
            for linear in self._first_linears(operand):
                self._found[linear].add(f"attn.{letter}")

    def _first_linears(self, start: fx.Node) -> set[fx.Node]:
        queue, seen, hits = [start], set(), set()
        while queue:
            current = queue.pop()
            if current in seen:
                continue
            seen.add(current)
            if current in self._barrier:
                if current in self.content:
                    hits.add(current)
                continue
            queue.extend(n for n in self.flow.inputs(current) if self.flow.is_content(n))
        return hits

    def _label_by_input(self, linear: fx.Node) -> None:
        kinds = self._kind(linear_input(linear))
        if "attention" in kinds:
            self._found[linear].add("attn.out")
        if "acted" in kinds:
            self._found[linear].add("ffn.down")
            for up in self._ups_of(linear):
                self._found[up].add("ffn.up")

    def _kind(self, node: fx.Node) -> frozenset[str]:
        """What a value is made of up to the nearest residual add or norm."""
        if node not in self._kinds:
            self._kinds[node] = frozenset({"stop"})  # cycles through writes end here
            self._kinds[node] = self._kind_of(node)
        return self._kinds[node]

    def _kind_of(self, node: fx.Node) -> frozenset[str]:
        if node in self.content:
            return frozenset({"linear"})
        if node in self._barrier:
            return frozenset({"attention"})
        name = op_name(node)
        if node.op == "placeholder" or name in _NORMS or not self.flow.is_content(node):
            return frozenset({"stop"})
        sources = [n for n in self.flow.inputs(node) if self.flow.is_content(n)]
        kinds = frozenset().union(*(self._kind(n) for n in sources)) if sources else frozenset({"stop"})
        if name in _ADDS and len(sources) > 1 and kinds != {"attention"} and node not in self._adapted:
            return frozenset({"stop"})
        if name in _ACTIVATIONS and "linear" in kinds:
            return kinds | {"acted"}
        return kinds

    def _ups_of(self, linear: fx.Node) -> set[fx.Node]:
        """Linears on the branch that feeds `linear` through an activation."""
        start = linear_input(linear)
        if linear not in self.content or "acted" not in self._kind(start):
            return set()
        queue, seen, ups = [start], set(), set()
        while queue:
            current = queue.pop()
            if current in seen or self._kind(current) == {"stop"}:
                continue
            seen.add(current)
            if current in self.content:
                ups.add(current)
            elif current not in self._barrier:
                queue.extend(n for n in self.flow.inputs(current) if self.flow.is_content(n))
        return ups

    def _users(self) -> _Edges:
        users: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.flow.nodes:
            for source in self.flow.inputs(node):
                users[source].append(node)
        return lambda node: tuple(users[node])

    @staticmethod
    def _reached(starts: Iterable[fx.Node], edges: _Edges) -> set[fx.Node]:
        """Nodes that the edges lead to from `starts`; a start itself only if another leads to it."""
        reached: set[fx.Node] = set()
        queue = [n for start in starts for n in edges(start)]
        while queue:
            current = queue.pop()
            if current not in reached:
                reached.add(current)
                queue.extend(edges(current))
        return reached
