"""Whole files only: each is written beside its place, then renamed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from viditq_fx.errors import ViditqError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file at once: whoever looks sees the old one or the new one, never half.

    Raises OSError when the folder cannot be written or the disk is full; nothing is left behind.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_writable(path: str | os.PathLike[str]) -> Path:
    """The path, if a file can be put there; tell early, before minutes of compiling. Raises ViditqError."""
    target = Path(path)
    if not target.name or target.is_dir():
        raise ViditqError(f"cannot write {target}: it is a folder; name a file in it")
    if not target.parent.is_dir():
        what = "is a file" if target.parent.exists() else "No such file or directory"
        raise ViditqError(f"cannot write {target}: folder {target.parent}: {what}; make the folder first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ViditqError(f"cannot write {target}: folder {target.parent}: Permission denied")
    return target


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write text as a whole file. Raises ViditqError, saying why, where that cannot be."""
    target = check_writable(path)
    try:
        write_whole(target, text.encode())
    except OSError as error:
        raise ViditqError(f"cannot write {target}: {error.strerror or error}") from error
    return target
