"""Progress for a person: a live bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from qlora_api.names import Phase
from qlora_api.v1alpha1 import Plan, Progress
from qlora_cli.local import Screen

SECONDS_BETWEEN_LINES: Final = 10.0
"""A log stays readable, and still shows that the run is alive."""
BAR_CHARACTERS: Final = 24


@contextmanager
def open_screen(console: Console) -> Iterator[Screen]:
    """Choose what suits the console, and leave it tidy."""
    if not console.is_terminal:
        yield LineScreen(console)
        return
    with Bar(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(BAR_CHARACTERS),
        TextColumn("{task.fields[details]}"),
        console=console,
    ) as bar:
        screen = LiveScreen(bar)
        yield screen
        screen.finish()


def describe(progress: Progress) -> str:
    """Return step, loss, speed and time left, as far as they are known."""
    parts = []
    if progress.step is not None and progress.total_steps is not None:
        parts.append(f"{progress.percent:3d}%  step {progress.step}/{progress.total_steps}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:.0f} tok/s")
    if progress.remaining_seconds:
        parts.append(f"{timedelta(seconds=progress.remaining_seconds)} left")
    return "  ".join(parts)


class LineScreen:
    """One line per phase, and one for the steps every few seconds."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._phase: Phase | None = None
        self._next_line = 0.0
        self._done = False

    def note(self, text: str) -> None:
        """Show a sentence about the preparation."""
        self._print(text)

    def show_plan(self, plan: Plan) -> None:
        """Show what was decided, and why."""
        for reason in plan.reasons:
            self._print(reason)

    def report(self, progress: Progress) -> None:
        """Show the phase when it changes, and the steps now and then."""
        now = self._clock()
        done = progress.step is not None and progress.step == progress.total_steps
        if progress.phase == self._phase and now < self._next_line and (self._done or not done):
            return
        self._phase, self._next_line, self._done = progress.phase, now + SECONDS_BETWEEN_LINES, done
        details = describe(progress) if progress.phase in {Phase.TRAINING, None} else ""
        self._print(f"{progress.phase or Phase.TRAINING}  {details}".rstrip())

    def _print(self, text: str) -> None:
        self._console.print(escape(text), soft_wrap=True)


class LiveScreen:
    """A bar for the phase that runs, above it a finished one for each phase before."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._phase: Phase | None = None
        self._task: TaskID | None = None

    def note(self, text: str) -> None:
        """Show a sentence about the preparation above the bar."""
        self._bar.console.print(f"[dim]{escape(text)}[/]", soft_wrap=True)

    def show_plan(self, plan: Plan) -> None:
        """Show what was decided, and why."""
        for reason in plan.reasons:
            self.note(reason)

    def report(self, progress: Progress) -> None:
        """Move the bar; another phase gets a new one."""
        phase = progress.phase or Phase.TRAINING
        if self._task is None or phase != self._phase:
            self.finish()
            total = progress.total_steps if phase is Phase.TRAINING else None
            self._phase, self._task = phase, self._bar.add_task(f"{phase:<10}", total=total, details="")
        if phase is Phase.TRAINING:
            self._bar.update(
                self._task, completed=progress.step or 0, total=progress.total_steps, details=describe(progress)
            )

    def finish(self) -> None:
        """Mark the phase that ran as done."""
        if self._task is not None:
            total = self._bar.tasks[self._task].total or 1
            self._bar.update(self._task, total=total, completed=total)
