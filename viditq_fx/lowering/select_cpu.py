"""Choose what computes an integer linear on a CPU, and spell it in ops that Inductor fuses round.

    linear(xq, s_x, wq, s_w, b) -> linear_epilogue(matmul(xq, wq), s_x, s_w, b)

matmul is exact in every choice, fastest first:
onednn-u8, onednn-u7   with VNNI or AMX
avx2-s8, avx512-u7 ..  our kernel, without them (8-bit and 7-bit inputs); needs a C++ compiler
onednn-u7              7-bit inputs where neither is: pairs of products stay below 2^15
fp32-exact             an fp32 GEMM of the integers (sliced where it could round)

4-bit weights, which stay 4 bits wide in memory:
avx512-vnni-s8s4, avx512-s8s4, avx2-s8s4   our kernel, which reads them as they are stored
fp32-exact-s8s4                            an fp32 GEMM of the integers, widened a few channels at a time
Both add "-blocks" to their name where the input has a scale for each block of K: sums of blocks are exact, and are
scaled and added in fp32. 4-bit inputs are multiplied as the int8 that they were before they were packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from viditq_fx import ops
from viditq_fx.cpu_kernels.int4_gemm import kernel_name as int4_name
from viditq_fx.cpu_kernels.int8_gemm import kernel_name
from viditq_fx.graph_edit import call, example
from viditq_fx.ops.int4 import int4_unavailable
from viditq_fx.ops.native import native_unavailable
from viditq_fx.ops.onednn import ZERO_POINTS, onednn_is_exact

_BLOCKS = {ops.LINEAR_W4A8_BLOCK.overload: 8, ops.LINEAR_W4A4.overload: 4}
"""Linears whose input has a scale for each block of K -> bits of their input."""
_NIBBLES = {ops.LINEAR_W4A8.overload: 8, **_BLOCKS}
"""Linears whose weight is packed two to a byte."""
_INPUT_BITS = {ops.LINEAR_W8A8.overload: 8, ops.LINEAR_W8A7.overload: 7, **_NIBBLES}


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """What computes a site, and why the faster choice was not taken."""

    kernel: str
    reason: str | None = None


def choose_cpu_kernel(bits: int, nibbles: bool = False, blocks: bool = False) -> KernelChoice:
    """The kernel for inputs of `bits` on this CPU; tries oneDNN, and builds ours, once in a process.

    `nibbles`: for weights that are packed two to a byte. `blocks`: the input has a scale for each block of K (then
    weights are packed).
    """
    if nibbles:
        missing, suffix = int4_unavailable(), "-blocks" if blocks else ""
        return KernelChoice(kernel=("fp32-exact-s8s4" if missing else int4_name()) + suffix, reason=missing)
    if onednn_is_exact(8):  # 32-bit accumulation, in hardware
        return KernelChoice(kernel=f"onednn-u{bits}")
    missing = native_unavailable()
    if missing is None:
        return KernelChoice(kernel=kernel_name(bits))
    if onednn_is_exact(bits):
        return KernelChoice(kernel=f"onednn-u{bits}", reason=missing)
    hint = "; scheme 'w8a7' is exact in oneDNN" if bits == 8 and onednn_is_exact(7) else ""
    reason = f"oneDNN's int8 saturates or is absent on this CPU (no VNNI or AMX), and {missing}{hint}"
    return KernelChoice(kernel="fp32-exact", reason=reason)


def integer_linears(gm: fx.GraphModule) -> list[fx.Node]:
    """Integer linears of the dialect that are still whole in a graph."""
    return [node for node in gm.graph.nodes if node.target in _INPUT_BITS]


def quantized_linears(gm: fx.GraphModule) -> list[fx.Node]:
    """Linears of the dialect, of any scheme, that are still whole in a graph."""
    targets = {op.overload for op in ops.LINEARS}
    return [node for node in gm.graph.nodes if node.target in targets]


def select_cpu_kernels(gm: fx.GraphModule) -> dict[str, KernelChoice]:
    """Rewrite every integer linear on a CPU; returns the choice by the linear's node name."""
    choices: dict[str, KernelChoice] = {}
    for node in integer_linears(gm):
        if example(node).device.type != "cpu":
            continue
        bits, nibbles = _INPUT_BITS[node.target], node.target in _NIBBLES
        choice = choices[node.name] = choose_cpu_kernel(bits, nibbles, node.target in _BLOCKS)
        with gm.graph.inserting_before(node):
            y = _spell_int4(gm.graph, node) if nibbles else _spell(gm.graph, node, choice.kernel, bits)
        node.replace_all_uses_with(y)
        packed = node.args[0]
        gm.graph.erase_node(node)
        if isinstance(packed, fx.Node) and packed.target is ops.PACK_INT4.overload and not packed.users:
            gm.graph.erase_node(packed)
    gm.recompile()
    return choices


def _spell_int4(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A linear with packed weights as ops that compute it; matmul_s8s4 finds its kernel by itself."""
    x, x_scale, w, w_scale, bias, dtype, *depth = node.args
    blocks = node.target in _BLOCKS
    if depth:  # packed too: here the int8 integers that it was packed from are multiplied
        pack = isinstance(x, fx.Node) and x.target is ops.PACK_INT4.overload
        x = x.args[0] if pack else call(graph, ops.UNPACK_INT4.overload, (x, *depth), node)  # type: ignore[union-attr]
    grouped = isinstance(w_scale, fx.Node) and example(w_scale).dim() == 2
    scales = (w_scale if grouped else None, *((x_scale,) if blocks else ()))
    acc = call(graph, ops.MATMUL_S8S4.overload, (x, w, *scales), node)
    operands = (acc, None if blocks else x_scale, None if grouped else w_scale, bias, dtype)
    return call(graph, ops.LINEAR_EPILOGUE.overload, operands, node)


def _spell(graph: fx.Graph, node: fx.Node, kernel: str, bits: int) -> fx.Node:
    """An integer linear as ops that compute it by that kernel."""
    x, x_scale, w, w_scale, bias, dtype = node.args
    if kernel == "fp32-exact":
        widened = call(graph, torch.ops.aten.to.dtype, (x, torch.float32), node)
        acc = call(graph, ops.MATMUL_F32S8.overload, (widened, w), node)
    elif kernel.startswith("onednn"):
        shifted = call(graph, ops.SHIFT_TO_U8.overload, (x, ZERO_POINTS[bits]), node)
        acc = call(graph, ops.MATMUL_U8S8.overload, (shifted, w, ZERO_POINTS[bits]), node)
    elif dtype == torch.float32:  # with its epilogue: a pass over the sums less
        return call(graph, ops.LINEAR_S8S8.overload, (x, x_scale, w, w_scale, bias, bits), node)
    else:  # Inductor's epilogue casts in the same pass
        acc = call(graph, ops.MATMUL_S8S8.overload, (x, w, bits), node)
    return call(graph, ops.LINEAR_EPILOGUE.overload, (acc, x_scale, w_scale, bias, dtype), node)
