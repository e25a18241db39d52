"""Code that is not ours: found through entry points, called so that its failure becomes a reason."""

from __future__ import annotations

import hashlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from viditq_fx.errors import StrictError
from viditq_fx.report import CompileReport

PASSES_GROUP = "viditq_fx.passes"
TEMPLATES_GROUP = "viditq_fx.templates"
_LOG = logging.getLogger("viditq_fx.plugins")
"""TORCH_LOGS="+viditq_fx" shows the traceback of what a plugin raised."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What foreign code raised."""

    error: Exception

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One entry point of an installed package."""

    name: str
    """E.g. "plugin 'fuse_halves' of my_plugin 0.1"."""
    value: Any
    """What it stands for, or the Failure to make it."""


def attempt(call: Callable[..., Any], *args: Any) -> Any:
    """What foreign code returns, or a Failure."""
    try:
        return call(*args)
    # Whatever a plugin raises, the model must compile without it.
    except Exception as error:  # noqa: BLE001
        _LOG.debug("code from outside raised", exc_info=True)
        return Failure(error=error)


def installed(group: str) -> Iterator[Plugin]:
    """The plugins of a group, ordered by name so that every process has the same order."""
    for point in sorted(metadata.entry_points(group=group), key=lambda p: (p.name, p.value)):
        owner = f" of {point.dist.name} {point.dist.version}" if point.dist is not None else ""
        yield Plugin(name=f"plugin {point.name!r}{owner}", value=attempt(_make, point))


def _make(point: metadata.EntryPoint) -> Any:
    value = point.load()
    return value() if callable(value) else value


def refuse(reason: str, report: CompileReport, *, strict: bool, cause: Exception | None = None) -> None:
    """Leave foreign code out: a line in the report and a warning, or a StrictError."""
    if strict:
        raise StrictError(f"strict=True: {reason}") from cause
    report.rejects.append(reason)
    warnings.warn(f"viditq: {reason}", stacklevel=2)


def identity(objects: Iterable[tuple[str, list[Path]]]) -> tuple[str, ...] | None:
    """What tells one set of foreign objects from another in a cache key; None if there is no telling.

    Each comes as a text and the files that hold its code, see `class_files` and `package_files`.
    """
    parts = []
    for label, files in objects:
        if not files:
            return None
        digest = hashlib.sha256()
        for path in files:
            digest.update(path.name.encode() + path.read_bytes())
        parts.append(f"{label}:{digest.hexdigest()}")
    return tuple(parts)


def class_files(kind: type) -> list[Path]:
    """The files of the package in which a class stands; none for one that was typed into an interpreter."""
    try:
        path = Path(inspect.getsourcefile(kind) or "")
    except TypeError:  # no module of that name, or one without a file
        return []
    return package_files(path) if path.is_file() else []


def package_files(path: Path) -> list[Path]:
    """A file and, in a package, those beside it: an op's reference is traced into code and stands in no graph."""
    return sorted(path.parent.glob("*.py")) if (path.parent / "__init__.py").exists() else [path]
