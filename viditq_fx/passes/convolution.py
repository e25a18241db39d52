"""Pointwise convolutions: linears over the channel dimension in disguise.

conv(x [B, K, *S], w [N, K, 1, ...], b)[b, :, s] = w [N, K] @ x[b, :, s] + b      for stride 1 and no padding
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from viditq_fx.graph_edit import example
from viditq_fx.passes.effects import op_name

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def is_pointwise_conv(node: fx.Node) -> bool:
    """A convolution of kernel size 1 without groups, whatever its stride and padding."""
    if node.op != "call_function" or op_name(node) not in CONVOLUTIONS:
        return False
    operands = [arg for arg in node.args[:2] if isinstance(arg, fx.Node)]
    if len(operands) < 2:
        return False
    source, weight = example(operands[0]), example(operands[1])
    if not isinstance(weight, torch.Tensor) or not isinstance(source, torch.Tensor):
        return False
    channels = source.shape[source.dim() - weight.dim() + 1]  # without a batch, they come first
    return all(size == 1 for size in weight.shape[2:]) and weight.shape[1] == channels


def channel_dim(node: fx.Node) -> int:
    """Dimension of the channels of a pointwise convolution's input and result: 1, or 0 without a batch."""
    return example(node).dim() - example(node.args[1]).dim() + 1  # type: ignore[arg-type]


def row_sizes(node: fx.Node) -> tuple[Any, ...]:
    """Sizes whose product is M, the rows of a linear's or pointwise convolution's result."""
    shape = tuple(example(node).shape)
    channel = channel_dim(node) if is_pointwise_conv(node) else len(shape) - 1
    return shape[:channel] + shape[channel + 1 :]


def out_channels(node: fx.Node) -> Any:
    """N of a linear or pointwise convolution."""
    return example(node).shape[channel_dim(node) if is_pointwise_conv(node) else -1]


def why_no_linear(node: fx.Node) -> str | None:
    """Why a pointwise convolution is not one linear over all its input; None if it is."""
    given = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
    if not _all(given.get("stride", 1), 1):
        return f"pointwise convolution of stride {given['stride']}: only stride 1 is a linear over channels"
    padding = given.get("padding", 0)
    # Of a kernel of size 1, "same" pads nothing.
    if padding not in ("valid", "same") and not _all(padding, 0):
        return f"pointwise convolution with padding {padding}: it makes more rows than it reads"
    return None


def _all(value: Any, wanted: int) -> bool:
    values = value if isinstance(value, list | tuple) else (value,)
    return all(isinstance(v, int) and v == wanted for v in values)
