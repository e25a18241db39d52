"""Pointwise convolutions as the linears over channels that they are, and which layers count as linears."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from viditq_fx.errors import ViditqError
from viditq_fx.layer_plan import Packed
from viditq_fx.ops.weight_forms import Stored
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.recipe import SitePlan
from viditq_fx.scheme import QuantScheme

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
"""What QuantPointwiseConv may take the place of."""
_IMAGE_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class QuantPointwiseConv(QuantLinear):
    """x [B, K, *S] -> [B, N, *S]: a convolution of kernel size 1 as the linear over channels that it is.

    Like QuantLinear, but a full-precision `weight` is [N, K, 1, ...]. The result lies in memory as the
    convolution's would: channels last where the input does, else row by row.
    """

    def __init__(
        self,
        stored: Stored,
        bias: nn.Parameter | None,
        plan: SitePlan,
        weight_dtype: torch.dtype,
        in_features: int,
        space: int = 2,
    ) -> None:
        super().__init__(stored, bias, plan, weight_dtype, in_features)
        # What code reads of a convolution over `space` dimensions.
        self.out_channels, self.in_channels = self.out_features, self.in_features
        self.kernel_size = self.stride = self.dilation = (1,) * space
        self.padding, self.padding_mode, self.groups = (0,) * space, "zeros", 1

    @classmethod
    def from_conv(
        cls,
        conv: Convolution,
        scheme: QuantScheme | SitePlan,
        name: str = "conv",
        packed: Packed | None = None,
    ) -> QuantPointwiseConv:
        """Pack a convolution; `packed` as in `QuantLinear.from_linear`.

        Raises ViditqError for one that is no linear over channels, WeightError as `from_linear`.
        """
        reason = why_not_pointwise(conv)
        if reason is not None:
            raise ViditqError(f"{name}: {reason}")
        return cls._pack(conv, scheme, name, packed, space=len(conv.kernel_size))

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features, *self.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """x [B, K, *S] (or [K, *S]) of a float dtype -> [B, N, *S], see QuantLinear.forward."""
        channel = -1 - len(self.kernel_size)
        tokens = x.movedim(channel, -1).contiguous()
        if self._reads_all_positions(tokens):
            y = super().forward(tokens.reshape(-1, math.prod(tokens.shape[channel:-1]), tokens.shape[-1]))
            y = y.reshape(*tokens.shape[:-1], self.out_features)
        else:
            y = super().forward(tokens)
        y = y.movedim(-1, channel)
        form = _IMAGE_FORMATS.get(x.dim())
        if form is not None and x.is_contiguous(memory_format=form) and not x.is_contiguous():
            return y
        return y.contiguous()

    def _reads_all_positions(self, tokens: Tensor) -> bool:
        """Whether scales by position are of all of an image [..., *S, K], and not of its last axis alone.

        They are where calibration saw the linear read the tokens that the image was made of.
        """
        if self._input_scale is None or self.scheme.input_range != "position":
            return False
        known, space = self._input_scale.shape[0], tokens.shape[-1 - len(self.kernel_size) : -1]
        return known != space[-1] and known == math.prod(space)


def why_not_pointwise(conv: Convolution) -> str | None:
    """Why a convolution is no linear over channels; None if it is."""
    if set(conv.kernel_size) != {1} or conv.groups != 1:
        return f"a convolution of kernel {conv.kernel_size} with {conv.groups} groups: only pointwise ones are linears"
    if set(conv.stride) != {1} or not (isinstance(conv.padding, str) or set(conv.padding) == {0}):
        return f"a pointwise convolution of stride {conv.stride} and padding {conv.padding}: no linear over channels"
    return None


def is_linear_layer(module: nn.Module) -> bool:
    """Whether a module in full precision is a linear: nn.Linear, or a pointwise convolution."""
    return isinstance(module, nn.Linear) or (
        isinstance(module, Convolution) and why_not_pointwise(module) is None
    )


def quantized_layer(
    module: nn.Module, scheme: QuantScheme | SitePlan, name: str, packed: Packed
) -> QuantLinear:
    """The int8 layer that takes a linear layer's place; see `QuantLinear.from_linear`."""
    if isinstance(module, Convolution):
        return QuantPointwiseConv.from_conv(module, scheme, name, packed)
    assert isinstance(module, nn.Linear)
    return QuantLinear.from_linear(module, scheme, name, packed)
