"""Progress of `qlora run`: a live bar on a terminal, else a line every few seconds."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from qlora_api.escapes import escape_text
from qlora_api.names import Phase
from qlora_api.v1alpha1 import Plan, Progress
from qlora_cli.console import Console, print_line, print_text
from qlora_cli.local.runner import Screen

SECONDS_BETWEEN_LINES: Final = 10.0
"""Keeps a log short, and still shows that the run is alive."""
BAR_CHARACTERS: Final = 12
TRAINED_TOKENS: Final = r"⟦[^⟧]*⟧"
"""Matches the supervised tokens that prepare marks in the rows it shows."""
PREPARING: Final = "Preparing"
LOADING: Final = "Loading"


@contextmanager
def open_screen(console: Console) -> Iterator[Screen]:
    """Return a screen that suits the console, and finish its last bar on exit."""
    if not console.is_terminal:
        yield LineScreen(console)
        return
    with Bar(
        SpinnerColumn(finished_text=Text("✓", "green")),
        TextColumn("{task.description}"),
        BarColumn(BAR_CHARACTERS),
        TextColumn("{task.fields[details]}"),
        console=console,
    ) as bar:
        screen = LiveScreen(bar)
        yield screen
        screen.finish()


def format_progress(progress: Progress) -> str:
    """Format step, loss, throughput and time left, as far as they are known."""
    parts = []
    if progress.step is not None and progress.total_steps is not None:
        parts.append(f"{progress.percent:3d}%  step {progress.step}/{progress.total_steps}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:.0f} tok/s")
    if progress.remaining_seconds:
        parts.append(f"{clock_time(progress.remaining_seconds)} left")
    return "  ".join(parts)


def clock_time(seconds: int) -> str:
    """Format 130 seconds as `2:10` and 3725 as `1:02:05`."""
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def name_stage(progress: Progress, before: str) -> tuple[str, str]:
    """Return the name of the current stage, and its details.

    Args:
        progress: The latest report.
        before: The stage of the previous report.

    """
    phase = progress.phase or Phase.TRAINING
    if phase is Phase.TRAINING:
        # The trainer reports phase Training before the model is loaded, and no loss before its first step.
        starting = before in {PREPARING, LOADING} and progress.loss is None
        return (LOADING, "") if starting else (phase, format_progress(progress))
    if phase is Phase.EVALUATING:
        return phase, "base model" if progress.loss is None else "adapter"
    return phase, ""


def indent_rest(text: str) -> str:
    """Indent all lines but the first: a row in a message must not look like a message."""
    return text.replace("\n", "\n  ")


class LineScreen:
    """Prints one line per stage, and one for the steps every few seconds."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._stage = PREPARING
        self._next_line = 0.0
        self._done = False

    def note(self, text: str) -> None:
        """Print a progress message."""
        print_text(self._console, indent_rest(text))

    def show_plan(self, plan: Plan) -> None:
        """Show the reasons of the plan."""
        for reason in plan.reasons:
            self._print(reason)

    def report(self, progress: Progress) -> None:
        """Print the stage when it changes, and the steps every few seconds."""
        now = self._clock()
        stage, details = name_stage(progress, self._stage)
        done = progress.step is not None and progress.step == progress.total_steps
        if stage == self._stage and now < self._next_line and (self._done or not done):
            return
        self._stage, self._next_line, self._done = stage, now + SECONDS_BETWEEN_LINES, done
        self._print(f"{stage:<10}  {details}".rstrip())

    def _print(self, text: str) -> None:
        print_line(self._console, text)


class LiveScreen:
    """Shows a bar for the current stage, below the finished bars of earlier stages."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._stage = PREPARING
        self._task = self._start(PREPARING)

    def note(self, text: str) -> None:
        """Print a progress message above the bar."""
        shown = Text(escape_text(indent_rest(text)), style="dim")
        shown.highlight_regex(TRAINED_TOKENS, "not dim green")
        self._bar.console.print(shown, soft_wrap=True)

    def show_plan(self, plan: Plan) -> None:
        """Show the reasons of the plan."""
        for reason in plan.reasons:
            self.note(reason)

    def report(self, progress: Progress) -> None:
        """Update the bar; a new stage gets a new one."""
        stage, details = name_stage(progress, self._stage)
        if stage != self._stage:
            self.finish()
            self._stage, self._task = stage, self._start(stage, details)
        if stage == Phase.TRAINING:
            self._bar.update(self._task, completed=progress.step or 0, total=progress.total_steps, details=details)

    def finish(self) -> None:
        """Mark the current stage as done."""
        total = self._bar.tasks[self._task].total or 1
        self._bar.update(self._task, total=total, completed=total)

    def _start(self, stage: str, details: str = "") -> TaskID:
        return self._bar.add_task(f"{stage:<10}", total=None, details=details)
