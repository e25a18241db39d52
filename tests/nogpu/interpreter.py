"""Make Triton's interpreter right and quick for int8 and bf16 matrix products.

As it stands (Triton 3.6 and 3.9) it multiplies bf16 operands by their bit patterns, and multiplies
integers without BLAS: 60 times slower. Both are done in floating point here, exactly: integers in
fp64 (sums below 2^53), bf16 in fp32.

Only a process that was started with TRITON_INTERPRET=1 can interpret: Triton reads it at import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent


def run_interpreted(module: str, payload: Any, folder: Path, timeout: float = 300) -> Any:
    """Run `python -m module IN OUT` under TRITON_INTERPRET=1: what it makes of `payload`.

    Both ways go through `torch.save`. Raises AssertionError with the process's stderr if it fails.
    """
    source, target = folder / "in.pt", folder / "out.pt"
    torch.save(payload, source)
    path = os.pathsep.join([str(TESTS), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", module, str(source), str(target)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{module} failed:\n{done.stderr[-4000:]}"
    return torch.load(target, weights_only=False)


def as_float32(handle: Any) -> np.ndarray:
    """A TensorHandle's numbers; bf16 is kept as its uint16 bits, so those are widened."""
    import triton.language as tl

    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def fix_dot() -> None:
    """Replace the interpreter's `tl.dot` in this process (it exists for one test run)."""
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if np.issubdtype(d.data.dtype, np.integer):
            product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(d.data.dtype)
        elif tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            product = np.matmul(as_float32(a), as_float32(b)).astype(d.data.dtype)
        else:
            return plain(self, a, b, d, *rest)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def fix_scalars() -> None:
    """Let a loop bound be a tensor: Triton 3.6 reads it with `int(array of one)`, an error since NumPy 2.4."""
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, *rest: Any) -> None:
        plain(tensor, *rest)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_tensor


def fix_fp8_casts() -> None:
    """Round fp32 -> e4m3 to nearest even, as devices and torch do: the interpreter cuts off."""
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self: Any, source: Any, target: Any, *rest: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.float8e4nv:
            return plain(self, source, target, *rest)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(rounded.view(torch.uint8).numpy(), target.scalar)

    interpreter.InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
