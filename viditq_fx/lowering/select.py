"""Compile a quantized graph with Inductor, choosing a kernel for every integer linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from viditq_fx.lowering.select_cpu import KernelChoice, select_cpu_kernels


def compile_with_kernels(
    gm: fx.GraphModule, example_inputs: Sequence[Any], inductor: Callable[..., Any]
) -> tuple[Callable[..., Any], dict[str, KernelChoice]]:
    """(compiled graph, choice by node name of each integer linear). Rewrites `gm` in place."""
    choices = select_cpu_kernels(gm)
    return inductor(gm, example_inputs), choices
