"""Make each pointwise convolution that is to be quantized the linear over channels that it is.

conv(x [B, K, *S], w [N, K, 1, ...], b)  ->  permute(linear(permute(x), flatten(w, 1), b))

Where tokens were made an image for the convolution (unflatten, permute) and tokens of it again (flatten,
permute), the linear reads and makes the tokens themselves: then later passes see what they see elsewhere.
A convolution that stays in full precision stays the call that it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from viditq_fx.graph_edit import call, example
from viditq_fx.passes.annotate_sites import SITE_KEY, move_site
from viditq_fx.passes.base import Match, Pass, PassContext, Reject
from viditq_fx.passes.convolution import channel_dim, is_pointwise_conv
from viditq_fx.passes.dataflow import same_size
from viditq_fx.passes.effects import aliased_chain, is_removable, op_name, write_roots
from viditq_fx.passes.layouts import same_layout
from viditq_fx.passes.views import merges_space, permutation, regroup, regrouped_rows, source_of

_ELEMENTWISE = frozenset({"mul", "silu", "gelu", "relu", "sigmoid"})
"""What stands between a feed-forward's convolutions; other ops keep the permute behind them."""


@dataclass(frozen=True, kw_only=True)
class LinearizeConvolutions(Pass):
    """Put linears in place of planned convolutions; sums are taken in another order."""

    name: ClassVar[str] = "linearize_convolutions"
    changes_numerics: ClassVar[bool] = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> tuple[Match | Reject, ...]:
        results: list[Match | Reject] = []
        layout = _Layout(gm.graph)
        for node in list(gm.graph.nodes):
            entry = ctx.sites.get(node.name)
            if entry is None or entry.planned is None or entry.reason is not None:
                continue
            if is_pointwise_conv(node):
                linear = _linearize(gm.graph, node, layout)
                move_site(node, linear, ctx)
                layout.put_in_place_of(node, linear)
                results.append(Match(site=linear.meta[SITE_KEY], detail=linear.name))
        return tuple(results)


def _linearize(graph: fx.Graph, conv: fx.Node, layout: _Layout) -> fx.Node:
    """Insert the linear before a convolution; it reads tokens [..., K]."""
    x, weight, bias = (*conv.args, None)[:3]
    assert isinstance(x, fx.Node)

    def fake(x: torch.Tensor, w: torch.Tensor, _: object) -> torch.Tensor:
        # Of symbolic [B, H, W, K] torch 2.11 cannot take F.linear: it asks for the number of elements.
        return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=example(conv).dtype)

    with graph.inserting_before(conv):
        tokens = layout.tokens(x, conv)
        matrix = call(graph, torch.flatten, (weight, 1), conv)
        return call(graph, torch.nn.functional.linear, (tokens, matrix, bias), conv, fake)


class _Layout:
    """Takes images [B, C, *S] to tokens [..., C] and back, with as few permutes as can be."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        roots = write_roots(graph)
        self.written = {n for n in graph.nodes if not roots.isdisjoint(aliased_chain(n))}
        """Every node whose memory is written at some time, through whichever view."""
        self.permuted: dict[fx.Node, fx.Node] = {}
        """Image -> its tokens [B, *S, C]: convolutions that read one image share one quantize."""
        self.regrouped: dict[fx.Node, list[fx.Node]] = {}
        """Convolution -> the views that made [B, *S, C] of the tokens that its linear reads, last first."""

    def tokens(self, image: fx.Node, conv: fx.Node) -> fx.Node:
        """What the linear reads: the rows are the image's positions in order, grouped in any way."""
        value, self.regrouped[conv] = self._channels_last(image, channel_dim(conv), conv), []
        while (source := self._unwritten(regrouped_rows(value))) is not None:
            self.regrouped[conv].append(value)
            value = self._plain(source)
        return value

    def put_in_place_of(self, conv: fx.Node, linear: fx.Node) -> None:
        """Let every reader of the convolution read the linear's result in the form that it wants."""
        channel, result = channel_dim(conv), linear
        with self.graph.inserting_before(conv):
            for view in reversed(self.regrouped[conv]):
                result = regroup(self.graph, view, result, conv)
            if conv not in self.written:
                for user in list(conv.users):
                    self._cancel(user, conv, linear, result)
            if conv.users:
                made = self._image(result, channel, conv)
                # What writes the convolution's result now writes these: no later look at them may be moved.
                self.written |= {*aliased_chain(made)} if conv in self.written else set()
                conv.replace_all_uses_with(made)
        image = conv.args[0]
        self.graph.erase_node(conv)
        self._erase_idle(image)
        self._erase_idle(result)

    def _channels_last(self, image: fx.Node, channel: int, reader: fx.Node) -> fx.Node:
        """[B, C, *S] -> [B, *S, C]."""
        plain, axes = self._plain(image), _to_last(example(image).dim(), channel)
        tokens = self._undone(plain, axes)
        if tokens is not None:
            return tokens
        if list(image.users) == [reader] and self._can_move(plain):
            operands = {n: self._channels_last(n, channel, plain) for n in plain.all_input_nodes}
            copy = self.graph.node_copy(plain, operands.__getitem__)
            copy.meta["example_value"] = example(plain).permute(axes)
            return copy
        tokens = self.permuted.get(image)
        if tokens is None:
            tokens = call(self.graph, torch.permute, (image, axes), reader)
            if not same_size(example(tokens).stride(-1), 1):  # or the integers would lie as the image does
                form = torch.contiguous_format
                tokens = call(self.graph, torch.clone, (tokens,), reader, memory_format=form)
            if image not in self.written:  # a copy would not show the write to a later reader
                self.permuted[image] = tokens
        return tokens

    def _undone(self, image: fx.Node, axes: tuple[int, ...]) -> fx.Node | None:
        """The tokens that an image is a permute of, if `axes` take it back to them."""
        made = permutation(image)
        if made is None or [made[axis] for axis in axes] != list(range(len(axes))):
            return None
        source = self._unwritten(image.args[0])  # type: ignore[arg-type]
        return None if source is None else self._plain(source)

    def _can_move(self, node: fx.Node) -> bool:
        """Whether a permute behind an elementwise op may stand before it."""
        if node.op not in {"call_function", "call_method"} or op_name(node) not in _ELEMENTWISE:
            return False
        values, whole = [example(n) for n in node.all_input_nodes], example(node).shape
        alike = all(
            isinstance(v, torch.Tensor) and v.dim() == len(whole) and all(map(same_size, v.shape, whole))
            for v in values
        )
        return alike and len(node.users) == 1 and not {node, *node.all_input_nodes} & self.written

    def _plain(self, node: fx.Node) -> fx.Node:
        """The tensor that a value is a contiguous copy of: same values, as nothing writes either."""
        while (source := self._unwritten(source_of(node, frozenset({"contiguous"})))) is not None:
            node = source
        return node

    def _unwritten(self, source: fx.Node | None) -> fx.Node | None:
        """`source`, unless it is written somewhere: then a later look at it may show other values."""
        return None if source in self.written else source

    def _cancel(self, user: fx.Node, conv: fx.Node, linear: fx.Node, result: fx.Node) -> None:
        """Give a reader that takes the image back to tokens the tokens; `result` is [B, *S, C]."""
        if permutation(user) == _to_last(example(conv).dim(), channel_dim(conv)):
            user.replace_all_uses_with(result)
            self.graph.erase_node(user)
        elif channel_dim(conv) == 1 and merges_space(user, conv):
            for reader in [n for n in user.users if permutation(n) == (0, 2, 1)]:
                reader.replace_all_uses_with(self._merged(linear, result, reader))
                self.graph.erase_node(reader)
            if not user.users:
                self.graph.erase_node(user)

    def _merged(self, linear: fx.Node, result: fx.Node, tokens: fx.Node) -> fx.Node:
        """`result` [B, *S, C] as [B, S, C]: often what the linear makes already."""
        made, wanted = example(linear).shape, example(tokens).shape
        if len(made) == 3 and all(map(same_size, made, wanted)):
            return linear
        return call(self.graph, torch.flatten, (result, 1, -2), tokens)

    def _image(self, result: fx.Node, channel: int, conv: fx.Node) -> fx.Node:
        """[B, *S, C] -> [B, C, *S], laid out as the convolution's result: `view` may stand behind it."""
        dims = example(conv).dim()
        axes = (*range(channel), dims - 1, *range(channel, dims - 1))
        image = call(self.graph, torch.permute, (result, axes), conv)
        if same_layout(example(image), example(conv)):
            return image
        return call(self.graph, torch.clone, (image,), conv, memory_format=torch.contiguous_format)

    def _erase_idle(self, node: object) -> None:
        """Erase a value that nothing reads any more, and what it alone was made of."""
        while (
            isinstance(node, fx.Node) and not node.users and is_removable(node) and SITE_KEY not in node.meta
        ):
            sources = node.all_input_nodes
            self.graph.erase_node(node)
            for source in sources[1:]:
                self._erase_idle(source)
            node = sources[0] if sources else None


def _to_last(dims: int, channel: int) -> tuple[int, ...]:
    return (*range(channel), *range(channel + 1, dims), channel)
