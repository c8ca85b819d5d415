"""Progress on a terminal's error output: a bar for each thing, one for all, one for what is made at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from crossfade.cli.context import problems


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        # Steps are no two alike: a rate of them says nothing.
        if task.fields.get("steps"):
            return Text("steps")
        return Text("- /s" if task.speed is None else f"{task.speed:,.0f}/s")


class Show:
    """What is shown of one thing, an entity most often.

    Args:
        progress: the bars.
        name: what it is.
        total: records, about.
        on_change: called with how many records are done.
    """

    def __init__(self, progress: Progress, name: str, total: int, on_change: Callable[[int], None]) -> None:
        self._progress, self._name, self._total = progress, name, total
        self._on_change = on_change
        self._task = progress.add_task(name, total=total, said="")
        self._steps: TaskID | None = None

    def __call__(self, done: int, said: str) -> None:
        """So many records are done, and this was found."""
        self._progress.update(self._task, completed=done, total=max(self._total, done), said=said)
        self._on_change(done)

    def step(self, number: int, of: int, what: str) -> None:
        """The step with this number, from 0, is about to be done; ``number == of``: all are."""
        if self._steps is None:
            self._steps = self._progress.add_task(f"{self._name}, at the end", total=of, said="", steps=True)
        self._progress.update(self._steps, completed=number, total=of, said=what)


@contextmanager
def bars(as_json: bool, totals: Mapping[str, int] | None = None) -> Iterator[Callable[[str, int], Show]]:
    """Bars while the block runs: how far, how fast, how long still, what was found.

    Args:
        as_json: nothing is shown, as where there is no terminal.
        totals: records of each entity, about, that will have a bar; with several there is one for all.
    """
    progress = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
        console=Console(stderr=True),
        disable=as_json or not problems.is_terminal,
    )
    done: dict[str, int] = {}
    everything = (
        progress.add_task("all", total=sum(totals.values()), said="") if totals and len(totals) > 1 else None
    )

    def bar(name: str, total: int) -> Show:
        def changed(number: int) -> None:
            done[name] = number
            if everything is not None:
                whole = sum(done.values())
                progress.update(everything, completed=whole, total=max(sum((totals or {}).values()), whole))

        return Show(progress, name, total, changed)

    with progress:
        yield bar
