"""Every use of Inductor's private API, behind small functions that hide how torch 2.11 to 2.13 differ.

No other file names `torch._inductor` (ruff TID251). This one imports Inductor inside its functions:
importing it is cheap and works where neither a GPU nor Triton is installed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from viditq_fx.site import fqn_of_source

# ------------------------------------------------------------------ kernel templates and lowerings

Box = Any
"""A `torch._inductor.ir.TensorBox`: a tensor of the graph that is being lowered."""
Choice = Any
"""A `torch._inductor.ir.ChoiceCaller`: one way to compute a node."""


def has_triton() -> bool:
    """Whether Triton can be imported; says nothing about a device."""
    return importlib.util.find_spec("triton") is not None


def register_lowering(overload: Any, lower: Callable[..., Any]) -> None:
    """Have Inductor call `lower(*args)` for each call of `overload`; the last registration holds."""
    from torch._inductor.lowering import register_lowering as register

    register(overload, type_promotion_kind=None)(lower)


def call_eager(overload: Any, *args: Any) -> Any:
    """The node that calls `overload`'s eager implementation: what an op without a lowering gets."""
    from torch._inductor.lowering import fallback_handler

    return fallback_handler(overload, add_to_fallback_set=False)(*args)


def zero_tensor(size: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Box:
    """A node that makes a tensor of zeros (or an empty one)."""
    from torch._inductor.lowering import lowerings

    return lowerings[torch.ops.aten.full.default](list(size), 0, dtype=dtype, device=device)


@dataclass(frozen=True, kw_only=True)
class LoweredNode:
    """The FX node that is being lowered."""

    name: str
    fqn: str
    """Path of the innermost module that it came from, relative to the compiled one, as a Site has it."""


def current_node() -> LoweredNode:
    """The FX node whose lowering is running."""
    from torch._inductor.virtualized import V

    node = V.graph.current_node
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return LoweredNode(name=node.name, fqn=fqn_of_source(stack[-1][0]) if stack else "")


def static_int(size: Any) -> int | None:
    """A size that is the same in every call, else None."""
    import sympy

    return int(size) if isinstance(size, int | sympy.Integer) else None


def size_hint(size: Any) -> int:
    """The size seen at compile time, for choices that affect speed only."""
    from torch._inductor.virtualized import V

    return int(V.graph.sizevars.optimization_hint(size, fallback=4096))


def product(sizes: Sequence[Any]) -> Any:
    """Product of sizes, symbolic or not; 1 of none."""
    from torch._inductor.utils import sympy_product

    return sympy_product(sizes)


def contiguous(box: Box) -> Box:
    """`box` in memory, row-major and dense: a copy only where its layout is another."""
    from torch._inductor import ir

    return ir.ExternKernel.require_contiguous_strides(ir.ExternKernel.realize_input(box))


def why_no_descriptors(boxes: Sequence[Box], multiple: int) -> str | None:
    """Why a kernel cannot make tensor descriptors of `boxes`, which then begin at multiples of so many bytes; or None.

    A launch takes memory for descriptors from an allocator that Triton keeps in a context variable. Inductor sets it at
    every launch on torch 2.11; on 2.13 at a kernel's first alone, so that a call from another thread finds none.
    """
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._inductor.virtualized import V

    if "_cached_launcher" in CachingAutotuner.run.__code__.co_names:
        return f"torch {torch.__version__} gives descriptors memory only in the thread that launches a kernel first"
    for box in boxes:
        offset = box.get_layout().offset * box.get_dtype().itemsize
        known = V.graph.sizevars.statically_known_multiple_of(offset, multiple)
        if not known or box.get_name() in V.graph.unaligned_buffers:
            return f"a descriptor's memory begins at a multiple of {multiple} bytes; that of x or w may not"
    return None


def output_layout(box: Box, size: Sequence[Any], dtype: torch.dtype) -> Any:
    """Row-major layout of a result on `box`'s device."""
    from torch._inductor import ir

    return ir.FixedLayout(box.get_device(), dtype, list(size))


def triton_template(name: str, source: str) -> Any:
    """The `TritonTemplate` of that name; made at the first call.

    `source` is Inductor's template text. Its grid is one program a [BLOCK_M, BLOCK_N] tile of a
    [rows, columns] result; SPLIT of them with that constant, PROGRAMS at most with that one.
    Torch keeps templates by name, so one name means one source for good.
    """
    from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

    def programs(
        rows: Any, columns: Any, meta: dict[str, Any], *, cdiv: Callable[..., Any], min: Callable[..., Any]
    ) -> tuple[Any, ...]:
        tiles = cdiv(rows, meta["BLOCK_M"]) * cdiv(columns, meta["BLOCK_N"]) * meta.get("SPLIT", 1)
        return min(tiles, meta["PROGRAMS"]) if "PROGRAMS" in meta else tiles, 1, 1

    known = TritonTemplate.all_templates.get(name)
    return known or TritonTemplate(name=name, grid=SymbolicGridFn(programs), source=source)


def triton_choice(
    template: Any,
    inputs: Sequence[Box],
    layout: Any,
    *,
    rows: Any,
    columns: Any,
    num_stages: int,
    num_warps: int,
    constants: dict[str, Any],
    value: str = "tl.float32",
) -> Choice:
    """`template` with one config as a way to compute a node of `layout`; it stores a value of type `value`.

    That is fp32 wherever the kernel scales, whatever it accumulates in: torch 2.13 casts the stored value to
    ACC_TYPE before a fused epilogue, so int32 would truncate the dequantized value.
    """
    choices: list[Choice] = []
    error = template.maybe_append_choice(
        choices,
        input_nodes=tuple(inputs),
        layout=layout,
        call_sizes=[rows, columns],
        num_stages=num_stages,
        num_warps=num_warps,
        ACC_TYPE=value,
        **constants,
    )
    assert len(choices) == 1, f"template {template.name} made no choice: {error}"
    return choices[0]


def dequantized_sum(
    partial_sums: Box,
    x_scale: Box,
    w_scale: Box,
    bias: Box | None,
    *,
    parts: int,
    size: Sequence[Any],
    out_dtype: torch.dtype,
) -> Box:
    """int32 [parts, M, N] -> (sum of the parts) * s_x * s_w (+ bias) in fp32, cast to `out_dtype`: [*size], not stored.

    `size` is [..., N] with M the product of the rest; x_scale is [..., 1], w_scale and bias are [N]. Pointwise, the
    parts added one by one, so that Inductor fuses it into whatever reads it, reductions over rows too.
    """
    from torch._inductor import ir
    from torch._inductor.virtualized import ops

    load_part, load_s_x, load_s_w = (box.make_loader() for box in (partial_sums, x_scale, w_scale))
    load_bias = None if bias is None else bias.make_loader()

    def value(index: Sequence[Any]) -> Any:
        *rows, n = index
        m: Any = 0
        for length, i in zip(size[:-1], rows, strict=True):
            m = m * length + i
        total = load_part([0, m, n])
        for part in range(1, parts):
            total = ops.add(total, load_part([part, m, n]))
        y = ops.mul(ops.to_dtype(total, torch.float32, torch.int32), load_s_x([*rows, 0]))
        y = ops.mul(y, load_s_w([n]))
        if load_bias is not None:
            y = ops.add(y, ops.to_dtype(load_bias([n]), torch.float32))
        return ops.to_dtype(y, out_dtype, torch.float32)

    device = partial_sums.get_device()
    return ir.Pointwise.create(device=device, dtype=out_dtype, inner_fn=value, ranges=list(size))


def extern_choice(kernel: Callable[..., Any], inputs: Sequence[Box], layout: Any, **options: Any) -> Choice:
    """The Python function `kernel(*inputs, **options)` as a way to compute a node of `layout`."""
    from torch._inductor.select_algorithm import ExternKernelChoice, extern_kernels

    register_extern(kernel)
    choice = getattr(extern_kernels, _EXTERN_HANDLES)[kernel.__name__]
    assert isinstance(choice, ExternKernelChoice)
    return choice.bind(list(inputs), layout, **options)


_EXTERN_HANDLES = "_viditq_choices"


def register_extern(kernel: Callable[..., Any]) -> None:
    """Make `extern_kernels.<name>` exist, which generated code calls: also code from a cache.

    Torch 2.11 offers no look-up of what is registered, so the handles are kept beside the kernels.
    """
    from torch._inductor.select_algorithm import ExternKernelChoice, extern_kernels

    handles = extern_kernels.__dict__.setdefault(_EXTERN_HANDLES, {})
    if kernel.__name__ not in handles:
        handles[kernel.__name__] = ExternKernelChoice(kernel, has_out_variant=False)


def wants_autotuning() -> bool:
    """Whether the caller asked Inductor to time kernels and there is a device to time them on."""
    from torch._inductor import config

    return bool(config.max_autotune or config.max_autotune_gemm) and torch.cuda.is_available()


def select(name: str, choices: Sequence[Choice], inputs: Sequence[Box], layout: Any) -> tuple[Box, Choice]:
    """(node, what it was made from): the only choice as it stands, the fastest of several.

    The winner is settled here and not in the scheduler, so that it can be reported.
    """
    if len(choices) == 1:
        return choices[0].output_node(), choices[0]
    import inspect

    from torch._inductor.select_algorithm import AlgorithmSelectorCache, autotune_select_algorithm

    options: dict[str, Any] = {"return_multi_template": False}
    if "return_choice" in inspect.signature(AlgorithmSelectorCache.__call__).parameters:
        options["return_choice"] = True  # torch 2.11; later versions always return the pair
    result = autotune_select_algorithm(name, list(choices), list(inputs), layout, **options)
    return result if isinstance(result, tuple) else (result, None)


# ------------------------------------------------------------------------------- how graphs compile


def wide_persistent_reductions(limit: int = 16384) -> AbstractContextManager[None]:
    """Compile inside this, and rows of up to `limit` elements are reduced in one pass.

    Inductor's own limit is 1024: a LayerNorm + quantize over D = 1152 would read its input three
    times and keep an fp32 copy. Only reductions along the contiguous dimension are widened.
    """
    from torch._inductor import config
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    base = type(V.choices)

    class WidePersistentReductions(base):
        def uuid(self) -> str:  # torch 2.13 puts it in the cache key of a configured choices class
            return f"viditq-wide-persistent-{limit}-{base.__qualname__}"

        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if base.should_use_persistent_reduction(features, cooperative_reduction):
                return True
            if not config.triton.persistent_reductions:
                return False
            inner = features.get_reduction_hint() == ReductionHint.INNER
            fits = V.graph.sizevars.statically_known_leq(features.reduction_numel, limit)
            return bool(inner and fits and not cooperative_reduction)

    assert issubclass(base, InductorChoices)
    return V.set_choices_handler(WidePersistentReductions())


def configured(name: str) -> Any:
    """The value of an option in torch's global `torch._inductor.config`."""
    from torch._inductor import config

    return getattr(config, name)


def cache_fingerprint(inner: Any = None, foreign: tuple[str, ...] | None = ()) -> Any:
    """A custom pass that changes nothing and puts this package's sources into Inductor's cache keys.

    Our lowerings and templates are no part of a graph, so without it an edited template would be
    served from the cache; `foreign` does the same for plugins (see `plugins.identity`). `inner` is a pass
    that the user set in the same place; it still runs. Where one of them has no id, caching is off.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class CacheFingerprint(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            if inner is not None:
                inner(graph)

        def uuid(self) -> Any:
            if inner is None and not foreign:
                return None if foreign is None else source_digest()
            inner_id = inner.uuid() if isinstance(inner, CustomGraphPass) else None
            if foreign is None or (inner is not None and inner_id is None):
                return None
            return (source_digest(), *foreign, inner_id)

    return CacheFingerprint()


@functools.lru_cache(maxsize=1)
def source_digest() -> str:
    """SHA-256 over every Python file and tuned kernel of this package, and the vector instructions that torch uses.

    Inductor's own key has no such thing, and its C++ for 512-bit vectors computes wrong numbers when it is compiled
    for 256-bit ones (a cache that two machines share, ATEN_CPU_CAPABILITY).
    """
    digest = hashlib.sha256(torch.backends.cpu.get_cpu_capability().encode())
    package = Path(__file__).resolve().parents[1]
    for path in sorted([*package.rglob("*.py"), *package.glob("lowering/tuned/*.json")]):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
