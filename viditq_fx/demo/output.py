"""A folder of results that are put in place together, and only when all went well."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

from viditq_fx.whole_file import write_whole


class OutputFolder:
    """Collects files inside a `with` block and puts them in place together when it ends well.

    The folder is made and tried on entry, so that one that cannot be written is told at once; if the
    block fails, a folder that it made is removed again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[Path] = []
        self._files: dict[str, bytes] = {}

    def __enter__(self) -> OutputFolder:
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        try:
            for folder in reversed(missing):
                folder.mkdir()
                self._made.append(folder)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except BaseException:  # also Ctrl-C leaves nothing behind
            self._remove_made()
            raise
        return self

    def write(self, name: str, content: bytes) -> None:
        """Keep a file for the end of the block."""
        self._files[name] = content

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for name, content in self._files.items():
                    write_whole(self.path / name, content)
                self._made.clear()
        finally:
            self._remove_made()

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            if not any(folder.iterdir()):
                folder.rmdir()
        self._made.clear()
