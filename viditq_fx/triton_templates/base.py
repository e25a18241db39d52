"""KernelTemplate: a Triton kernel with the op it computes, its tile configs and what it declines.

A kernel is written once, as a plain `@triton.jit` function that ends in one `tl.store`. What
Inductor splices into its generated code is that function's own text: the lines between the
signature and the store (`body_of`), with Inductor's hooks in place of both ends, and behind it the
`@triton.jit` functions that it calls (`helpers_of`): generated code imports nothing of ours. So the kernel that
tests interpret and assemble and the kernel that a compiled model runs cannot drift apart.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from viditq_fx.ops.base import QuantOp

SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Largest shared memory of one block, by architecture (CUDA C++ Programming Guide, compute capabilities)."""

_TILES = Path(__file__).with_name("tiles.py")

DESCRIPTOR_ALIGNMENT = 16
"""Bytes at whose multiples a tensor descriptor's memory and each of its rows begin (CUDA driver API, tensor maps)."""


def architecture(capability: tuple[int, int]) -> int | None:
    """(major, minor) -> the architecture whose configs fit it: 80, 89, 90 or 100; None below sm_80.

    sm_86 and sm_12x have the 99 KiB of shared memory of sm_89, so they take its configs.
    """
    if capability < (8, 0):
        return None
    if capability in ((8, 0), (8, 7)):
        return 80
    return {8: 89, 9: 90, 10: 100}.get(capability[0], 89)


def generic_configs(capability: tuple[int, int]) -> str | None:
    """What to say of a device that takes another architecture's configs; None where it has its own."""
    arch = architecture(capability)
    if arch is None or divmod(arch, 10) == capability:
        return None
    return f"no tile configs for sm_{capability[0]}{capability[1]}: those of sm_{arch} serve"


@dataclass(frozen=True, kw_only=True)
class GemmConfig:
    """Tile of one program and how it is pipelined."""

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    group_m: int = 8
    """Tiles of M that are walked together, so that their rows of w stay in L2."""
    swap: bool = False
    """Compute the transpose, w x: w is then the operand that sm_90 takes from registers (4-bit weights only)."""
    rate: float = 1.0
    """Throughput of a full tile relative to the architecture's best one: an estimate until measured."""
    split_k: int = 1
    """Programs that share a tile, each with a part of K (only where the template writes `partial_sums`)."""

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return tile if self.split_k == 1 else f"{tile} split {self.split_k}"

    @property
    def shared_bytes(self) -> int:
        """Bytes of int8 operand tiles in flight."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k


@dataclass(frozen=True, kw_only=True)
class LinearProblem:
    """One integer linear [M, K] x [N, K] as far as it is known when the kernel is chosen."""

    rows: int
    """M, or its hint when it is dynamic."""
    width: int
    """N."""
    depth: int
    """K."""
    out_dtype: torch.dtype
    capability: tuple[int, int]
    """Compute capability of the device."""
    processors: int
    """Number of streaming multiprocessors."""
    group: int | None = None
    """Input channels that share a scale of the weight; None: all of them do, 0: a number not in scheme.GROUPS."""
    why_no_descriptors: str | None = None
    """Why x and w cannot be read through tensor descriptors here, or None; K is the template's to check."""


def shape_constants(config: GemmConfig, rows: int | None, width: int, depth: int) -> dict[str, Any]:
    """Compile-time constants of a GEMM kernel for one shape; `rows` is None when M is dynamic."""
    return {
        "EVEN_M": rows is not None and rows % config.block_m == 0,
        "EVEN_N": width % config.block_n == 0,
        "EVEN_K": depth % config.block_k == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }


@dataclass(frozen=True, kw_only=True)
class KernelTemplate:
    """A kernel, the ops whose meaning it has, and its configs by architecture and shape class."""

    name: str
    ops: tuple[QuantOp, ...]
    """Ops of the dialect that this kernel computes; their references are what it is tested against."""
    source_file: Path
    """The Python file in which the kernel stands."""
    kernel: str
    """Name of the `@triton.jit` function in it."""
    configs: tuple[tuple[int, str, tuple[GemmConfig, ...]], ...]
    """(architecture, shape class, configs), see `LinearProblem` and `shape_class`."""
    supports: Callable[[LinearProblem], str | None]
    """None when the kernel computes the problem, else the reason why not."""
    constants: Callable[[GemmConfig, int | None, int, int], dict[str, Any]] = shape_constants
    """(config, M or None, N, K) -> the kernel's compile-time constants."""
    depth_of: Literal["w", "x", "argument"] = "w"
    """The operand whose rows are K elements long: not w where it is packed more tightly, and none where both are: then
    K is an argument of the op, and `constants` holds it."""
    fits: Callable[[GemmConfig, LinearProblem], bool] = lambda config, problem: True
    """Whether a config serves a problem that `supports` accepts; one of each list has to serve every one."""
    partial_sums: bool = False
    """The kernel writes int32 sums [split_k, M, N] of x and w alone; adding and scaling them is left to Inductor."""
    persistent: bool = False
    """The grid is one program a processor (constant PROGRAMS), and the store stands in the loop over tiles."""
    cost: Callable[[GemmConfig, LinearProblem], float] = lambda config, problem: estimated_cost(
        config, problem
    )
    """Estimate that orders this template's configs, and our templates among each other where nothing is timed."""

    @cached_property
    def body(self) -> str:
        """The kernel's lines between its docstring and its store, indented by four spaces."""
        return body_of(self.source_file.read_text(encoding="utf-8"), self.kernel)

    @cached_property
    def helpers(self) -> str:
        """Text of the functions that the kernel calls: those of its own file and of tiles.py."""
        return helpers_of(
            (self.source_file.read_text(encoding="utf-8"), _TILES.read_text(encoding="utf-8")), self.kernel
        )

    @property
    def store_indent(self) -> int:
        """Spaces in front of the store that follows `body`: 4, or 8 in a loop."""
        return _parts(self.source_file.read_text(encoding="utf-8"), self.kernel)[1].col_offset

    def candidates(self, problem: LinearProblem) -> tuple[GemmConfig, ...]:
        """The configs of the problem's architecture and shape class, best estimate first.

        Raises AssertionError for a problem that `supports` declines.
        """
        arch, shape = architecture(problem.capability), shape_class(problem.rows, problem.width)
        listed = [(known, name) for known, name, _ in self.configs]
        if shape == "tall" and (arch, shape) not in listed:
            shape = "wide"
        found = [
            c
            for known, name, configs in self.configs
            for c in configs
            if (known, name) == (arch, shape) and self.fits(c, problem)
        ]
        assert found, f"{self.name} has no config for {(arch, shape)}"
        return tuple(sorted(found, key=lambda config: self.cost(config, problem)))


def why_no_int8(problem: LinearProblem) -> str | None:
    """None where integer tensor cores compute the problem through Triton, else the reason why not."""
    if architecture(problem.capability) is None:
        major, minor = problem.capability
        return f"int8 tensor cores through Triton need sm_80 or later; the device is sm_{major}{minor}"
    return why_no_gemm(problem)


def why_no_gemm(problem: LinearProblem) -> str | None:
    """What no kernel of ours computes, whatever its operands: the reason, or None."""
    if problem.out_dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the output must be fp32, fp16 or bf16; got {problem.out_dtype}"
    if problem.width == 0 or problem.depth == 0:
        return f"nothing to multiply: N={problem.width}, K={problem.depth}"
    return None


def shape_class(rows: int, width: int) -> str:
    """M, N -> "skinny" (up to 32 rows: conditioning vectors), "tall" (8 times as many rows as columns, of which there
    are 512 at most) or "wide" (tokens). A template without a list for "tall" takes the one for "wide".
    """
    if rows <= 32:
        return "skinny"
    return "tall" if width <= 512 and rows >= 8 * width else "wide"


def estimated_cost(config: GemmConfig, problem: LinearProblem) -> float:
    """Waves of tiles times the products of one tile for each k, over its rate: only the order matters."""
    tiles = -(-problem.rows // config.block_m) * -(-problem.width // config.block_n)
    waves = -(-tiles * config.split_k // problem.processors)
    share = slice_depth(config, problem.depth) / problem.depth
    return waves * config.block_m * config.block_n * share / config.rate


def slice_depth(config: GemmConfig, depth: int) -> int:
    """How much of K one program adds up: K itself, or with split_k whole tiles of it; the last ones may have less."""
    if config.split_k == 1:
        return depth
    tiles = -(-depth // config.block_k)
    return -(-tiles // config.split_k) * config.block_k


def body_of(text: str, function: str) -> str:
    """Python source -> the lines of `function` after its docstring and before its last statement, the store.

    The store may be the last statement of a loop that is the function's last. Raises AssertionError when the function
    is missing or does not end in one `tl.store(...)`.
    """
    docstring, store = _parts(text, function)
    lines = text.splitlines()[docstring.end_lineno : store.lineno - 1]
    body = textwrap.indent(textwrap.dedent("\n".join(lines)), "    ").rstrip() + "\n"
    assert not {"{{", "{%"} & {body[i : i + 2] for i in range(len(body))}, f"{function} holds jinja syntax"
    return body


def helpers_of(texts: Sequence[str], function: str) -> str:
    """Python sources, the kernel's own first -> the functions of them that `function` calls, and those that they call.

    Each name's first definition counts. They are `@triton.jit` functions, each whole: what else a file defines they
    cannot use. "" where there are none.
    """
    known: dict[str, str] = {}
    calls: dict[str, set[str]] = {}
    for text in texts:
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
                first = min(decorator.lineno for decorator in node.decorator_list)
                lines = text.splitlines()[first - 1 : node.end_lineno]
                if known.setdefault(node.name, "\n".join(lines)) == "\n".join(lines):
                    calls[node.name] = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    wanted: list[str] = [function]
    for name in wanted:  # grows on the way
        wanted += sorted(called for called in calls[name] if called in known and called not in wanted)
    return "\n\n\n".join(known[name] for name in wanted[1:])


def _parts(text: str, function: str) -> tuple[ast.stmt, ast.stmt]:
    """(docstring, store) of a kernel."""
    nodes = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == function]
    assert len(nodes) == 1, f"{function} is defined {len(nodes)} times"
    docstring, *_, store = nodes[0].body
    assert ast.get_docstring(nodes[0]), f"{function} must open with its formula"
    if isinstance(store, ast.For):
        store = store.body[-1]
    assert ast.unparse(store).startswith("tl.store("), f"{function} must end in tl.store"
    return docstring, store
