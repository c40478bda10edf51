"""How commands fail: errors that the user can fix become a message and an exit code."""

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, Final, Never

import typer
from rich.text import Text

from qlora_api.escapes import escape_line
from qlora_api.reasons import REASONS, Reason
from qlora_cli.console import Console, print_line, print_text
from qlora_cli.hub_cache import hub_caches
from qlora_cli.local.trainer_libraries import NoGpuError, NoTrainerError
from qlora_cli.uris import LocalPathError
from qlora_planner.sizing import DoesNotFitError

_REASONS: Final[Mapping[type[Exception], Reason]] = {
    NoGpuError: Reason.ACCELERATOR_MISSING,
    DoesNotFitError: Reason.DOES_NOT_FIT,
}
INTERRUPTED_EXIT_CODE = 130
"""Exit code after Ctrl-C, as in shells."""


@contextlib.contextmanager
def exit_on_error(
    console: Console, stopped: str, on_error: Callable[[Console, Reason | None, str], Never]
) -> Iterator[None]:
    """Turn exceptions of a local run into a message and an exit code.

    Args:
        console: The console for standard error.
        stopped: The message after Ctrl-C: what the command leaves behind.
        on_error: Prints the error and exits.

    """
    # Imported here because it belongs to the optional trainer: `qlora validate` works without it.
    from qlora_trainer.errors import as_run_error  # noqa: PLC0415

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        exit_interrupted(console, stopped)
    except (NoGpuError, NoTrainerError, DoesNotFitError) as error:
        on_error(console, _REASONS.get(type(error)), escape_line(str(error)))
    except Exception as error:
        known = as_run_error(error)
        if known.reason is Reason.INTERRUPTED:
            exit_interrupted(console, f"step {known.step} is done; the same command resumes from its checkpoint")
        if known.reason is Reason.TRAINER_ERROR:
            raise  # a bug in the trainer: a bug report needs its traceback
        on_error(console, known.reason, escape_line(f"{known.message}{_cache_hint(known.reason)}"))


def _cache_hint(reason: Reason) -> str:
    """Return how to work from the hub's cache if the hub does not answer."""
    cache = hub_caches(None)[0]
    if reason is not Reason.HUB_UNAVAILABLE or not any(cache.glob("models--*")):
        return ""
    return f"; to use the models in {cache}, set HF_HUB_OFFLINE=1"


def _interrupt(_number: int, _frame: FrameType | None) -> Never:
    raise KeyboardInterrupt


def exit_interrupted(console: Console, state: str) -> Never:
    """Print what an interrupted command leaves behind, and exit with INTERRUPTED_EXIT_CODE."""
    print_line(console, state, "stopped; ", "yellow")
    raise typer.Exit(INTERRUPTED_EXIT_CODE)


def exit_error(console: Console, reason: Reason | None, message: str) -> Never:
    """Print reason, message and fix of an error, and exit with code 1."""
    console.print(Text.assemble(("error: ", "bold red"), (reason or "", "bold")))
    print_text(console, message)
    if reason is not None and reason not in {Reason.INVALID_SPEC, Reason.ACCELERATOR_MISSING}:
        print_line(console, REASONS[reason].remedy, "fix: ", "bold")
    raise typer.Exit(1)


def exit_error_without_remedy(console: Console, _reason: Reason | None, message: str) -> Never:
    """Print the message of an error, and exit with code 1; for commands without a manifest to fix."""
    print_text(console, message, "error: ", "bold red")
    raise typer.Exit(1)


def exit_on_path_error(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that exits with a message where a path that it was given cannot be used on this machine."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except LocalPathError as error:
            exit_error_without_remedy(Console(stderr=True), None, escape_line(str(error)))

    return run
