"""A linear layer that holds int8 weights and nothing in full precision but its bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from viditq_fx import ops
from viditq_fx.errors import ViditqError, WeightError
from viditq_fx.ops.blocked import own, plain_weight, resident_bytes, restore
from viditq_fx.ops.quantize import dequantize_per_channel, quantize_per_channel
from viditq_fx.scheme import QuantScheme

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)
_LINEARS = {"w8a8": ops.LINEAR_W8A8, "w8a7": ops.LINEAR_W8A7}


class QuantLinear(nn.Module):
    """x [..., K] -> [..., N] by quantize_per_token and an integer linear; no derivative.

    In the state dict: `weight_q` int8 [N, K], `weight_scale` fp32 [N], `bias` [N] where there is one.
    A full-precision `weight` in a state dict that is loaded is quantized on the way in.
    """

    _weight_q: Tensor
    _weight_scale: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        weight_q: Tensor,
        weight_scale: Tensor,
        bias: nn.Parameter | None,
        scheme: QuantScheme,
        weight_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_q.shape
        self.scheme = scheme
        self.weight_dtype = weight_dtype
        self.register_buffer("_weight_q", own(weight_q))
        self.register_buffer("_weight_scale", weight_scale)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: QuantScheme,
        name: str = "linear",
        packed: dict[int, tuple[Tensor, Tensor]] | None = None,
    ) -> QuantLinear:
        """Pack a linear; `packed` lets tied weights share one pair (keyed by the parameter's id).

        Raises WeightError when the weight is on `meta` or holds NaN or infinity.
        """
        weight, memo = linear.weight, packed if packed is not None else {}
        if id(weight) not in memo:
            if weight.device.type == "meta":
                raise WeightError(f"{name}: the weight is on the meta device; load it first")
            with torch.no_grad():
                memo[id(weight)] = quantize_per_channel(weight.detach(), scheme.weight_bits)
            if not bool(torch.isfinite(memo[id(weight)][1]).all()):
                raise WeightError(f"{name}: the weight holds NaN or infinity, so it has no scale")
        layer = cls(*memo[id(weight)], linear.bias, scheme, weight.dtype)
        for key in _HOOKS:
            getattr(layer, key).update(getattr(linear, key))
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] of a float dtype -> [..., N] of the same dtype (autocast's, inside autocast)."""
        dtype = (
            torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        )
        x_q, x_scale = ops.QUANTIZE_PER_TOKEN.overload(x, self.scheme.input_bits)
        linear = _LINEARS[str(self.scheme)].overload
        return linear(x_q, x_scale, self._weight_q, self._weight_scale, self.bias, dtype)

    @property
    def weight(self) -> Tensor:
        """The weight [N, K] dequantized to the dtype it had: a new tensor at every access."""
        return dequantize_per_channel(plain_weight(self._weight_q), self._weight_scale, self.weight_dtype)

    @property
    def weight_q(self) -> Tensor:
        """The int8 weight [N, K] (a copy where only oneDNN's layout of it is in memory)."""
        return plain_weight(self._weight_q)

    @property
    def weight_scale(self) -> Tensor:
        """The fp32 scale [N] of each output channel."""
        return self._weight_scale

    def resident_bytes(self) -> int:
        """Bytes of memory that the weight takes now, in every layout, with its scales."""
        return resident_bytes(self._weight_q) + self._weight_scale.untyped_storage().nbytes()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        restore(self._weight_q)
        scale = self._weight_scale
        super()._apply(fn, recurse)
        own(self._weight_q)
        if self._weight_scale.dtype != torch.float32:  # model.half() casts buffers: scales stay fp32
            self._weight_scale = scale.to(self._weight_scale.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        destination[prefix + "weight_q"] = self.weight_q
        destination[prefix + "weight_scale"] = self._weight_scale

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing, unexpected, errors = missing_keys, unexpected_keys, error_msgs
        q, scale = state_dict.get(prefix + "weight_q"), state_dict.get(prefix + "weight_scale")
        if prefix + "weight" in state_dict:
            q, scale = quantize_per_channel(state_dict[prefix + "weight"], self.scheme.weight_bits)
        if q is None or scale is None:
            missing.append(prefix + "weight_q")
        elif q.dtype != torch.int8 or q.shape != (self.out_features, self.in_features):
            errors.append(
                f"{prefix}weight_q: int8 {self.out_features}x{self.in_features} expected, got {q.shape}"
            )
        else:
            with torch.no_grad():
                restore(self._weight_q).copy_(q)
                self._weight_scale.copy_(scale)
        bias = state_dict.get(prefix + "bias")
        if self.bias is not None and bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)
        elif (self.bias is None) != (bias is None):
            (missing if bias is None else unexpected).append(prefix + "bias")

    def __getstate__(self) -> dict[str, Any]:
        restore(self._weight_q)  # copies and pickles take the plain integers along
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        own(self._weight_q)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in {"weight", "weight_q", "weight_scale"}:
            raise ViditqError(f"QuantLinear.{name} is read-only: load a state dict to change the weight")
        super().__setattr__(name, value)
