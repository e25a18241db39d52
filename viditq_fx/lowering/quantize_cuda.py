"""Give the quantization of rows on CUDA its kernels: ops that a compiler sees as one Triton launch each.

    rotate_quantize           ours by default: Inductor would launch a GEMM and read its fp32 result twice
    norm_modulate_quantize,   Inductor's by default: it makes one kernel of the chain, and fuses what stands in
    activation_quantize       front of it too; ours by options={"quantize_kernels": "triton"}

A plain `quantize_per_token` stays Inductor's in every mode: what is in front of it is not known to be a whole chain,
and an opaque op behind half of one costs a write and a read of the row.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from viditq_fx import ops
from viditq_fx.graph_edit import example
from viditq_fx.lowering.inductor_compat import has_triton
from viditq_fx.lowering.select_cpu import KernelChoice
from viditq_fx.triton_templates.base import architecture

_LOG = logging.getLogger("viditq_fx.lowering")
INDUCTOR = "inductor"


def why_no_kernel(device: torch.device) -> str | None:
    """Why this device has none of our kernels that quantize rows, or None."""
    if device.type != "cuda" or torch.version.hip:
        return f"no kernel of ours that quantizes rows on {device.type}"
    if not has_triton():
        return "quantizing rows on CUDA in a kernel of ours needs Triton, which is not installed"
    if architecture(torch.cuda.get_device_capability(device)) is None:
        return "the kernels that quantize rows need sm_80 or later"
    return None


@dataclass(frozen=True, kw_only=True)
class RowKernel:
    """A kernel of ours for one op of the dialect."""

    op: ops.QuantOp
    default: bool
    """Taken under "auto"."""
    launch: Callable[..., Any]
    """Has the op's signature and launches the kernel in a way that a compiler traces."""
    why_not: Callable[..., str | None]
    """(K, *the op's other arguments) -> why the kernel does not compute it, or None."""


def select_quantize_kernels(gm: fx.GraphModule, mode: str) -> dict[str, KernelChoice]:
    """Rewrite the quantizations of rows on CUDA; returns the choice by node name.

    `mode`: "auto" (the rotation), "triton" (all of them) or "inductor" (none): `CompileOptions.quantize_kernels`.
    """
    choices: dict[str, KernelChoice] = {}
    by_op = {kernel.op.overload: kernel for kernel in KERNELS}
    for node in gm.graph.nodes:
        kernel = by_op.get(node.target)
        if kernel is None:
            continue
        reason = _declined(kernel, node, mode)
        if reason is None:
            node.target = traced_op(kernel.op.name)
        name = INDUCTOR if reason else f"triton:{kernel.op.name}"
        choices[node.name] = KernelChoice(kernel=name, reason=reason)
        _LOG.debug("%s: %s%s", node.name, name, f" ({reason})" if reason else "")
    if any(choice.reason is None for choice in choices.values()):
        gm.recompile()
    return choices


def _declined(kernel: RowKernel, node: fx.Node, mode: str) -> str | None:
    source, *options = node.args
    assert isinstance(source, fx.Node)
    x = example(source)
    if missing := why_no_kernel(x.device):
        return missing
    if mode == "inductor" or (mode == "auto" and not kernel.default):
        return f"quantize_kernels={mode!r}"
    width = x.shape[-1]
    if isinstance(width, torch.SymInt):
        width = width.node.maybe_as_int()  # a weight has fixed it since it was traced
    if width is None:
        return "the number of channels differs from call to call"
    return kernel.why_not(width, *options)


@functools.cache
def traced_op(name: str) -> Any:
    """`viditq::<name>_cuda` for the op `name` of KERNELS, defined at its first use: it needs Triton."""
    from torch.library import triton_op

    (kernel,) = (kernel for kernel in KERNELS if kernel.op.name == name)
    triton_op(f"viditq::{name}_cuda", kernel.launch, mutates_args=())
    return getattr(torch.ops.viditq, f"{name}_cuda").default


def _rotate(x: Tensor, multiplier: Tensor | None, block: int, bits: int, group: int) -> tuple[Tensor, Tensor]:
    from torch.library import wrap_triton

    from viditq_fx.triton_templates.rotate_quantize import launch

    return launch(x, multiplier, block, bits, group, run=wrap_triton)


def _norm(
    x: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    offset: float,
    shift: Tensor | None,
    bits: int,
) -> tuple[Tensor, Tensor]:
    from torch.library import wrap_triton

    from viditq_fx.triton_templates.quantize_rows import launch_norm

    return launch_norm(x, norm, weight, bias, eps, scale, offset, shift, bits, run=wrap_triton)


def _activation(x: Tensor, kind: str, gate: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    from torch.library import wrap_triton

    from viditq_fx.triton_templates.quantize_rows import launch_activation

    return launch_activation(x, kind, gate, bits, run=wrap_triton)


def _no_rotation(width: int, multiplier: Any, block: int, bits: int, group: int) -> str | None:
    from viditq_fx.triton_templates.rotate_quantize import why_not

    return why_not(width, block, group)


def _too_wide(width: int, *_: Any) -> str | None:
    from viditq_fx.triton_templates.quantize_rows import why_not

    return why_not(width)


KERNELS = (
    RowKernel(op=ops.ROTATE_QUANTIZE, default=True, launch=_rotate, why_not=_no_rotation),
    RowKernel(op=ops.NORM_MODULATE_QUANTIZE, default=False, launch=_norm, why_not=_too_wide),
    RowKernel(op=ops.ACTIVATION_QUANTIZE, default=False, launch=_activation, why_not=_too_wide),
)
