"""What a person sees while the demo runs: the step, the phase, the requests; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

PHASES = ("mongo_only", "dual_write", "shadow_read", "postgres_read", "postgres_primary")


@dataclass
class Step:
    """The step under way.

    Attributes:
        title: what is done.
        detail: how far, or what came of it; shown beside the title.
        done, total: for a bar; None: there is none.
    """

    title: str
    detail: str = ""
    done: int = 0
    total: int | None = None
    began: float = field(default_factory=time.monotonic)

    def progress(self, done: int, total: int) -> None:
        """So many of so many are done."""
        self.done, self.total = done, total


class Screen:
    """Shows steps, one after the other, on the error stream.

    Attributes:
        phase: of the migration, one of `PHASES`.
        status: makes the line of figures below the phases.
        seconds: that each finished step took, by its title.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.phase = PHASES[0]
        self.status: Callable[[], str] = str
        self.seconds: dict[str, float] = {}
        self._step: Step | None = None
        self._spinner = Spinner("dots")

    @contextmanager
    def live(self) -> Iterator[None]:
        """Keep the lines fresh while the body runs, where there is a terminal."""
        if not self.console.is_terminal:
            yield
            return
        # Read when it is drawn, so nobody needs to tell it of changes.
        with Live(console=self.console, refresh_per_second=5, transient=True, get_renderable=self._render):
            yield

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show a step while the body runs, and keep the seconds that it took."""
        step = self._step = Step(title)
        if not self.console.is_terminal:
            self.console.print(f"{title} ...", highlight=False, soft_wrap=True)
        try:
            yield step
        finally:
            took = time.monotonic() - step.began
            self.seconds[title] = round(took, 2)
            self._step = None
            if step.detail or self.console.is_terminal:
                lead = "[green]✓[/] " if self.console.is_terminal else "  "
                beside = f"{escape(title)}  " if self.console.is_terminal else ""
                self.console.print(
                    f"{lead}{beside}[dim]{took:.1f} s[/]  {escape(step.detail)}",
                    highlight=False,
                    soft_wrap=True,
                )

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = []
        step = self._step
        if step is not None:
            line = Table.grid(padding=(0, 2, 0, 0))
            cells: list[RenderableType] = [self._spinner, Text(step.title, style="bold")]
            if step.total:
                cells += [ProgressBar(total=step.total, completed=step.done, width=24)]
                cells += [Text(f"{step.done:,}/{step.total:,}")]
            cells += [Text(f"{time.monotonic() - step.began:.0f} s", style="dim"), Text(step.detail)]
            line.add_row(*cells)
            parts.append(line)
        ladder = Text("  ")
        for name in PHASES:
            here = name == self.phase
            passed = PHASES.index(name) < PHASES.index(self.phase)
            ladder.append(name, style="bold cyan" if here else "green" if passed else "dim")
            ladder.append(" → " if name != PHASES[-1] else "", style="dim")
        parts += [ladder, Text("  " + self.status())]
        return Group(*parts)
