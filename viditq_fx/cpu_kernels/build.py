"""Compile a C++ source of this package for the CPU it runs on, once, and load it.

The library is kept in `$VIDITQ_CACHE_DIR`, else `$XDG_CACHE_HOME/viditq_fx`, else `~/.cache/viditq_fx`, under
a name that holds the digest of source, flags and compiler; a process that finds it there compiles nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from viditq_fx.errors import KernelBuildError

_TIMEOUT_S = 300
_ISA_FLAGS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
}


def instruction_set() -> str:
    """ "AVX2" or "AVX512": what torch's own kernels use here (ATEN_CPU_CAPABILITY lowers it).

    Raises KernelBuildError on another CPU.
    """
    name = torch.backends.cpu.get_cpu_capability()
    if platform.machine().lower() not in ("x86_64", "amd64") or name not in _ISA_FLAGS:
        raise KernelBuildError(
            f"our CPU kernels are for x86 with AVX2; this is {platform.machine()} with {name}"
        )
    return name


def vnni_flags() -> tuple[str, ...]:
    """Flags that add the four-way byte dot product where this CPU has it for 512-bit vectors, else none.

    torch's probe is private: where it is gone the shorter product computes the same.
    """
    has_vnni = bool(getattr(torch.cpu, "_is_vnni_supported", bool)())
    return ("-mavx512vnni",) if has_vnni and instruction_set() == "AVX512" else ()


def load_library(source: Path, extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The shared library of `source` for this CPU, compiled if it is not in the cache.

    Raises KernelBuildError with the compiler's words where there is no compiler, it fails, or the result
    cannot be written or loaded.
    """
    compiler = _compiler()
    isa = (*_ISA_FLAGS[instruction_set()], *extra_flags)
    options = ("-O3", "-std=c++17", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
    command = (compiler, *options, *isa)
    identity = "\n".join([_output((compiler, "--version")), *command[1:], source.read_text(encoding="utf-8")])
    name = f"{source.stem}-{_digest(identity.encode())[:16]}.so"
    target = cache_folder() / name
    try:
        if not _is_whole(target):
            _compile((*command, str(source)), target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise KernelBuildError(
            f"our C++ kernel cannot be kept in {target.parent}, set VIDITQ_CACHE_DIR to a folder that can be written: "
            f"{error}"
        ) from error


def cache_folder() -> Path:
    """Where compiled kernels are kept; a folder that only this user writes."""
    told = os.environ.get("VIDITQ_CACHE_DIR")
    if told:
        return Path(told)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "viditq_fx"


def _compiler() -> str:
    asked = os.environ.get("CXX")
    names = [asked] if asked else ["g++", "clang++", "c++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise KernelBuildError(f"{' and '.join(names)} not found; install g++ or set CXX")
    return found


def _compile(command: tuple[str, ...], target: Path) -> None:
    """Compile to a file of its own, then rename: another process may be doing the same."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        _output((*command, "-o", str(built)))
        digest = built.with_suffix(".sha256")
        digest.write_text(_digest(built.read_bytes()))
        os.replace(digest, target.with_suffix(".sha256"))
        os.replace(built, target)


def _is_whole(target: Path) -> bool:
    """Whether a library is there as it was built: loading one that was cut short kills the process."""
    try:
        return _digest(target.read_bytes()) == target.with_suffix(".sha256").read_text()
    except (OSError, UnicodeError):
        return False


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _output(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        raise KernelBuildError(f"{command[0]} failed: {_first_error(error.stderr)}") from error
    except (OSError, subprocess.SubprocessError, UnicodeError) as error:
        raise KernelBuildError(f"{command[0]} does not run: {error}") from error
    return done.stdout


def _first_error(text: str) -> str:
    lines = (
        [line for line in text.splitlines() if "error" in line.lower()] or text.splitlines() or ["no message"]
    )
    return lines[0].strip()
