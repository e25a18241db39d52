"""Progress bars of the demo: one line a stage, with its time once it is done."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Bars:
    """Draws the stages of a run; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def stage(self, title: str, total: int) -> None:
        """Begin a stage; the one before it stays in sight with its time."""
        self._progress.start()  # only now: an error before the first stage leaves no empty bars
        self._task = self._progress.add_task(title, total=total)

    def advance(self) -> None:
        """One unit of the stage is done."""
        assert self._task is not None
        self._progress.advance(self._task)

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._progress.stop()
