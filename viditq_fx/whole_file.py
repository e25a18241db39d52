"""Whole files only: each is written beside its place, then renamed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


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
    except BaseException:  # also Ctrl-C leaves nothing behind
        Path(name).unlink(missing_ok=True)
        raise
