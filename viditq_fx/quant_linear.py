"""Linear layers that hold integer weights and nothing in full precision but a bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx.traceback import annotate

from viditq_fx import ops
from viditq_fx.errors import RecipeError, ViditqError, WeightError, other_positions
from viditq_fx.layer_plan import Packed, complete_plan, form_of
from viditq_fx.ops.blocked import adopt, is_owned, keep_plain, own, plain_weight, resident_bytes, restore
from viditq_fx.ops.static_scale import positions_of
from viditq_fx.ops.weight_forms import (
    Stored,
    dequantize_weight,
    linear_in_scheme,
    name_of,
    quantize_input,
    quantize_weight,
    split_branch,
    stored_dtype,
    why_other_weight,
)
from viditq_fx.recipe import SitePlan
from viditq_fx.scheme import SCHEME_MARK, QuantScheme, WeightForm
from viditq_fx.timestep import Clock

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
_OF_THE_WEIGHT = ("_weight_scale", "_weight_zero", "_branch_down", "_branch_up")
"""Buffers that are made of the weight, in the order in which `quantize_weight` returns them."""
_SAVED = (
    *("weight", "weight_q", *(name[1:] for name in _OF_THE_WEIGHT)),
    *("input_multiplier", "input_scale", "input_edges", "rotation", "scheme"),
)


_Layer = TypeVar("_Layer", bound="QuantLinear")


def _held(values: Tensor | None, device: torch.device) -> Tensor | None:
    return None if values is None else values.detach().to(device, torch.float32).clone()


def _with_narrow_zero(found: dict[str, Tensor], held: Tensor | None) -> dict[str, Tensor]:
    """A state dict's entries with fp32 zero points, as files of earlier days have, as int8 where the layer holds those.

    Only where that is exact: others stay as they are, and are refused for their dtype.
    """
    zero = found.get("weight_zero")
    if zero is None or held is None or held.dtype != torch.int8 or not zero.is_floating_point():
        return found
    if zero.device.type == "meta" or not torch.equal(zero, zero.round().clamp(-128, 127)):
        return found
    return found | {"weight_zero": zero.to(torch.int8)}


class QuantLinear(nn.Module):
    """x [..., K] -> [..., N] by quantize_per_token and an integer linear; no derivative.

    In the state dict: `weight_q` int8 [N, K], `weight_scale` fp32 [N], `bias` [N] where there is one. With 4-bit
    weights `weight_q` is uint8 [N, H], two to a byte (ops/pack.py); with groups `weight_scale` is [G, N]. With a grid
    there is `weight_zero`, shaped as the scales, int8 for 4-bit weights (fp32 ones of older files are read too); where
    the input is balanced or rotated first, `input_multiplier` fp32 [K] and `rotation` int64 [], the block; with a
    low-rank branch `branch_down` [r, K] and `branch_up` [N, r]; from calibration `input_scale` fp32 [], [T] with
    `input_edges` fp32 [T - 1] between the T ranges of the timestep, or [S] for the S positions of a token in
    x [..., S, K]; and `scheme` uint8 [characters], the scheme's name: weights of another scheme are not loaded, of one
    that differs in the input alone they are, and scales of other ranges or bits are not. A full-precision
    `weight` in a state dict that is loaded is quantized on the way in.

    `weight`, `weight_q` and what `state_dict` returns are values to read: a write into them (also
    through `.data`) need not reach the layer. Load a state dict to change its weight.
    """

    _weight_q: Tensor
    _weight_scale: Tensor
    _weight_zero: Tensor | None
    _branch_down: Tensor | None
    _branch_up: Tensor | None
    _input_multiplier: Tensor | None
    _input_scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        stored: Stored,
        bias: nn.Parameter | None,
        plan: SitePlan,
        weight_dtype: torch.dtype,
        in_features: int,
    ) -> None:
        super().__init__()
        assert plan.scheme is not None
        (weight_q, scale, *zero), branch = split_branch(stored, plan.scheme.weight_form)
        self.out_features, self.in_features = weight_q.shape[0], in_features
        self.scheme, self.rotation = plan.scheme, plan.rotation
        self._scheme_name = str(plan.scheme)
        self._path = ""
        """Where the layer stands in its model, for what its errors say."""
        self.weight_dtype = weight_dtype
        self.clock: Clock | None = None
        """Where the range of the timestep is read, for scheme '-timestep'; `quantize_` sets it."""
        self._set_key(weight_q)
        vectors = {
            "_weight_scale": scale,
            "_weight_zero": zero[0] if zero else None,
            "_branch_down": branch[0] if branch else None,
            "_branch_up": branch[1] if branch else None,
            "_input_multiplier": _held(plan.multiplier, scale.device),
            "_input_scale": _held(plan.input_scale, scale.device),
        }
        for name, value in vectors.items():
            self.register_buffer(name, value, persistent=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: QuantScheme | SitePlan,
        name: str = "linear",
        packed: Packed | None = None,
    ) -> QuantLinear:
        """Pack a linear; `packed` lets tied weights share what is stored where their plans pack them alike.

        `scheme` may be a recipe's plan for it. Raises WeightError when the weight is on `meta` or holds NaN or
        infinity, RecipeError for a plan that does not fit the layer.
        """
        return cls._pack(linear, scheme, name, packed)

    @classmethod
    def _pack(
        cls: type[_Layer],
        linear: Any,
        scheme: QuantScheme | SitePlan,
        name: str,
        packed: Packed | None,
        **options: Any,
    ) -> _Layer:
        weight, memo = linear.weight, packed if packed is not None else {}
        bias: Any = linear.bias
        plan = complete_plan(scheme, weight[0].numel(), name)
        form = form_of(plan)
        key = id(weight), form
        # Buffers made under inference_mode could not be loaded into later.
        with torch.inference_mode(False), torch.no_grad():
            if key not in memo:
                if weight.device.type == "meta":
                    raise WeightError(f"{name}: the weight is on the meta device; load it first")
                q, *vectors = quantize_weight(weight.detach().flatten(1), form)
                if not all(bool(torch.isfinite(vector).all()) for vector in vectors):
                    raise WeightError(f"{name}: the weight holds NaN or infinity, so it has no scale")
                memo[key] = own(q), *vectors
            layer = cls(memo[key], bias, plan, weight.dtype, weight[0].numel(), **options)
        layer._path = name
        for hooks in _HOOKS:  # the dicts themselves: a handle removes its hook from the dict that it knows
            layer.__dict__[hooks] = getattr(linear, hooks)
        return layer.train(linear.training)

    def _set_key(self, w_NK: Tensor) -> None:
        """Take a key for the integers (see ops.blocked).

        A plain attribute and no buffer: its memory goes once oneDNN has a copy, and nobody who walks
        over buffers may read it then. Dynamo has to be told what it knows of buffers: static.
        """
        self._weight_q = w_NK if is_owned(w_NK) else own(w_NK)
        torch._dynamo.mark_static(self._weight_q)
        torch._dynamo.mark_static_address(self._weight_q, guard=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] of a float dtype -> [..., N] of the same dtype (autocast's, inside autocast)."""
        dtype = (
            torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        )
        if torch.compiler.is_compiling():
            self._keep_plain_for_export()
        x_q, x_scale = quantize_input(
            x, self.scheme, self._input_multiplier, self.rotation, self._scale_now(x)
        )
        arguments = (self.scheme, x, x_q, x_scale, self._stored(), self.bias, dtype)
        if not torch.compiler.is_compiling():
            return linear_in_scheme(*arguments)
        # Ops tell no 6-bit weight from an 8-bit one, nor how a grid was found: reports read the name instead.
        with annotate({SCHEME_MARK: self._scheme_name}):
            return linear_in_scheme(*arguments)

    @torch.compiler.assume_constant_result  # so Dynamo runs it, and torch 2.11's does not take it for an export
    def _keep_plain_for_export(self) -> bool:
        """An exported program holds the key itself, and saves it."""
        exporting = torch.compiler.is_exporting()
        if exporting:
            keep_plain(self._weight_q)
        return exporting

    @property
    def weight(self) -> Tensor:
        """The weight [N, K] dequantized to the dtype it had: a new tensor at every access."""
        stored = (self.weight_q, *self._stored()[1:])
        whole = dequantize_weight(stored, self.in_features, self._form(), self.weight_dtype)
        return whole.reshape(self._weight_shape)

    def _scale_now(self, x: Tensor) -> Tensor | None:
        """The calibrated scale of this call of x [..., K]; None where scales are found at run time."""
        if self._input_scale is not None and self.scheme.input_range == "position":
            if positions_of(x) != self._input_scale.shape[0]:
                raise other_positions(
                    self._path or self.extra_repr(), self._input_scale.shape[0], positions_of(x)
                )
            return self._input_scale
        if self._input_scale is None or self.scheme.input_range != "timestep":
            return self._input_scale
        if self.clock is None:
            raise RecipeError(
                f"{self._path or self.extra_repr()}: no model tells this layer its timestep; quantize_ the whole model "
                "by the recipe"
            )
        return self._input_scale.index_select(0, self.clock.read(self._input_scale.device))

    def _stored(self) -> Stored:
        vectors = (self._weight_zero, self._branch_down, self._branch_up)
        return self._weight_q, self._weight_scale, *(value for value in vectors if value is not None)

    def _plan(self) -> SitePlan:
        return SitePlan(scheme=self.scheme, multiplier=self._input_multiplier, rotation=self.rotation)

    def _form(self) -> WeightForm:
        return form_of(self._plan())

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        """Shape of the full-precision weight."""
        return self.out_features, self.in_features

    @property
    def weight_q(self) -> Tensor:
        """The stored weight, to read (a copy where only oneDNN's layout of it is in memory)."""
        if torch.compiler.is_dynamo_compiling():
            if self._weight_q.dtype != torch.int8:  # these have no other layout: their memory is never gone
                return self._weight_q.clone()
            return ops.READ_INT8.overload(self._weight_q)
        return plain_weight(self._weight_q)

    @property
    def weight_scale(self) -> Tensor:
        """The fp32 scales: [N], or [G, N] with groups of input channels."""
        return self._weight_scale

    def resident_bytes(self) -> int:
        """Bytes of memory that the weight takes now, in every layout, with its scales."""
        vectors = [value for value in self._buffers.values() if value is not None]
        return resident_bytes(self._weight_q) + sum(v.untyped_storage().nbytes() for v in vectors)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        vectors, key = dict(self._buffers), restore(self._weight_q)
        super()._apply(fn, recurse)
        with torch.inference_mode(False), torch.no_grad():
            moved = fn(key)
            if moved is not key:
                self._set_key(moved)
            for name, value in self._buffers.items():  # model.half() casts buffers: scales stay fp32
                old = vectors[name]
                if value is not None and old is not None and value.dtype != old.dtype:
                    self._buffers[name] = old.to(value.device)
            self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=key.device)).dtype
            self._wind_clock()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight_q"] = self.weight_q
        for name, value in self._vectors().items():
            destination[prefix + name] = value
        destination[prefix + "scheme"] = name_of(self.scheme)
        if self.clock is not None:
            destination[prefix + "input_edges"] = self.clock.saved()

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
        unexpected: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs
        )
        ours = {prefix + name for name in _SAVED}
        unexpected_keys.extend(key for key in unexpected if key not in ours)
        found = {name: state_dict[prefix + name] for name in _SAVED if prefix + name in state_dict}
        found = _with_narrow_zero(found, self._weight_zero)
        if "weight" not in found and not {"weight_q", *self._vectors()} <= found.keys():
            missing_keys.extend(prefix + n for n in ("weight_q", *self._vectors()) if n not in found)
            return
        with torch.inference_mode(False), torch.no_grad():
            problem = self._load_weight(found, bool(local_metadata.get("assign_to_params_buffers", False)))
        if problem is not None:
            error_msgs.append(f"{prefix}{problem}")

    def _load_weight(self, found: dict[str, Tensor], assign: bool) -> str | None:
        """Take what a state dict holds for the weight; returns why not, and then nothing is changed."""
        told, edges = found.pop("scheme", None), found.pop("input_edges", None)  # earlier versions saved none
        problem = self._why_not_load(found, assign)
        problem = problem or why_other_weight(told, self.scheme, scaled="input_scale" in found)
        problem = problem or (self.clock.why_other(edges) if self.clock is not None else None)
        if problem is not None:
            return problem
        if "weight" in found:
            q, *vectors = quantize_weight(found["weight"].flatten(1), self._form())
            names = [name[1:] for name in _OF_THE_WEIGHT if self._buffers[name] is not None]
            given: dict[str, Tensor] = dict(zip(names, vectors, strict=True))
        else:
            q, given = found["weight_q"], {name: found[name] for name in self._vectors()}
        for name, value in given.items():
            if not bool(torch.isfinite(value).all()):
                return f"{'weight' if 'weight' in found else name}: holds NaN or infinity"
        if int(given.pop("rotation", torch.tensor(self.rotation))) != self.rotation:
            return f"rotation: this layer rotates blocks of {self.rotation}; quantize it by the recipe that was saved"
        if assign:
            self._set_key(own(q))
        else:
            restore(self._weight_q).copy_(q)
        for name, value in given.items():
            if assign:
                self._buffers[f"_{name}"] = value.detach()
            else:
                self._vectors()[name].copy_(value)
        self._wind_clock()
        return None

    def _wind_clock(self) -> None:
        if self.clock is not None and self._input_scale is not None:
            self.clock.follow(self._input_scale.device)

    def _vectors(self) -> dict[str, Tensor]:
        """What a state dict holds beside the weight's integers."""
        named = {name[1:]: value for name, value in self._buffers.items() if value is not None}
        rotated = {"rotation": torch.tensor(self.rotation)} if self.rotation > 1 else {}
        return {name: value for name, value in named.items() if name in _SAVED} | rotated

    def _why_not_load(self, found: dict[str, Tensor], assign: bool) -> str | None:
        n, k, form = self.out_features, self.in_features, self._form()
        wanted = {
            "weight": (self._weight_shape, None),
            "weight_q": ((n, form.stored_width(k)), stored_dtype(form)),
            **{name: (tuple(value.shape), value.dtype) for name, value in self._vectors().items()},
        }
        if "weight" in found and len(found) > 1:
            return "weight: given beside weight_q or weight_scale; load one form of it"
        for name, value in found.items():
            if name not in wanted:
                return (
                    f"{name}: this layer, in scheme {self.scheme}, has none; quantize it as the saved one was"
                )
            shape, dtype = wanted[name]
            if tuple(value.shape) != shape or (
                value.dtype != dtype if dtype else not value.is_floating_point()
            ):
                kind = dtype or "a float dtype"
                return f"{name}: {kind} of shape {shape} expected, got {value.dtype} {tuple(value.shape)}"
            if value.device.type == "meta":
                return f"{name}: is on the meta device and holds no values"
        if self._weight_q.device.type == "meta" and not assign:
            return "weight_q: this layer is on the meta device; load with assign=True, or to_empty() first"
        return None

    def __getstate__(self) -> dict[str, Any]:
        restore(self._weight_q)  # copies and pickles take the plain integers along
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_key(adopt(self._weight_q))  # tied layers were copied with one tensor, and keep one

    def __setattr__(self, name: str, value: Any) -> None:
        if name in {"weight", "weight_q", "weight_scale", "weight_zero", "input_multiplier"}:
            raise ViditqError(
                f"{type(self).__name__}.{name} is read-only: load a state dict to change the weight"
            )
        super().__setattr__(name, value)
