"""The GEMMs of schemes besides w8a8 on this CUDA device: are they right, and how fast? Used by `benchmarks/gpu.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_checks import Shape, problem
from torch import Tensor

from viditq_fx.lowering.extern_linear import viditq_scaled_mm_linear
from viditq_fx.ops import LINEAR_W4A4, LINEAR_W4A8_BLOCK, PACK_INT4, QUANTIZE_PER_BLOCK
from viditq_fx.ops.fp8 import E4M3
from viditq_fx.ops.pack import pack_int4
from viditq_fx.ops.weight_forms import Stored, linear_of, quantize_input, quantize_weight
from viditq_fx.scheme import BLOCK, GROUPS, QuantScheme
from viditq_fx.triton_templates import linear_fp8, linear_w4_block, linear_w4a8
from viditq_fx.triton_templates.base import GemmConfig, KernelTemplate, architecture


@dataclass(frozen=True, kw_only=True)
class SchemeKernel:
    """A scheme's template, and the function that launches its kernel without Inductor."""

    template: KernelTemplate
    launch: Callable[..., Tensor]
    group: int | None = None
    """Input channels that share a scale of the weight; None for one scale an output channel."""
    block_bits: int | None = None
    """Bits of an input that has a scale for each token and block of K; None for one scale a token."""

    @property
    def packed(self) -> bool:
        """Whether inputs are two to a byte."""
        return self.block_bits == 4


def _by_group(
    name: str, templates: Sequence[KernelTemplate], launch: Callable[..., Tensor], bits: int | None = None
) -> dict[str, SchemeKernel]:
    """A scheme without groups, then with those of each size."""
    return {
        f"{name}{f'-g{group}' if group else ''}": SchemeKernel(
            template=template, launch=launch, group=group, block_bits=bits
        )
        for template, group in zip(templates, (None, *GROUPS), strict=True)
    }


SCHEMES = {
    **_by_group("w4a8", linear_w4a8.TEMPLATES, linear_w4a8.launch),
    # Input scales of blocks: no scheme of the backend yet, so named by their ops.
    **_by_group("w4a8-block", linear_w4_block.W4A8_BLOCK, linear_w4_block.launch, 8),
    **_by_group("w4a4", linear_w4_block.W4A4, linear_w4_block.launch, 4),
    "fp8": SchemeKernel(template=linear_fp8.TEMPLATE, launch=linear_fp8.launch),
}
FP8_PEER = "fp8 GEMM only, cuBLASLt row-wise"
_CHECKED = ((512, 1152, 384), (333, 1000, 200), (257, 77, 131), (1, 1152, 72), (17, 333, 8))
"""M, K, N of the checks of every config that fits them."""


def method_names() -> list[str]:
    """What `scheme_methods` times, for --dry-run."""
    return [name for scheme in SCHEMES for name in (_gemm_name(scheme), _compiled_name(scheme))] + [FP8_PEER]


def _gemm_name(scheme: str) -> str:
    return f"{scheme} GEMM only, viditq"


def _compiled_name(scheme: str) -> str:
    return f"{scheme} quantize + GEMM, viditq compiled"


def exact_operands(
    scheme: str, rows: int, depth: int, width: int, device: str = "cuda"
) -> tuple[tuple[Any, ...], Tensor]:
    """(arguments of the scheme's linear whose result no order of addition rounds, that result in fp64)."""
    gen = torch.Generator(device=device).manual_seed(rows * 7919 + depth * 31 + width)

    def draw(largest: int, *shape: int) -> Tensor:
        return torch.randint(-largest, largest + 1, shape, generator=gen, dtype=torch.int8, device=device)

    kernel = SCHEMES[scheme]
    largest_x, largest_w = (8, 8) if scheme == "fp8" else (7 if kernel.packed else 127, 7)
    x, w = draw(largest_x, rows, depth), draw(largest_w, width, depth)
    scale_M, scale_N = torch.ones(rows, 1, device=device), torch.ones(width, device=device)
    x_f64, w_f64 = x.double(), w.double()
    if scheme == "fp8":
        stored: Tensor = w.float().to(E4M3)
        return (x.float().to(E4M3), scale_M, stored, scale_N, None, torch.float32), x_f64 @ w_f64.t()
    w[::3, ::5] = -8
    w_f64 = w.double()
    if kernel.group:  # powers of two, so that fp32 adds the groups exactly
        scale_N = torch.stack([scale_N * 2.0 ** -(g % 4) for g in range(-(-depth // kernel.group))])
        w_f64 *= scale_N.double().t().repeat_interleave(kernel.group, dim=1)[:, :depth]
    if kernel.block_bits:
        scale_M = torch.cat([scale_M * 2.0 ** -(g % 3) for g in range(-(-depth // BLOCK))], dim=1)
        x_f64 *= scale_M.double().repeat_interleave(BLOCK, dim=1)[:, :depth]
    args = (pack_int4(x) if kernel.packed else x, scale_M, pack_int4(w), scale_N, None, torch.float32)
    return (*args, depth) if kernel.packed else args, x_f64 @ w_f64.t()


def _check(scheme: str, config: GemmConfig, rows: int, depth: int, width: int) -> str | None:
    args, want = exact_operands(scheme, rows, depth, width)
    wrong = int((SCHEMES[scheme].launch(*args, config=config).double() != want).sum())
    return f"{wrong} of {want.numel()} sums are wrong" if wrong else None


def scheme_checks(scheme: str) -> Iterator[tuple[str, str | None]]:
    """(what was checked, None or what is wrong) of every config of this device, then of the compiled linear."""
    template, arch = SCHEMES[scheme].template, architecture(torch.cuda.get_device_capability())
    configs = [c for known, _, found in template.configs if known == arch for c in found]
    assert configs, f"{scheme} has no config for sm_{arch}"
    for config in configs:
        label = f"{scheme} {config} s{config.num_stages} w{config.num_warps}"
        for rows, depth, width in _CHECKED:
            if template.fits(config, problem(Shape(model="", rows=rows, depth=depth, width=width))):
                yield f"exact {label} M{rows} K{depth} N{width}", _check(scheme, config, rows, depth, width)
    x = torch.randn(2, 1000, 1152, device="cuda", dtype=torch.bfloat16)
    weights = _weight(scheme, torch.randn(1152, 1152, device="cuda") * 0.03)
    linear = _linear(scheme)
    args = (x, *weights, torch.randn(1152, device="cuda", dtype=torch.bfloat16))
    torch._dynamo.reset()
    got, want = torch.compile(linear, dynamic=False)(*args).float(), linear(*args).float()
    error = float((got - want).norm() / want.norm())
    yield f"compiled {scheme}", None if error < 5e-3 else f"relative error {error:.2e}"


def _weight_scheme(name: str) -> QuantScheme:
    """The scheme whose weight a name has: that of an input with scales of blocks has a name of its own."""
    kernel = SCHEMES[name]
    if kernel.block_bits is None:
        return QuantScheme.parse(name)
    return QuantScheme.parse(f"w4a8-g{kernel.group}" if kernel.group else "w4a8")


def _weight(name: str, w: Tensor) -> Stored:
    return quantize_weight(w, _weight_scheme(name).weight_form)


def _input(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    kernel = SCHEMES[name]
    if kernel.block_bits is None:
        return quantize_input(x, _weight_scheme(name))
    x_q, x_scale = QUANTIZE_PER_BLOCK.overload(x, kernel.block_bits, BLOCK)
    return PACK_INT4.overload(x_q) if kernel.packed else x_q, x_scale


def _linear(name: str) -> Callable[..., Tensor]:
    packed, blocks = SCHEMES[name].packed, SCHEMES[name].block_bits is not None
    op = LINEAR_W4A4 if packed else LINEAR_W4A8_BLOCK if blocks else linear_of(QuantScheme.parse(name))

    def quantized_linear(x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        depth = (x.shape[-1],) if packed else ()
        return op.overload(*_input(name, x), stored, scale, bias, x.dtype, *depth)

    return quantized_linear


def scheme_methods(
    shape: Shape, operands: Sequence[Any], schemes: Sequence[str]
) -> dict[str, Callable[[], Callable[[int], Callable[[], Any]]]]:
    """Name -> maker of (copy -> call), as `methods` of gpu.py; `operands` have x, w and bias in bf16."""
    found: dict[str, Any] = {}
    for name in schemes:
        found[_gemm_name(name)] = lambda name=name: _gemm_only(name, shape, operands)
        found[_compiled_name(name)] = lambda name=name: _compiled(name, operands)
    if "fp8" in schemes:
        found[FP8_PEER] = lambda: _scaled_mm(operands)
    return found


def quantized_operands(name: str, operands: Sequence[Any]) -> list[tuple[Tensor, ...]]:
    """Copies of x, w and bias in bf16 -> the operands of a scheme's linear."""
    return [(*_input(name, o.x), *_weight(name, o.w), o.bias) for o in operands]


def _gemm_only(name: str, shape: Shape, operands: Sequence[Any]) -> Callable[[int], Callable[[], Any]]:
    kernel, given = SCHEMES[name], quantized_operands(name, operands)
    config = kernel.template.candidates(replace(problem(shape), group=kernel.group))[0]
    depth = (shape.depth,) if kernel.packed else ()
    return lambda i: lambda: kernel.launch(*given[i], torch.bfloat16, *depth, config=config)


def _compiled(name: str, operands: Sequence[Any]) -> Callable[[int], Callable[[], Any]]:
    given = [(o.x, *_weight(name, o.w), o.bias) for o in operands]
    fast = torch.compile(_linear(name), dynamic=False)
    return lambda i: lambda: fast(*given[i])


def _scaled_mm(operands: Sequence[Any]) -> Callable[[int], Callable[[], Any]]:
    given = quantized_operands("fp8", operands)
    return lambda i: lambda: viditq_scaled_mm_linear(*given[i], out_dtype=torch.bfloat16)
