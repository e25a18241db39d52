"""Compile a quantized graph with Inductor, choosing a kernel for every integer linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from viditq_fx.lowering.attention_cuda import select_attention_kernels
from viditq_fx.lowering.inductor_compat import cache_fingerprint, configured, wide_persistent_reductions
from viditq_fx.lowering.install import install
from viditq_fx.lowering.kernel_log import kernel_log
from viditq_fx.lowering.quantize_cuda import select_quantize_kernels
from viditq_fx.lowering.select_cpu import KernelChoice, quantized_linears, select_cpu_kernels
from viditq_fx.lowering.templates import serving
from viditq_fx.lowering.tuned_configs import own_digest
from viditq_fx.triton_templates.base import KernelTemplate

_PASS_OPTION = "post_grad_custom_pre_pass"


@dataclass(kw_only=True)
class Compiled:
    """A compiled graph and what computes its integer linears."""

    run: Callable[..., Any]
    by_node: dict[str, KernelChoice] = field(default_factory=dict)
    """Choices made on the graph itself, by the linear's node name."""
    by_fqn: dict[str, KernelChoice] = field(default_factory=dict)
    """Choices that Inductor's lowering made, by module path."""

    def choice(self, node: str, fqn: str) -> KernelChoice:
        """What computes the linear of this node at this module path."""
        cached = KernelChoice(kernel="not recorded", reason="compiled code came from Inductor's cache")
        return self.by_node.get(node) or self.by_fqn.get(fqn) or cached


def compile_with_kernels(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    inductor: Any,
    *,
    templates: Sequence[KernelTemplate] = (),
    foreign: tuple[str, ...] | None = (),
    quantize_kernels: str = "auto",
) -> Compiled:
    """Choose kernels and compile; rewrites `gm` in place.

    `inductor` is torch's own compiler object, which holds the user's Inductor options. `templates` are those from
    outside; `foreign` identifies all code from outside for cache keys, None keeps the result out of caches.
    `quantize_kernels` is the option of that name.
    """
    by_node = select_cpu_kernels(gm) | select_attention_kernels(gm)
    by_node |= select_quantize_kernels(gm, quantize_kernels)
    theirs = inductor.config.get(_PASS_OPTION, configured(_PASS_OPTION))
    inductor.config[_PASS_OPTION] = cache_fingerprint(
        theirs, _with_timings(foreign, inductor, example_inputs)
    )
    others = {op.overload: op for template in templates for op in template.ops}
    if not quantized_linears(gm) and not any(node.target in others for node in gm.graph.nodes):
        return Compiled(run=inductor(gm, example_inputs), by_node=by_node)
    install(others.values())
    with serving(templates), kernel_log() as log, wide_persistent_reductions():
        run = inductor(gm, example_inputs)
    choices = {r.fqn: KernelChoice(kernel=r.kernel, reason=r.reason) for r in log.values()}
    return Compiled(run=run, by_node=by_node, by_fqn=choices)


def _with_timings(
    foreign: tuple[str, ...] | None, inductor: Any, example_inputs: Sequence[Any]
) -> tuple[str, ...] | None:
    """`foreign` and what this machine timed, for graphs on CUDA: it chooses kernels, and stands in no graph.

    Under autotuning it does not count: code in the cache holds the winners already, and each adds to the file.
    """
    on_cuda = any(isinstance(value, Tensor) and value.is_cuda for value in example_inputs)
    tuning = any(
        inductor.config.get(name, configured(name)) for name in ("max_autotune", "max_autotune_gemm")
    )
    timed = own_digest() if on_cuda and not tuning else ""
    return (*foreign, timed) if foreign is not None and timed else foreign
