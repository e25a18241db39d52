"""Assemble every kernel for every architecture and print what the assembler says: `make assemble`.

    python -m nogpu.table [--only attention] [--arch 90]

One row for each kernel, architecture and config: registers of a thread, shared memory of a block, spills, and the
matrix instructions of the machine code. A row ends with what is wrong with it, in capitals, and the last line counts
such rows: a config spills, runs without a matrix instruction (but for norm and activation, which multiply none), needs
more shared memory than a block has, or loads less than 16 bytes a thread where it quantizes rows or attends in 8 bits.
Exits 1 if there is any.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton.language as tl
from nogpu.assemble import Assembly, assemble
from nogpu.fake_cuda import missing

from viditq_fx.ops.rotate import rotation_block
from viditq_fx.triton_templates import (
    attention_int8,
    attention_tiles,
    linear_fp8,
    linear_w4_block,
    linear_w4a8,
    linear_w8a8,
    linear_w8a8_persistent,
    linear_w8a8_split_k,
    linear_w8a8_tma,
    quantize_rows,
    rotate_quantize,
)
from viditq_fx.triton_templates.base import SHARED_BYTES, KernelTemplate

GEMMS = (
    (linear_w8a8.TEMPLATE, linear_w8a8.linear_w8a8_kernel, "*i8", "*i8"),
    (linear_w8a8_split_k.TEMPLATE, linear_w8a8_split_k.linear_w8a8_split_k_kernel, "*i8", "*i8"),
    (linear_w8a8_persistent.TEMPLATE, linear_w8a8_persistent.linear_w8a8_persistent_kernel, "*i8", "*i8"),
    (linear_w8a8_tma.TEMPLATE, linear_w8a8_tma.linear_w8a8_tma_kernel, "*i8", "*i8"),
    *((t, linear_w4a8.linear_w4a8_kernel, "*i8", "*u8") for t in linear_w4a8.TEMPLATES),
    *(
        (t, linear_w4_block.linear_w4_block_kernel, "*u8" if t.depth_of == "argument" else "*i8", "*u8")
        for t in linear_w4_block.TEMPLATES
    ),
    (linear_fp8.TEMPLATE, linear_fp8.linear_w8a8_fp8_kernel, "*fp8e4nv", "*fp8e4nv"),
)
"""(template, kernel, type of x, type of w)."""
STRIDES = [
    f"{t}_stride_{d}"
    for t, dims in (("v", ("b", "h", "row")), ("mask", "bhqk"), ("out", "bhl"))
    for d in dims
]
ATTENTION_SIGNATURE = {
    **{"q_ptr": "*i8", "q_scale_ptr": "*fp32", "k_ptr": "*i8", "k_scale_ptr": "*fp32"},
    **dict.fromkeys(("v_scale_ptr", "v_mean_ptr", "token_ptr"), "*fp32"),
    **{"v_ptr": "*bf16", "mask_ptr": "*i1", "out_ptr": "*bf16", "lse_ptr": "*fp32", "scale": "fp32"},
    **dict.fromkeys(("HEADS", "GROUP", "LQ", "LK", *STRIDES), "i32"),
}
ROWS = {"x_ptr": "*bf16", "q_ptr": "*i8", "s_ptr": "*fp32", "M": "i32", "x_stride_m": "i32"}
MODULATIONS = [f"{t}_stride_{d}" for t in ("scale", "shift") for d in "bl"]
NORM_SIGNATURE = {
    **ROWS,
    **dict.fromkeys(("weight_ptr", "bias_ptr", "scale_ptr", "shift_ptr"), "*bf16"),
    "multiplier_ptr": "*fp32",
    **dict.fromkeys(("L", *MODULATIONS), "i32"),
}
ROW_WIDTHS = (1152, 3072, 5120, 12288)
"""PixArt; FLUX; Wan 14B; FLUX's feed-forward."""
HEAD_WIDTHS = (64, 128, 256)
"""The widest head of each class in `attention_tiles.CONFIGS`."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel with one config on one architecture."""

    kernel: str
    arch: int
    label: str
    run: Callable[[], Assembly]


def linear(
    gemm: tuple[KernelTemplate, Any, str, str],
    arch: int,
    config: Any,
    width: int = 1152,
    depth: int | None = None,
) -> Assembly:
    """A GEMM with a bias, M dynamic."""
    template, kernel, x, w = gemm
    signature = {"x_ptr": x, "w_ptr": w, "bias_ptr": "*bf16", "M": "i32"}
    signature |= {"x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32"}
    signature |= {"y_ptr": "*i32" if template.partial_sums else "*bf16"}
    depth = depth or (3072 if config.block_k == 128 else 1152)
    fixed = template.constants(config, None, width, depth)
    fixed |= {"N": width, "K": depth, "HAS_BIAS": True, "INDEX_DTYPE": tl.int32, "PROGRAMS": 132}
    signature, fixed = ({n: v for n, v in d.items() if n in kernel.arg_names} for d in (signature, fixed))
    return assemble(kernel, signature, fixed, arch, warps=config.num_warps, stages=config.num_stages)


def attention(
    arch: int,
    config: Any,
    head: int,
    *,
    values: str = "16 bits",
    masked: bool = False,
    causal: bool = False,
    lse: bool = False,
) -> Assembly:
    """The int8 attention, both lengths dynamic; keys of 8-bit values are padded to multiples of 16."""
    mask = torch.ones(1, dtype=torch.bool) if masked else None
    fixed = attention_int8.constants(config, head, head, mask, causal, values) | {"HAS_LSE": lse}
    options: dict[str, Any] = {"warps": config.num_warps, "stages": config.num_stages}
    kind = {"16 bits": "*bf16", "fp8": "*fp8e4nv", "int8": "*i8"}[values]
    if values != "16 bits":
        options["multiples"] = ("v_stride_row",)
    signature = ATTENTION_SIGNATURE | {"v_ptr": kind}
    return assemble(attention_int8.attention_int8_kernel, signature, fixed, arch, **options)


def norm(arch: int, width: int, *, affine: bool = False, multiplier: bool = False) -> Assembly:
    """LayerNorm, scale and shift, quantize; L and M dynamic."""
    config = quantize_rows.config_for(width, arch)
    fixed = {"K": width, "QMAX": 127, "RMS": False, "HAS_WEIGHT": affine, "HAS_BIAS": affine}
    fixed |= {"HAS_SCALE": True, "HAS_SHIFT": True, "HAS_MULTIPLIER": multiplier}
    fixed |= {"EPS_NORM": 1e-6, "OFFSET": 1.0, "BLOCK_M": config.block_m, "BLOCK_K": config.block_k}
    options = {"warps": config.num_warps, "stages": 1, "multiples": ("x_stride_m", *MODULATIONS)}
    return assemble(quantize_rows.norm_modulate_quantize_kernel, NORM_SIGNATURE, fixed, arch, **options)


def activation(arch: int, width: int, kind: str, *, gate: bool = False) -> Assembly:
    """An activation and quantize."""
    config = quantize_rows.config_for(width, arch)
    fixed = {"K": width, "QMAX": 127, "KIND": kind, "HAS_GATE": gate}
    fixed |= {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k}
    options = {"warps": config.num_warps, "stages": 1, "multiples": ("x_stride_m", "gate_stride_m")}
    signature = {**ROWS, "gate_ptr": "*bf16", "gate_stride_m": "i32"}
    return assemble(quantize_rows.activation_quantize_kernel, signature, fixed, arch, **options)


def rotation(arch: int, width: int, *, multiplier: bool = False, group: int = 0) -> Assembly:
    """Rotate and quantize, in the widest block."""
    config = rotate_quantize.config_for(width)
    fixed = rotate_quantize.constants(config, width, multiplier, rotation_block(width), 8, group)
    options = {"warps": config.num_warps, "stages": 1, "multiples": ("x_stride_m",)}
    signature = {**ROWS, "multiplier_ptr": "*fp32"}
    return assemble(rotate_quantize.rotate_quantize_kernel, signature, fixed, arch, **options)


def row_cases() -> Iterator[Case]:
    """The kernels that quantize rows, at the widths of models."""
    for arch in SHARED_BYTES:
        for width in ROW_WIDTHS:
            for name, runs in {
                "norm_quantize": {"": partial(norm, arch, width)},
                "act_quantize": {
                    "gelu_tanh": partial(activation, arch, width, "gelu_tanh"),
                    "silu, gate": partial(activation, arch, width, "silu", gate=True),
                },
                "rotate_quantize": {
                    "": partial(rotation, arch, width),
                    "multiplier": partial(rotation, arch, width, multiplier=True),
                    "multiplier, g128": partial(rotation, arch, width, multiplier=True, group=128),
                },
            }.items():
                for label, run in runs.items():
                    yield Case(kernel=name, arch=arch, label=f"K={width} {label}", run=run)


def attention_cases() -> Iterator[Case]:
    """The attention kernel with P V in each of its three forms."""
    tables = {(arch, masked, "16 bits"): tiles for (arch, masked), tiles in attention_tiles.CONFIGS.items()}
    for (arch, masked, values), by_width in (tables | attention_tiles.EIGHT_BIT_CONFIGS).items():
        if values != "16 bits" and attention_tiles.why_no_eight_bit_values(divmod(arch, 10)):
            continue
        for head, config in zip(HEAD_WIDTHS, by_width, strict=True):
            kind = f"head {head}{', mask' if masked else ''}"
            label = f"{kind} {config} s{config.num_stages} w{config.num_warps}"
            run = partial(attention, arch, config, head, masked=masked, values=values)
            name = "attention_int8" + ("" if values == "16 bits" else f"_{values}")
            yield Case(kernel=name, arch=arch, label=label, run=run)


def cases() -> Iterator[Case]:
    """Every config that the lowering may choose."""
    yield from row_cases()
    for gemm in GEMMS:
        for arch, shape, configs in gemm[0].configs:
            for config in configs:
                label = f"{shape} {config} s{config.num_stages} w{config.num_warps}"
                run = partial(linear, gemm, arch, config)
                yield Case(kernel=gemm[0].name, arch=arch, label=label, run=run)
    yield from attention_cases()


def main() -> int:
    """0: every kernel assembles as it should."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--arch", type=int, help="80, 89, 90 or 100")
    options = parser.parse_args()
    if reason := missing():
        print(f"nothing can be assembled here: {reason}", file=sys.stderr)
        return 2
    row = "{:22} {:>6} {:38} {:>9} {:>10} {:>7}  {}"
    print(row.format("kernel", "arch", "config", "registers", "shared KiB", "spills", "matrix instructions"))
    rows = bad = 0
    for case in cases():
        if options.only not in case.kernel or options.arch not in (None, case.arch):
            continue
        found = case.run()
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(found.sass_mma.items()))
        size = f"{found.shared_bytes / 1024:.0f}"
        problems = faults(case, found)
        kinds = "  ".join(filter(None, [kinds, *problems]))
        cells = (case.kernel, f"sm_{case.arch}", case.label, found.registers, size, found.spills, kinds)
        print(row.format(*cells), flush=True)
        rows, bad = rows + 1, bad + bool(problems)
    print(f"{rows} rows, {bad} with something wrong")
    return 1 if bad else 0


def faults(case: Case, found: Assembly) -> list[str]:
    """What is wrong with an assembled kernel; empty for one that is as it should be."""
    multiplies_nothing = case.kernel in ("norm_quantize", "act_quantize")
    wrong = {
        "SPILLS": found.spills or found.local_bytes,
        "NO MATRIX INSTRUCTION": not (found.sass_mma or multiplies_nothing),
        "TOO MUCH SHARED MEMORY": found.shared_bytes > SHARED_BYTES[case.arch],
        "NARROW LOADS": case.kernel.endswith(("_quantize", "int8_fp8", "int8_int8")) and not found.wide_loads,
    }
    return [name for name, is_so in wrong.items() if is_so]


if __name__ == "__main__":
    sys.exit(main())
