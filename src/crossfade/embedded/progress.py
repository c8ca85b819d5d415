"""Progress of the one-time set-up: one bar in total and one per step; plain lines without a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Step:
    """One step that is under way. `advance` may be called from any thread."""

    def __init__(self, parent: SetupProgress, name: str, weight: float) -> None:
        self.name = name
        self._parent = parent
        self._weight = weight
        self._fraction = 0.0
        self._task: TaskID | None = None
        self._started = time.monotonic()
        if parent.bars is not None:
            self._task = parent.bars.add_task(name, total=1.0)
        elif parent.console is not None:
            parent.console.print(f"set-up: {name} ...", highlight=False)

    def at(self, fraction: float, doing: str | None = None) -> None:
        """The step is `fraction` (0..1) done, and is now `doing` something."""
        fraction = min(max(fraction, self._fraction), 1.0)
        self._parent.add((fraction - self._fraction) * self._weight)
        self._fraction = fraction
        if self._parent.bars is not None and self._task is not None:
            label = f"{self.name}: {doing}" if doing else self.name
            self._parent.bars.update(self._task, completed=fraction, description=label)

    def done(self) -> None:
        """The step is complete."""
        self.at(1.0)
        if self._parent.bars is None and self._parent.console is not None:
            seconds = time.monotonic() - self._started
            self._parent.console.print(f"set-up: {self.name} done in {seconds:.0f} s", highlight=False)


class SetupProgress:
    """Where steps report to. Silent when `console` is None."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self.bars: Progress | None = None
        self._total: TaskID | None = None

    def step(self, name: str, weight: float) -> Step:
        """Begin a step; weight: its expected share of the work, in seconds."""
        return Step(self, name, weight)

    def add(self, seconds: float) -> None:
        """Expected seconds of work are done."""
        if self.bars is not None and self._total is not None:
            self.bars.advance(self._total, seconds)

    def say(self, line: str) -> None:
        """One line for the reader."""
        if self.console is not None:
            self.console.print(line, highlight=False, soft_wrap=True)

    @contextmanager
    def running(self, title: str, weight: float) -> Iterator[None]:
        """Show the bars while the body runs. weight: expected seconds of all steps together."""
        if self.console is None or not self.console.is_terminal:
            self.say(f"set-up: {title}")
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        with Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True) as bars:
            self.bars = bars
            self._total = bars.add_task(title, total=weight)
            try:
                yield
            finally:
                self.bars = None
