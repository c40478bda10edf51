"""What is left of a run whose pods are gone: its logs, the last word of each attempt, the stacks of those that hung."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from qlora_api.logfiles import PREPARE_ATTEMPT, LogFile, log_folder
from qlora_api.logs import time_of
from qlora_api.v1alpha1 import Attempt
from qlora_cli.cluster.client import ClusterError
from qlora_cli.cluster.jobs import ClusterJob
from qlora_cli.cluster.pods import TrainerPod
from qlora_cli.local.output_store import OutputError, open_output_store
from qlora_cli.podlogs.lines import LogPrinter


@dataclass(frozen=True)
class MissingLogs:
    """What no pod can tell: the logs of an attempt, of some nodes or of all."""

    attempt: int
    nodes: frozenset[int] | None = None

    def __contains__(self, file: LogFile) -> bool:
        return file.attempt == self.attempt and (self.nodes is None or file.node in self.nodes)

    @property
    def label(self) -> str:
        """Return what is missing, in words."""
        if self.attempt == PREPARE_ATTEMPT:
            return "the preparation"
        if self.nodes is None:
            return f"attempt {self.attempt}"
        return f"attempt {self.attempt}, node {', '.join(map(str, sorted(self.nodes)))}"


@dataclass(frozen=True, order=True)
class ArchivedLine:
    """A line of a process, with its time and place among all of them."""

    time: str
    file: str
    number: int
    pod: TrainerPod
    text: str


def log_prefix(job: ClusterJob) -> str:
    """Return the URI of the folder with a QLoRAJob's logs."""
    return f"{job.spec().output.uri.rstrip('/')}/{job.ref.name}/{log_folder(job.uid)}"


def started_attempts(job: ClusterJob) -> set[int]:
    """Return the attempts whose pods have run."""
    trained = {found.number for found in job.status.attempts if found.started_at or found.reason}
    prepared = job.finished or trained or job.status.dataset is not None
    return trained | {PREPARE_ATTEMPT} if prepared else set()


def latest_started_attempt(job: ClusterJob) -> int:
    """Return the latest attempt whose pods have run; the preparation before the first one."""
    return max(started_attempts(job), default=PREPARE_ATTEMPT)


def read_archived_logs(job: ClusterJob, missing: MissingLogs, endpoint: str | None) -> list[list[ArchivedLine]]:
    """Return what the output has of missing logs, for each process apart."""
    found = []
    with open_output_store(log_prefix(job), endpoint) as output:
        for entry in output.list():
            file = LogFile.parse(entry.path)
            if file is not None and file in missing:
                found.append(list(parse_log(file, output.read(entry.path))))
    return found


def merge_lines(logs: Iterable[list[ArchivedLine]], tail: int | None) -> list[ArchivedLine]:
    """Return the lines of several processes in the order of time; of each at most so many of the last ones."""
    return list(heapq.merge(*(lines if tail is None else lines[max(len(lines) - tail, 0) :] for lines in logs)))


def parse_log(file: LogFile, raw: bytes) -> Iterator[ArchivedLine]:
    """Yield the lines of a log; one without a time belongs to the one before it."""
    pod = TrainerPod(file.attempt, file.node, file.name, started=True)
    time = ""
    for number, text in enumerate(raw.decode(errors="replace").splitlines()):
        time = max(time, time_of(text))
        yield ArchivedLine(time, file.name, number, pod, text)


STACKS_FOLDER = "hangs"
"""Folder of a result with the stacks of processes that gave no sign of life."""


class NoLogsError(Exception):
    """The output has none of the logs that were looked for; the message says what to do."""


@dataclass(frozen=True)
class LogQuery:
    """What of the logs in the output is asked for, and how to reach it."""

    attempt: int | None
    """None: the latest, and the last words of all."""
    tail: int | None
    timestamps: bool
    s3_endpoint: str | None


def show_archived_logs(
    job: ClusterJob, missing: MissingLogs, wish: LogQuery, printer: LogPrinter, console: Console
) -> None:
    """Print the logs that no pod tells any more, and how the attempts ended; it is an error where there is no log."""
    try:
        logs = find_logs(job, missing, wish.s3_endpoint)
    except NoLogsError as error:
        show_termination_messages(job, wish, console, Console(highlight=False))
        raise ClusterError(str(error)) from error
    console.print(escape(f"no pod tells of {missing.label} any more; from {log_prefix(job)}/:"), soft_wrap=True)
    for line in merge_lines(logs, wish.tail):
        printer.show(line.pod, f"{line.time} {line.text}" if wish.timestamps else line.text)
    # Lines may go on to a program, and the words must not be among them.
    show_termination_messages(job, wish, console, console)


def find_logs(job: ClusterJob, missing: MissingLogs, endpoint: str | None) -> list[list[ArchivedLine]]:
    """Return what the output has of missing logs, or raise NothingKeptError that says what was looked for."""
    if missing.attempt not in started_attempts(job):
        raise NoLogsError(f"{job.ref.name} is {job.phase} and has no pods of {missing.label}: {job.explanation}")
    gone = (
        f"there is no log of {missing.label} of {job.ref.name}: its pods are gone (spec.ttl removes them after the "
        "end, and so does a deletion, or the loss of their node), and"
    )
    try:
        logs = read_archived_logs(job, missing, endpoint)
    except OutputError as error:
        raise NoLogsError(f"{gone} {error}") from error
    if not logs:
        raise NoLogsError(
            f"{gone} {log_prefix(job)}/ has none either: it was removed there, or the process ended before it could "
            "write any; a log collector of the cluster may have it"
        )
    return logs


def show_termination_messages(job: ClusterJob, wish: LogQuery, console: Console, out: Console) -> None:
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


def _show_stacks(prefix: str, wish: LogQuery, console: Console, out: Console) -> None:
    try:
        for path, text in read_stacks(prefix, wish.attempt, wish.s3_endpoint):
            out.print(escape(f"{path}\n{text}"), soft_wrap=True)
    except OutputError as error:
        console.print(escape(f"stacks are in {prefix}/{STACKS_FOLDER}/, and {error}"), soft_wrap=True)


def read_stacks(prefix: str, attempt: int | None, endpoint: str | None) -> Iterator[tuple[str, str]]:
    """Yield the files of stacks, of one attempt or of all."""
    wanted = f"{STACKS_FOLDER}/attempt-{attempt}-" if attempt is not None else f"{STACKS_FOLDER}/"
    with open_output_store(prefix, endpoint) as output:
        for entry in output.list(STACKS_FOLDER):
            if entry.path.startswith(wanted):
                yield f"{prefix}/{entry.path}", output.read(entry.path).decode(errors="replace")
