"""Assemble Triton kernels for a GPU that is not there, and read what the assembler says of them."""

from __future__ import annotations

import ast
import collections
import re
import subprocess
import tempfile
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nogpu.fake_cuda import fake_cuda

PTX_MMA = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*")
SASS_MMA = re.compile(r"\b(?:IGMMA|IMMA|HGMMA|QGMMA|QMMA|HMMA|UTC\w*MMA)\b")


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Resources of one assembled kernel, and its matrix instructions by mnemonic."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    ptx_mma: collections.Counter[str]
    sass_mma: collections.Counter[str]
    spills: int
    """Local-memory loads and stores in the machine code."""
    wide_loads: int
    """Loads and copies from global memory of 16 bytes a thread."""
    tensor_loads: int
    """Copies of whole tiles through a tensor descriptor (TMA)."""


def assemble(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    cc: int,
    *,
    warps: int,
    stages: int,
    multiples: Container[str] = (),
) -> Assembly:
    """Compile a `@triton.jit` function for compute capability `cc`; pointers are 16-byte aligned.

    `signature` gives the type of each runtime argument ("*i8", "i32"), `constants` the rest. The integers named in
    `multiples` are multiples of 16, which Triton and Inductor find out when they launch.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    aligned = {
        (names.index(n),): [["tt.divisibility", 16]]
        for n, kind in signature.items()
        if kind.startswith("*") or n in multiples
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    with fake_cuda(cc):
        options = {"num_warps": warps, "num_stages": stages}
        return _read(triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options))


def kernel_sources(code: str) -> dict[str, str]:
    """Inductor's generated code -> the source of each of its Triton kernels, by name, in order."""
    found = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "async_compile.triton":
            name, source = node.args[:2]
            found[ast.literal_eval(name)] = ast.literal_eval(source)
    return found


def assemble_generated(name: str, source: str, cc: int) -> Assembly:
    """Compile one kernel of Inductor's generated code, with the first of its configs."""
    import torch._inductor.config as config
    from torch._inductor.codecache import PyCodeCache

    launchers = [n for n in ("use_static_cuda_launcher", "use_static_triton_launcher") if hasattr(config, n)]
    with fake_cuda(cc), config.patch(dict.fromkeys(launchers, False)):
        tuner = getattr(PyCodeCache.load(source), name)
        return _read(tuner._precompile_config(tuner.configs[0]).kernel)


def _read(compiled: Any) -> Assembly:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = _cuobjdump("-res-usage", cubin), _cuobjdump("-sass", cubin)
    found = {key: int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    return Assembly(
        registers=found["REG"],
        stack_bytes=found["STACK"],
        local_bytes=found["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        ptx_mma=collections.Counter(PTX_MMA.findall(compiled.asm["ptx"])),
        sass_mma=collections.Counter(SASS_MMA.findall(sass)),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        tensor_loads=len(re.findall(r"cp\.async\.bulk\.tensor\.\S*global", compiled.asm["ptx"])),
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*128\b", sass)),
    )


def _cuobjdump(option: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
