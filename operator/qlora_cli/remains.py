"""What is left of a run whose pods are gone: its logs, the last word of each attempt, the stacks of those that hung."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from qlora_api.v1alpha1 import Attempt
from qlora_cli.cluster import ClusterError
from qlora_cli.jobs import ClusterJob
from qlora_cli.keptlogs import KeptLine, Missing, log_prefix, merge, read_kept, started
from qlora_cli.loglines import Printer
from qlora_cli.results import OutputError, open_output

HANGS = "hangs"
"""Folder of a result with the stacks of processes that gave no sign of life."""


class NothingKeptError(Exception):
    """The output has none of the logs that were looked for; the message says what to do."""


@dataclass(frozen=True)
class Wish:
    """What of the logs in the output is asked for, and how to reach it."""

    attempt: int | None
    """None: the latest, and the last words of all."""
    tail: int | None
    timestamps: bool
    s3_endpoint: str | None


def show_remains(job: ClusterJob, missing: Missing, wish: Wish, printer: Printer, console: Console) -> None:
    """Print the logs that no pod tells any more, and how the attempts ended; it is an error where there is no log."""
    try:
        logs = find_logs(job, missing, wish.s3_endpoint)
    except NothingKeptError as error:
        show_last_words(job, wish, console, Console(highlight=False))
        raise ClusterError(str(error)) from error
    console.print(escape(f"no pod tells of {missing.label} any more; from {log_prefix(job)}/:"), soft_wrap=True)
    for line in merge(logs, wish.tail):
        printer.show(line.pod, f"{line.time} {line.text}" if wish.timestamps else line.text)
    # Lines may go on to a program, and the words must not be among them.
    show_last_words(job, wish, console, console)


def find_logs(job: ClusterJob, missing: Missing, endpoint: str | None) -> list[list[KeptLine]]:
    """Return what the output has of missing logs, or raise NothingKeptError that says what was looked for."""
    if missing.attempt not in started(job):
        raise NothingKeptError(f"{job.ref.name} is {job.phase} and has no pods of {missing.label}: {job.why}")
    gone = (
        f"there is no log of {missing.label} of {job.ref.name}: its pods are gone (spec.ttl removes them after the "
        "end, and so does a deletion, or the loss of their node), and"
    )
    try:
        logs = read_kept(job, missing, endpoint)
    except OutputError as error:
        raise NothingKeptError(f"{gone} {error}") from error
    if not logs:
        raise NothingKeptError(
            f"{gone} {log_prefix(job)}/ has none either: it was removed there, or the process ended before it could "
            "write any; a log collector of the cluster may have it"
        )
    return logs


def show_last_words(job: ClusterJob, wish: Wish, console: Console, out: Console) -> None:
    """Print what status and output tell of the ends of attempts; on `console` what keeps from reading it."""
    attempts = [found for found in job.status.attempts if wish.attempt in {None, found.number}]
    for found in attempts:
        out.print(escape(describe_attempt(found)), soft_wrap=True)
    if job.status.output and any(found.reason and "stacks" in found.message for found in attempts):
        _show_stacks(job.status.output.prefix, wish, console, out)


def describe_attempt(attempt: Attempt) -> str:
    """Return the last word of an attempt."""
    where = f" on {attempt.node}" if attempt.node else ""
    return f"attempt {attempt.number}{where}: {attempt.reason or 'under way'}  {attempt.message}".rstrip()


def _show_stacks(prefix: str, wish: Wish, console: Console, out: Console) -> None:
    try:
        for path, text in read_stacks(prefix, wish.attempt, wish.s3_endpoint):
            out.print(escape(f"{path}\n{text}"), soft_wrap=True)
    except OutputError as error:
        console.print(escape(f"stacks are in {prefix}/{HANGS}/, and {error}"), soft_wrap=True)


def read_stacks(prefix: str, attempt: int | None, endpoint: str | None) -> Iterator[tuple[str, str]]:
    """Yield the files of stacks, of one attempt or of all."""
    wanted = f"{HANGS}/attempt-{attempt}-" if attempt is not None else f"{HANGS}/"
    with open_output(prefix, endpoint) as output:
        for entry in output.list(HANGS):
            if entry.path.startswith(wanted):
                yield f"{prefix}/{entry.path}", output.read(entry.path).decode(errors="replace")
