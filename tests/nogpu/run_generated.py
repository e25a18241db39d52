"""Child process that runs Inductor's generated CUDA code on a CPU, each kernel in Triton's interpreter.

`python -m nogpu.run_generated IN OUT` under TRITON_INTERPRET=1. IN: a list of (code, arguments of
its `call`), CPU tensors and sizes. OUT: the list of what they return.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import math
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.runtime.triton_helpers as triton_helpers
import triton
import triton.language as tl
from nogpu.interpreter import fix_dot, fix_fp8_casts, fix_scalars


def elementwise(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], Any]:
    """A libdevice function by numpy: the interpreter has none."""
    from triton.runtime.interpreter import TensorHandle

    def apply(x: Any) -> Any:
        data = x.handle.data
        return tl.core.tensor(TensorHandle(function(data).astype(data.dtype), x.handle.dtype), x.type)

    return apply


class Libdevice:
    """The functions that the generated code of these tests calls."""

    tanh = staticmethod(elementwise(np.tanh))
    rsqrt = staticmethod(elementwise(lambda data: 1 / np.sqrt(data)))
    nearbyint = staticmethod(elementwise(np.rint))
    rint = nearbyint
    erf = staticmethod(elementwise(np.vectorize(math.erf)))
    isnan = staticmethod(lambda x: x != x)


class Helpers:
    """Inductor's helpers, with the reductions by Triton's own: the others run element by element."""

    def __getattr__(self, name: str) -> Any:
        return getattr(triton_helpers, name)

    # Looked up at each call: the interpreter replaces Triton's functions while a kernel runs.
    max2 = staticmethod(lambda x, axis: tl.max(x, axis))
    maximum = staticmethod(lambda x, y: tl.maximum(x, y))
    minimum = staticmethod(lambda x, y: tl.minimum(x, y))
    promote_to_tensor = staticmethod(lambda x: x)


class InterpretedKernel:
    """One kernel of the generated code, without the heuristics that would compile it for a device."""

    def __init__(self, name: str, source: str, folder: Path) -> None:
        tree = ast.parse(source.replace("triton_helpers.set_driver_to_gpu()", "pass"))
        function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
        heuristic = next(d for d in function.decorator_list if "triton_heuristics" in ast.unparse(d))
        function.decorator_list.remove(heuristic)
        self.kind = re.match(r"triton_heuristics\.(\w+)", ast.unparse(heuristic))[1]
        self.parameters = [a.arg for a in function.args.args]
        path = folder / f"{name}.py"
        path.write_text(ast.unparse(tree))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.libdevice, module.triton_helpers = Libdevice, Helpers()
        self.kernel = getattr(module, name)

    def run(self, *args: Any, stream: int) -> None:
        if self.kind == "template":
            *args, x, y, z = args
            self.kernel[(x, y, z)](*args)
            return
        sizes = dict(zip((p for p in self.parameters if not p.endswith("BLOCK")), args, strict=True))
        assert "ynumel" not in sizes, f"{self.kind} kernel with two grid dimensions"
        block = 8 if self.kind == "persistent_reduction" else 1024
        blocks = {"XBLOCK": min(triton.next_power_of_2(sizes["xnumel"]), block)}
        if "R0_BLOCK" in self.parameters:
            blocks["R0_BLOCK"] = min(triton.next_power_of_2(sizes["r0_numel"]), 1024)
        self.kernel[(triton.cdiv(sizes["xnumel"], blocks["XBLOCK"]), 1, 1)](*args, **blocks)


class AsyncCompile:
    """Stands where the generated code makes its compiler."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def triton(self, name: str, source: str, device_str: str) -> InterpretedKernel:
        return InterpretedKernel(name, source, self.folder)

    def wait(self, scope: Any) -> None:
        pass


def load(code: str, folder: Path) -> Callable[[list[Any]], Any]:
    """The `call` of the generated code, on CPU tensors."""
    for pattern, replacement in (
        (r"^from torch\._C import _cuda_getCurrentRawStream.*$", "get_raw_stream = lambda index: 0"),
        (r"^empty_strided_cuda = .*$", "empty_strided_cuda = empty_strided_cpu"),
        (r"^async_compile = AsyncCompile\(\)", "async_compile = INTERPRETED"),
        (r"with torch\.cuda\._DeviceGuard\(0\):", "with NO_GUARD():"),
        (r"torch\.cuda\.set_device\(0\)", "pass"),
    ):
        code, count = re.subn(pattern, replacement, code, flags=re.MULTILINE)
        assert count, f"the generated code has changed: nothing matches {pattern}"
    scope = {"INTERPRETED": AsyncCompile(folder), "NO_GUARD": contextlib.nullcontext, "__name__": "generated"}
    exec(compile(code, str(folder / "generated.py"), "exec"), scope)
    return scope["call"]


def main(source: str, target: str) -> None:
    """See the module's first lines."""
    assert triton.knobs.runtime.interpret, "start this process with TRITON_INTERPRET=1"
    fix_dot()
    fix_scalars()
    fix_fp8_casts()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (code, args) in enumerate(torch.load(source, weights_only=False)):
            inside = Path(folder) / str(number)
            inside.mkdir()
            results.append(load(code, inside)(list(args)))
    torch.save(results, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
