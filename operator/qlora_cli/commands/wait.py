"""`qlora wait`: waits until runs have ended; the exit code says how."""

from collections.abc import Callable, Iterable
from typing import Annotated, Final

import typer

from qlora_api.job_ref import JobRef
from qlora_api.names import Phase
from qlora_api.units import SECONDS
from qlora_cli.cluster.client import ClusterClient
from qlora_cli.cluster.connection import (
    Context,
    Kubeconfig,
    Namespace,
    complete_names,
    exit_on_cluster_error,
    open_connection,
)
from qlora_cli.cluster.jobs import ClusterJob
from qlora_cli.cluster.polling import Clock, poll_job
from qlora_cli.console import Console, print_line

FAILED_EXIT_CODE: Final = 3
"""Exit code: a run has failed."""
TIMED_OUT_EXIT_CODE: Final = 124
"""Exit code: --timeout has expired and a run has not ended; the same as of timeout(1)."""


class TimedOutError(Exception):
    """The timeout has expired, and the run has not ended."""


def parse_seconds(text: str) -> float:
    """Parse a duration such as 90, 90s, 30m, 24h or 7d into seconds."""
    number, unit = (text[:-1], SECONDS[text[-1]]) if text[-1:] in SECONDS else (text, 1)
    try:
        return float(number) * unit
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a duration; write a number and a unit: 90s, 30m, 24h or 7d"
        ) from None


Timeout = Annotated[
    float | None,
    typer.Option(parser=parse_seconds, metavar="DURATION", help="Longest wait, such as 30m; default: no limit."),
]


def wait(
    jobs: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Names of QLoRAJobs.", autocompletion=complete_names)
    ],
    timeout: Timeout = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Wait until runs have ended. Exit code 0: all succeeded; 3: one failed; 124: timed out; 1: an error."""
    with exit_on_cluster_error() as console:
        connection = open_connection(namespace, context, kubeconfig)
        refs = [connection.ref(name) for name in jobs]
        raise typer.Exit(wait_for_all(connection.cluster, refs, timeout, Clock(), console))


def wait_for_all(
    cluster: ClusterClient, refs: Iterable[JobRef], timeout: float | None, clock: Clock, console: Console
) -> int:
    """Wait for each run, print how it ended, and return the exit code."""
    deadline = None if timeout is None else clock.now() + timeout
    code = 0
    for ref in refs:
        try:
            job = wait_for_end(cluster, ref, deadline, clock, lambda text: _print(console, text))
        except TimedOutError as error:
            _print(console, str(error))
            return TIMED_OUT_EXIT_CODE
        _print(console, describe_end(job))
        code = code if job.succeeded else FAILED_EXIT_CODE
    return code


def wait_for_end(
    cluster: ClusterClient, ref: JobRef, deadline: float | None, clock: Clock, note: Callable[[str], None]
) -> ClusterJob:
    """Return a QLoRAJob once it has ended; report each phase to `note`."""
    return wait_until(lambda job: job.finished, cluster, ref, deadline, clock, note)


def wait_until(  # noqa: PLR0913, PLR0917 (condition, QLoRAJob, deadline, clock, output)
    condition: Callable[[ClusterJob], bool],
    cluster: ClusterClient,
    ref: JobRef,
    deadline: float | None,
    clock: Clock,
    note: Callable[[str], None],
) -> ClusterJob:
    """Return a QLoRAJob once a condition holds; report each phase to `note`.

    Args:
        condition: What to wait for.
        cluster: The cluster.
        ref: The QLoRAJob.
        deadline: Time of the clock at which to give up; None: never.
        clock: Time and sleep.
        note: Receives one line per phase.

    Raises:
        TimedOutError: The deadline has passed.

    """
    phase: Phase | None = None
    for job in poll_job(cluster, ref, clock, note):
        if condition(job):
            return job
        if job.phase is not phase:
            phase = job.phase
            note(f"{ref.name} {phase}")
        if deadline is not None and clock.now() >= deadline:
            raise TimedOutError(f"{ref.name} is still {phase}")
    raise AssertionError  # the loop has no other end


def describe_end(job: ClusterJob) -> str:
    """Return how a run ended, with the cause and the fix if it failed."""
    return f"{job.ref.name} {job.phase} ({job.status.reason}): {job.explanation}"


def _print(console: Console, text: str) -> None:
    print_line(console, text)
