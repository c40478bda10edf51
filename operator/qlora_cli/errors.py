"""How a command ends that could not do its work: what a person can act on becomes a sentence and an exit code."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Final, Never

import typer
from rich.console import Console
from rich.markup import escape

from qlora_api.reasons import REASONS, Reason
from qlora_cli.local.trainer_libraries import NoGpuError, NoTrainerError
from qlora_planner.sizing import DoesNotFitError

_REASONS: Final[Mapping[type[Exception], Reason]] = {
    NoGpuError: Reason.ACCELERATOR_MISSING,
    DoesNotFitError: Reason.DOES_NOT_FIT,
}
INTERRUPTED_EXIT_CODE = 130
"""The exit code of a shell's command that was interrupted."""


@contextlib.contextmanager
def exit_on_error(
    console: Console, stopped: str, on_error: Callable[[Console, Reason | None, str], Never]
) -> Iterator[None]:
    """Turn exceptions into exit codes; `stopped` says where things stand after Ctrl-C."""
    # Imported here, because it is the trainer's: `qlora validate` works without it.
    from qlora_trainer.errors import as_run_error  # noqa: PLC0415

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        exit_interrupted(console, stopped)
    except (NoGpuError, NoTrainerError, DoesNotFitError) as error:
        on_error(console, _REASONS.get(type(error)), str(error))
    except Exception as error:
        known = as_run_error(error)
        if known.reason is Reason.INTERRUPTED:
            exit_interrupted(console, f"step {known.step} is done; the same command goes on from its checkpoint")
        if known.reason is Reason.TRAINER_ERROR:
            raise  # a bug of ours: its traceback is what a report needs
        on_error(console, known.reason, known.message)


def _interrupt(_number: int, _frame: FrameType | None) -> Never:
    raise KeyboardInterrupt


def exit_interrupted(console: Console, state: str) -> Never:
    """Say where a stopped command stands, and end as a shell expects it."""
    console.print(f"[yellow]stopped;[/] {state}", soft_wrap=True)
    raise typer.Exit(INTERRUPTED_EXIT_CODE)


def exit_error(console: Console, reason: Reason | None, message: str) -> Never:
    """Say what is wrong and what to do about it, and end with exit code 1."""
    console.print(f"[bold red]error:[/] {f'[bold]{reason}[/]' if reason else ''}", soft_wrap=True)
    console.print(escape(message), soft_wrap=True)
    if reason is not None and reason not in {Reason.INVALID_SPEC, Reason.ACCELERATOR_MISSING}:
        console.print(f"[bold]what to do:[/] {escape(REASONS[reason].remedy)}", soft_wrap=True)
    raise typer.Exit(1)


def exit_error_without_remedy(console: Console, _reason: Reason | None, message: str) -> Never:
    """Say what is wrong where there is no manifest to correct: reasons and their remedies speak of one."""
    console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(1)
