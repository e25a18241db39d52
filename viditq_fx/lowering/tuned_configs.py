"""Which kernel was measured to be the fastest for a linear: files shipped in `tuned/`, and one of this machine's own.

    op, class of (M, N, K)  ->  name of a kernel, as the report has it

A file only picks among the kernels that could be chosen anyway, so a wrong one costs time and never correctness.
`tuned/README.md` describes the format. The machine's own file is written when Inductor was asked to autotune.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import warnings
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from viditq_fx.cpu_kernels.build import cache_folder
from viditq_fx.triton_templates.base import LinearProblem

FORMAT = 1
SHIPPED = Path(__file__).parent / "tuned"
_STEP = 256
"""N and K of one class are the same when rounded up to a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class ShapeClass:
    """What linears have in common that share an entry."""

    op: str
    """Op of the dialect, e.g. "linear_w8a8"; see `op_class`."""
    rows: int
    """M, rounded up to a power of two, at least 16."""
    width: int
    """N, rounded up to a multiple of 256."""
    depth: int
    """K, likewise."""

    @classmethod
    def of(cls, op: str, problem: LinearProblem) -> ShapeClass:
        """The class of a linear."""
        rows = 1 << (max(problem.rows, 16) - 1).bit_length()
        return cls(
            op=op_class(op, problem), rows=rows, width=_rounded(problem.width), depth=_rounded(problem.depth)
        )


def op_class(op: str, problem: LinearProblem) -> str:
    """The op's name, with "-g128" or "-g64" where its weight has such groups: other kernels compute it then."""
    return f"{op}-g{problem.group}" if problem.group is not None else op


@dataclass(frozen=True, kw_only=True)
class Known:
    """The fastest kernel of a class, and who says so."""

    kernel: str
    """E.g. "triton:linear_w8a8 256x128x128 s3 w8" or "extern:int_mm"."""
    source: str


def known_kernel(
    op: str, problem: LinearProblem, device_name: str, allowed: Container[str], *, timing: bool
) -> Known | None:
    """What was measured for a linear on this device, if it is one of the `allowed` kernels.

    This machine's own timing goes first. Under `timing` it alone counts: who asks for timing gets one.
    """
    shape, arch = ShapeClass.of(op, problem), _arch(problem.capability)
    own = _read_own(_own_file(arch, device_name)).get(shape)
    if own is not None and own in allowed:
        return Known(kernel=own, source="fastest when this machine timed it")
    for file in () if timing else _shipped(arch, device_name):
        kernel = file.kernels.get(shape)
        if kernel is not None and kernel in allowed:
            return Known(kernel=kernel, source=f"fastest on {file.device} ({file.name})")
    return None


def remember(op: str, problem: LinearProblem, device_name: str, kernel: str) -> None:
    """Keep what this machine found fastest. Where the file cannot be written, a warning says so."""
    arch = _arch(problem.capability)
    path = _own_file(arch, device_name)
    kernels = dict(_read_own(path)) | {ShapeClass.of(op, problem): kernel}
    data = {
        **_own_header(arch, device_name),
        "linears": [{**asdict(k), "kernel": v} for k, v in kernels.items()],
    }
    try:
        write_tuned(path, data)
    except OSError as error:
        warnings.warn(f"viditq: what was timed cannot be kept in {path}: {error}", stacklevel=2)


def write_tuned(path: Path, data: Mapping[str, Any]) -> None:
    """Write a file of tuned kernels whole or not at all, an entry a line. Raises OSError."""
    entries = ",\n".join(f"  {json.dumps(entry)}" for entry in data["linears"])
    head = json.dumps({k: v for k, v in data.items() if k != "linears"}, indent=1)[:-2]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
    ) as file:
        file.write(f'{head},\n "linears": [\n{entries}\n ]\n}}\n')
    try:
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise


def own_digest() -> str:
    """Digest of what this machine timed so far, "" where it timed nothing: part of the key of generated code."""
    contents = []
    for path in sorted(cache_folder().glob("tuned-*.json")):
        try:
            contents.append(path.read_bytes())
        except OSError:  # not read when kernels are chosen either
            continue
    return _digest(*contents) if contents else ""


@dataclass(frozen=True, kw_only=True)
class TunedFile:
    """A file as it was read."""

    name: str
    device: str
    architecture: str
    kernels: Mapping[ShapeClass, str]


def read_tuned(path: Path) -> TunedFile:
    """Read a file of tuned kernels. Raises ValueError where it is no such file, and says why; OSError."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(
            f'"format" must be {FORMAT}, not {data.get("format") if isinstance(data, dict) else data!r}'
        )
    for key in ("architecture", "device"):
        if not isinstance(data.get(key), str):
            raise ValueError(f'"{key}" must be a text, not {data.get(key)!r}')
    return TunedFile(
        name=path.name,
        device=data["device"],
        architecture=data["architecture"],
        kernels=dict(_entries(data.get("linears"))),
    )


def _entries(listed: Any) -> Iterator[tuple[ShapeClass, str]]:
    if not isinstance(listed, list):
        raise ValueError(f'"linears" must be a list, not {listed!r}')
    for entry in listed:
        given: dict[str, Any] = entry if isinstance(entry, dict) else {}
        op, kernel = given.get("op"), given.get("kernel")
        rows, width, depth = (_size(given.get(key)) for key in ("rows", "width", "depth"))
        if not isinstance(op, str) or not isinstance(kernel, str) or not rows or not width or not depth:
            raise ValueError(f"an entry has op, rows, width, depth and kernel; got {entry!r}")
        if rows & (rows - 1) or width % _STEP or depth % _STEP:
            raise ValueError(f"rows are a power of two, width and depth multiples of {_STEP}; got {entry!r}")
        yield ShapeClass(op=op, rows=rows, width=width, depth=depth), kernel


def _size(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _shipped(arch: str, device_name: str) -> tuple[TunedFile, ...]:
    """Files of an architecture, those of the very device first."""
    files = [file for file in _read_shipped(SHIPPED) if file.architecture == arch]
    return tuple(sorted(files, key=lambda file: file.device != device_name))


@lru_cache(maxsize=4)
def _read_shipped(folder: Path) -> tuple[TunedFile, ...]:
    return tuple(read_tuned(path) for path in sorted(folder.glob("*.json")))


def _own_file(arch: str, device_name: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return cache_folder() / f"tuned-{arch}-{slug}.json"


def _own_header(arch: str, device_name: str) -> dict[str, Any]:
    """What has to be the same for the machine's own file to hold still."""
    return {"format": FORMAT, "architecture": arch, "device": device_name, **_versions()}


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    folder = Path(__file__).resolve().parents[1] / "triton_templates"
    sources = _digest(*(path.read_bytes() for path in sorted(folder.glob("*.py"))))
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "unknown"
    return {"torch": torch.__version__, "triton": triton, "kernels": sources}


def _read_own(path: Path) -> Mapping[ShapeClass, str]:
    """What this machine timed; nothing, with a warning, where the file is broken or from other versions."""
    try:
        stamp = path.stat()
    except OSError:
        return {}
    return _read_own_at(path, stamp.st_mtime_ns, stamp.st_size)


@lru_cache(maxsize=8)
def _read_own_at(path: Path, modified: int, size: int) -> Mapping[ShapeClass, str]:
    try:
        found = read_tuned(path)
        header = json.loads(path.read_text(encoding="utf-8"))
        differs = [key for key, value in _versions().items() if header.get(key) != value]
        if not differs:
            return found.kernels
        why = f"it was made with another {' and '.join(differs)}"
    except (ValueError, OSError) as error:  # JSON's and UTF-8's errors are ValueErrors
        why = str(error)
    warnings.warn(f"viditq: {path} is left out, and written anew by the next autotuning: {why}", stacklevel=2)
    return {}


def _arch(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def _rounded(size: int) -> int:
    return -(-size // _STEP) * _STEP


def _digest(*contents: bytes) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]
