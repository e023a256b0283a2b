"""How far a long command is: a bar on a terminal, now and then a plain line in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from studytool.study.progress import duration, say

_SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def progress_of(console: Console, doing: str) -> Iterator[Callable[[int, int], None]]:
    """Yield the function `(done, total)` to call as work gets done; both ways of showing it estimate the time left."""
    if not console.is_terminal:
        yield _Lines(console, doing)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    def __init__(self, console: Console, doing: str) -> None:
        self.console = console
        self.doing = doing
        self.begun: tuple[float, int] | None = None
        self.last_line = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.begun is None:
            self.begun = (now, done)  # what was done before, if this goes on with earlier work, took no time now
        if now - self.last_line < _SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        seconds, count = now - self.begun[0], done - self.begun[1]
        left = f", about {duration(seconds / count * (total - done))} left" if count else ""
        say(self.console, f"{self.doing}: {done} of {total}{left}")
