"""How far a calibration is: told to whoever asks, or drawn."""

from __future__ import annotations

import sys
from typing import Any, Protocol

from viditq_fx.errors import RecipeError


class Progress(Protocol):
    """Hears how far a calibration is."""

    def stage(self, title: str, total: int | None) -> None:
        """A stage of `total` units begins, and the one before it is done; None: nobody knows how many."""

    def advance(self) -> None:
        """One unit of the current stage is done."""


class _Silent:
    def stage(self, title: str, total: int | None) -> None: ...

    def advance(self) -> None: ...


class _Lines:
    """A line on stderr as each stage begins: where rich is not installed."""

    def stage(self, title: str, total: int | None) -> None:
        print(f"{title} ...", file=sys.stderr, flush=True)

    def advance(self) -> None: ...


class _Bars:
    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Rich

        columns: list[Any] = [TextColumn("{task.description}"), BarColumn(bar_width=30)]
        columns += [MofNCompleteColumn(), TimeElapsedColumn()]
        self._rich: Any = Rich(*columns, console=Console(stderr=True))
        self._task: Any = None

    def stage(self, title: str, total: int | None) -> None:
        self._rich.start()
        self._task = self._rich.add_task(title, total=total)

    def advance(self) -> None:
        self._rich.advance(self._task)

    def close(self) -> None:
        self._rich.stop()


def progress_of(given: bool | Progress) -> Progress:
    """What `progress=` asks for: True draws bars where rich is installed and writes lines where not, False nothing.

    Raises RecipeError for an object that is no Progress.
    """
    if given is False or given is None:
        return _Silent()
    if given is True:
        try:
            return _Bars()
        except ImportError:
            return _Lines()
    if not callable(getattr(given, "stage", None)) or not callable(getattr(given, "advance", None)):
        raise RecipeError(
            f"calibrate: progress={given!r}; give True, False or an object with stage(title, total) and advance()"
        )
    return given


def close(progress: Progress) -> None:
    """Leave the terminal as it was."""
    if isinstance(progress, _Bars):
        progress.close()
