"""Files that a user asked for: checked early, then written whole."""

from __future__ import annotations

import os
from pathlib import Path

from viditq_fx.errors import ViditqError
from viditq_fx.whole_file import write_whole


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
