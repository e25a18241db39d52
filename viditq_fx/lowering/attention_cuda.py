"""Give int8 attention on CUDA its kernel: `attention_int8` and its kin -> an op that a compiler sees through.

Quantizing queries and keys (and values, into columns) becomes plain aten, which Inductor fuses with the qk-norm and
RoPE in front, and the Triton kernel a node that Inductor calls.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx

from viditq_fx import ops
from viditq_fx.graph_edit import example
from viditq_fx.lowering.inductor_compat import has_triton
from viditq_fx.lowering.select_cpu import KernelChoice
from viditq_fx.report import SIMULATION
from viditq_fx.triton_templates.base import architecture

SIMULATED = f"{SIMULATION} int8 values, fp32 arithmetic"
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, bool is_causal, float? scale, bool enable_gqa, str values)"
    " -> Tensor"
)
VALUES = ((ops.ATTENTION_INT8, "16 bits"), (ops.ATTENTION_INT8_FP8, "fp8"), (ops.ATTENTION_INT8_INT8, "int8"))
"""(op, what its kernel multiplies P and V in)."""


def why_no_kernel(device: torch.device) -> str | None:
    """Why this device has no int8 attention kernel of ours, or None."""
    if device.type != "cuda" or torch.version.hip:
        return f"no int8 attention kernel of ours for {device.type}"
    if not has_triton():
        return "int8 attention on CUDA needs Triton, which is not installed"
    if architecture(torch.cuda.get_device_capability(device)) is None:
        return "int8 tensor cores through Triton need sm_80 or later"
    return None


def select_attention_kernels(gm: fx.GraphModule) -> dict[str, KernelChoice]:
    """Rewrite int8 attention on CUDA; returns the choice by node name. Without a kernel the reference computes."""
    choices: dict[str, KernelChoice] = {}
    known = {op.overload: (op.name, values) for op, values in VALUES}
    for node in gm.graph.nodes:
        if node.target not in known:
            continue
        name, values = known[node.target]
        missing = why_no_kernel(example(node).device)
        if missing is None:
            node.target = traced_op()
            choices[node.name] = KernelChoice(kernel=f"triton:{name} {_config(*node.args[:4], values)}")
            node.args = (*node.args, values)
        else:
            choices[node.name] = KernelChoice(kernel=SIMULATED, reason=missing)
    if choices:
        gm.recompile()
    return choices


@functools.lru_cache(maxsize=1)
def traced_op() -> Any:
    """`viditq::attention_int8_cuda`, defined at its first use: it needs Triton."""
    from torch.library import triton_op

    triton_op("viditq::attention_int8_cuda", _attention, mutates_args=(), schema=SCHEMA)
    return torch.ops.viditq.attention_int8_cuda.default


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    values: str,
) -> Tensor:
    from torch.library import wrap_triton

    from viditq_fx.triton_templates.attention_int8 import launch
    from viditq_fx.triton_templates.attention_tiles import config_for

    capability = torch.cuda.get_device_capability(q.device)
    config = config_for(capability, max(q.shape[-1], v.shape[-1]), attn_mask is not None, values)
    options = (attn_mask, is_causal, scale, enable_gqa)
    return launch(q, k, v, *options, config=config, values=values, run=wrap_triton)[0]


def _config(*operands: Any) -> Any:
    from viditq_fx.triton_templates.attention_tiles import config_for

    (q, v), (mask, values) = (example(operands[i]) for i in (0, 2)), operands[3:]
    capability = torch.cuda.get_device_capability(q.device)
    return config_for(capability, max(q.shape[-1], v.shape[-1]), mask is not None, values)
