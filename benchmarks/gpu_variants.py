"""The variants of the w8a8 GEMM on this CUDA device: are they right, and which wins? Used by `benchmarks/gpu.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_checks import Shape, problem
from torch import Tensor

from viditq_fx.ops.linear import linear_epilogue
from viditq_fx.triton_templates import linear_w8a8_persistent, linear_w8a8_split_k, linear_w8a8_tma
from viditq_fx.triton_templates.base import GemmConfig, KernelTemplate, architecture

Method = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A variant's template, and the function that launches its kernel without Inductor."""

    template: KernelTemplate
    launch: Callable[..., Tensor]


VARIANTS = {
    "split-K": Variant(template=linear_w8a8_split_k.TEMPLATE, launch=linear_w8a8_split_k.launch),
    "persistent": Variant(template=linear_w8a8_persistent.TEMPLATE, launch=linear_w8a8_persistent.launch),
    "TMA": Variant(template=linear_w8a8_tma.TEMPLATE, launch=linear_w8a8_tma.launch),
}
_CHECKED = (
    (512, 1152, 384),
    (333, 1008, 200),
    (8192, 352, 131),
    (129, 80, 64),
    (100, 1152, 72),
    (17, 333, 8),
)
"""M, K, N of the checks of every config of a variant that accepts them."""


def variant_checks(name: str) -> Iterator[tuple[str, str | None]]:
    """(what was checked, None or what is wrong): every int32 sum of every config of this device."""
    template, arch = VARIANTS[name].template, architecture(torch.cuda.get_device_capability())
    configs = [config for known, _, found in template.configs if known == arch for config in found]
    for rows, depth, width in _CHECKED:
        given = problem(Shape(model="", rows=rows, depth=depth, width=width))
        for config in () if template.supports(given) else configs:
            if template.fits(config, given):
                label = f"{config} s{config.num_stages} w{config.num_warps}"
                wrong = _check(name, config, rows, depth, width)
                yield f"exact {name} {label} M{rows} K{depth} N{width}", wrong


def _check(name: str, config: GemmConfig, rows: int, depth: int, width: int) -> str | None:
    gen = torch.Generator(device="cuda").manual_seed(rows * 7919 + depth * 31 + width)
    make: Any = {"generator": gen, "dtype": torch.int8, "device": "cuda"}
    x_MK = torch.randint(-127, 128, (rows, depth), **make)
    w_NK = torch.randint(-127, 128, (width, depth), **make)
    ones_M, ones_N = torch.ones(rows, 1, device="cuda"), torch.ones(width, device="cuda")
    got = VARIANTS[name].launch(x_MK, ones_M, w_NK, ones_N, None, torch.float32, config=config)
    wrong = int((got != (x_MK.double() @ w_NK.double().t()).float()).sum())
    return f"{wrong} of {got.numel()} sums are wrong" if wrong else None


def variants_of(
    shape: Shape, rows_known: Sequence[str] = tuple(VARIANTS)
) -> dict[str, tuple[str, GemmConfig]]:
    """What is timed of a shape: method's name -> (variant, config), every config that its device and shape have."""
    found = {}
    for name in rows_known:
        template, given = VARIANTS[name].template, problem(shape)
        for config in () if template.supports(given) else template.candidates(given):
            label = f"int8 GEMM only, viditq {name} {config} s{config.num_stages} w{config.num_warps}"
            found[label] = (name, config)
    return found


def variant_methods(
    shape: Shape, operands: Sequence[Any], variants: Sequence[str]
) -> dict[str, Callable[[], Callable[[int], Method]]]:
    """Name -> maker of (copy -> call), as `methods` of gpu.py."""
    makers: dict[str, Any] = {}
    for name in variants:
        template, given = VARIANTS[name].template, problem(shape)
        make = _split_k if name == "split-K" else _launched
        # Of the splits there are many: the best three by estimate.
        for config in () if template.supports(given) else template.candidates(given)[:3]:
            label = f"{_method_name(name)} {config} s{config.num_stages} w{config.num_warps}"
            makers[label] = lambda make=make, name=name, config=config: make(name, config, operands)
    return makers


def variant_names(shape: Shape) -> list[str]:
    """What may be timed of a shape, for --dry-run, which knows no device."""
    few = shape.rows <= linear_w8a8_split_k.MAX_ROWS
    return [_method_name(name) for name in VARIANTS if (name == "split-K") == few]


def _method_name(variant: str) -> str:
    return f"int8 GEMM only, viditq {variant}"


def _launched(name: str, config: GemmConfig, operands: Sequence[Any]) -> Callable[[int], Method]:
    def call(i: int) -> Method:
        o = operands[i]
        return lambda: VARIANTS[name].launch(
            o.x_q, o.x_scale, o.w_q, o.w_scale, o.bias, torch.bfloat16, config=config
        )

    return call


def _split_k(name: str, config: GemmConfig, operands: Sequence[Any]) -> Callable[[int], Method]:
    run = split_linear(config)

    def call(i: int) -> Method:
        o = operands[i]
        return lambda: run(o.x_q, o.x_scale, o.w_q, o.w_scale, o.bias)

    return call


def split_linear(config: GemmConfig) -> Callable[..., Tensor]:
    """The kernel that splits K, and the second one that Inductor writes where nothing follows to fuse it with."""

    def finish(sums: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
        acc_MN = sums[0]
        for part in sums[1:]:
            acc_MN = acc_MN + part
        return linear_epilogue(acc_MN, x_scale, w_scale, bias, torch.bfloat16)

    fast = torch.compile(finish, dynamic=False)

    def run(x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
        sums_SMN = linear_w8a8_split_k.partial_sums(x_q, w_q, config=config)
        return fast(sums_SMN, x_scale, w_scale, bias)

    return run
