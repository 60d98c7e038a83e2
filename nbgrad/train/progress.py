"""How far a run has come: a bar on a terminal, lines of text elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

__all__ = ["Bar", "Lines", "Silent", "progress"]


class Silent:
    """Shows nothing. The interface of the others: a context manager with update and say."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        pass

    def update(self, done: float, text: str = "") -> None:
        """``done`` of the total is finished; ``text`` says what is going on. Cheap."""

    def say(self, line: str) -> None:
        """Something worth a line of its own."""


class Lines(Silent):
    """For logs and pipes: only the lines that are said, each as it comes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def say(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()


class Bar(Silent):
    """A rich progress bar with the time left; redrawn at most every 0.1 s."""

    def __init__(self, total: float, stream: TextIO) -> None:
        from rich import progress as rich
        from rich.console import Console

        self._bar: Any = rich.Progress(
            rich.TextColumn("{task.description}"), rich.BarColumn(bar_width=30),
            rich.TaskProgressColumn(), rich.TimeRemainingColumn(compact=True),
            rich.TextColumn("left"),
            console=Console(file=stream), transient=True, auto_refresh=False)
        self._task = self._bar.add_task("", total=total)
        self._next = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, done: float, text: str = "") -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 0.1
            self._bar.update(self._task, completed=done, description=text, refresh=True)

    def say(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, markup=False)


def progress(total: float, *, quiet: bool = False, stream: TextIO | None = None) -> Silent:
    """A Bar where ``stream`` (stderr) is a terminal and rich is installed, else Lines."""
    stream = stream or sys.stderr
    if quiet:
        return Silent()
    try:
        return Bar(total, stream) if stream.isatty() else Lines(stream)
    except ModuleNotFoundError:
        return Lines(stream)
