"""Every kernel that could be chosen for a linear, timed, and the file of the fastest. Used by `benchmarks/gpu.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from gpu_checks import Shape, problem
from gpu_schemes import SCHEMES, quantized_operands
from gpu_variants import VARIANTS, split_linear
from torch import Tensor

from viditq_fx.lowering.extern_linear import (
    viditq_int_mm_linear,
    viditq_scaled_mm_linear,
    why_no_scaled_mm,
)
from viditq_fx.lowering.linear import EXTERN, kernel_label
from viditq_fx.lowering.tuned_configs import FORMAT, ShapeClass, op_class
from viditq_fx.ops.base import QuantOp
from viditq_fx.ops.fp8 import LINEAR_W8A8_FP8
from viditq_fx.ops.linear import LINEAR_W8A8
from viditq_fx.triton_templates import linear_w8a8
from viditq_fx.triton_templates.base import KernelTemplate, LinearProblem

PREFIX = "tune "
"""How the names of these methods begin: "tune <op> <kernel>"."""
W8A8 = "w8a8"
_Maker = Callable[[], Callable[[int], Callable[[], Any]]]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One kernel that could be chosen."""

    op: str
    """Of its class of shapes."""
    kernel: str
    """Its name in reports."""
    call: Callable[..., Tensor]
    """Computes the op from its operands but the dtype, which is bf16."""


def candidates(
    scheme: str, shape: LinearProblem, variants: Sequence[str] = tuple(VARIANTS)
) -> list[Candidate]:
    """What could be chosen for a scheme's linear of this shape, of w8a8 with these variants; cuBLAS last."""
    if scheme == W8A8:
        found = [
            *_launched(linear_w8a8.TEMPLATE, linear_w8a8.launch, shape),
            *(
                c
                for name in variants
                for c in _launched(VARIANTS[name].template, VARIANTS[name].launch, shape)
            ),
        ]
        return [*found, _extern(LINEAR_W8A8, EXTERN, viditq_int_mm_linear)]
    kernel = SCHEMES[scheme]
    given = replace(shape, group=kernel.group)
    found = _launched(kernel.template, kernel.launch, given, (shape.depth,) if kernel.packed else ())
    if scheme == "fp8" and why_no_scaled_mm(given, torch.bfloat16) is None:
        found.append(_extern(LINEAR_W8A8_FP8, "extern:scaled_mm", viditq_scaled_mm_linear))
    return found


def _launched(
    template: KernelTemplate, launch: Callable[..., Tensor], given: LinearProblem, depth: tuple[int, ...] = ()
) -> list[Candidate]:
    op = op_class(template.ops[0].name, given)
    return [
        Candidate(
            op=op,
            kernel=kernel_label(template, config),
            call=split_linear(config)
            if template.partial_sums
            else lambda *args, config=config: launch(*args, torch.bfloat16, *depth, config=config),
        )
        for config in (() if template.supports(given) else template.candidates(given))
    ]


def _extern(op: QuantOp, name: str, extern: Callable[..., Tensor]) -> Candidate:
    return Candidate(op=op.name, kernel=name, call=lambda *args: extern(*args, out_dtype=torch.bfloat16))


def tuned_methods(
    shape: Shape, operands: Sequence[Any], schemes: Sequence[str], variants: Sequence[str]
) -> dict[str, _Maker]:
    """Name -> maker of (copy -> call), as `methods` of gpu.py: the GEMM alone, its operands quantized."""
    found: dict[str, _Maker] = {}
    for scheme in (W8A8, *schemes):
        made: list[Any] = []

        def operands_of(scheme: str = scheme, made: list[Any] = made) -> list[Any]:
            if not made and scheme == W8A8:
                made.extend((o.x_q, o.x_scale, o.w_q, o.w_scale, o.bias) for o in operands)
            elif not made:
                made.extend(quantized_operands(scheme, operands))
            return made

        for c in candidates(scheme, problem(shape), variants):
            found[f"{PREFIX}{c.op} {c.kernel}"] = lambda c=c, given=operands_of: _maker(c, given())
    return found


def _maker(candidate: Candidate, given: Sequence[tuple[Tensor, ...]]) -> Callable[[int], Callable[[], Any]]:
    return lambda i: lambda: candidate.call(*given[i])


def tuned_file(record: Mapping[str, Any]) -> dict[str, Any]:
    """A result file's record -> the file of tuned kernels, as viditq_fx/lowering/tuned/README.md describes it.

    Shapes of one class vote by their summed time; a kernel that failed at one of them is out.
    Raises ValueError where no kernel was timed.
    """
    where = record["environment"]
    sums: dict[ShapeClass, list[dict[str, float]]] = defaultdict(list)
    for entry in record["shapes"]:
        by_op: dict[str, dict[str, float]] = defaultdict(dict)
        for name, times in entry.get("times", {}).items():
            if name.startswith(PREFIX):
                op, _, kernel = name.removeprefix(PREFIX).partition(" ")
                by_op[op][kernel] = times["p50"]
        for op, times in by_op.items():
            sums[_class(op, entry, where["capability"])].append(times)
    if not sums:
        raise ValueError("no kernel was timed to be chosen: run benchmarks/gpu.py with --write-tuned")
    linears = []
    for shape, votes in sums.items():
        shared = set.intersection(*map(set, votes))
        if shared:
            best = min(sorted(shared), key=lambda kernel: sum(times[kernel] for times in votes))
            mean = sum(times[best] for times in votes) / len(votes)
            linears.append({**asdict(shape), "kernel": best, "us": round(mean, 1)})
    named = {key: where.get(key, "unknown") for key in ("device", "torch", "triton", "commit")}
    return {"format": FORMAT, "architecture": where["capability"], **named, "linears": linears}


def _class(op: str, entry: Mapping[str, Any], capability: str) -> ShapeClass:
    major, minor = divmod(int(capability.removeprefix("sm_")), 10)
    sizes = {"rows": entry["rows"], "width": entry["width"], "depth": entry["depth"]}
    return ShapeClass.of(
        op,
        LinearProblem(**sizes, out_dtype=torch.bfloat16, capability=(major, minor), processors=1),
    )
