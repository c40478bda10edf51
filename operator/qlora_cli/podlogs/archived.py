"""Logs of runs whose pods are gone: from the output, with termination messages and stack dumps of hung processes."""

import heapq
import mmap
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from qlora_api.logs.files import PREPARE_ATTEMPT, LogFile, log_folder
from qlora_api.logs.formatters import time_of
from qlora_api.units import GIB
from qlora_api.v1alpha1 import Attempt
from qlora_cli.cluster.client import ClusterError
from qlora_cli.cluster.jobs import ClusterJob
from qlora_cli.cluster.pods import TrainerPod
from qlora_cli.console import Console, print_line, print_text
from qlora_cli.local.output_store import MAX_LOG_BYTES, OutputError, open_output_store
from qlora_cli.podlogs.lines import LogPrinter

MAX_LOGS_BYTES: Final = GIB
"""Logs of one attempt that are read: 5 MiB of each process, of which there are a hundred or so."""
_LINE: Final = re.compile(rb"([^\r\n]*)(?:\r\n|\r|\n|\Z)")


@dataclass(frozen=True)
class MissingLogs:
    """Logs that cannot be read from pods: of an attempt, of some nodes or of all."""

    attempt: int
    nodes: frozenset[int] | None = None

    def __contains__(self, file: LogFile) -> bool:
        return file.attempt == self.attempt and (self.nodes is None or file.node in self.nodes)

    @property
    def label(self) -> str:
        """Return a description, such as "attempt 2, node 0, 1"."""
        if self.attempt == PREPARE_ATTEMPT:
            return "preparation"
        if self.nodes is None:
            return f"attempt {self.attempt}"
        return f"attempt {self.attempt}, node {', '.join(map(str, sorted(self.nodes)))}"


@dataclass(frozen=True, order=True)
class ArchivedLine:
    """A log line of a process; lines sort by time, file and line number."""

    time: str
    file: str
    number: int
    pod: TrainerPod
    text: str


def _ignore(_: str) -> None:
    """Skip an object with a refused name: it is no log, like every other that is not named as one."""


def log_prefix(job: ClusterJob) -> str:
    """Return the URI of the folder with a QLoRAJob's logs."""
    return f"{job.spec().output.uri.rstrip('/')}/{job.ref.name}/{log_folder(job.uid)}"


def started_attempts(job: ClusterJob) -> set[int]:
    """Return the attempts whose pods have started."""
    trained = {found.number for found in job.status.attempts if found.started_at or found.reason}
    prepared = job.finished or trained or job.status.dataset is not None
    return trained | {PREPARE_ATTEMPT} if prepared else set()


def latest_started_attempt(job: ClusterJob) -> int:
    """Return the latest attempt whose pods have started; PREPARE_ATTEMPT if there is none."""
    return max(started_attempts(job), default=PREPARE_ATTEMPT)


def read_archived_logs(
    job: ClusterJob, missing: MissingLogs, endpoint: str | None, note: Callable[[str], None] = _ignore
) -> list[Iterator[ArchivedLine]]:
    """Return the missing logs that the output has, the lines of each process.

    Args:
        job: The run.
        missing: The logs to read.
        endpoint: URL of an S3-compatible server; None: AWS.
        note: Called with a message about each log that is too large to be one of the trainer: it hides no other.

    """
    found, left = [], MAX_LOGS_BYTES
    with open_output_store(log_prefix(job), endpoint) as output:
        for entry in output.list("", _ignore):
            file = LogFile.parse(entry.path)
            if file is None or file not in missing:
                continue
            if entry.size > min(MAX_LOG_BYTES, left):
                uri, limit = (
                    f"{log_prefix(job)}/{entry.path}",
                    MAX_LOG_BYTES if left > MAX_LOG_BYTES else MAX_LOGS_BYTES,
                )
                whole = "" if limit == MAX_LOG_BYTES else " with the logs before it"
                note(f"{uri} is left out: it has more than {limit:,} bytes{whole}; download it")
                continue
            left -= entry.size
            found.append(parse_log(file, _map(output.read(entry.path, MAX_LOG_BYTES))))
    return found


def _map(raw: bytes) -> bytes | mmap.mmap:
    """Return the content of a log, in a file without a name: those of an attempt would fill the memory."""
    if not raw:
        return raw
    with tempfile.TemporaryFile() as file:
        file.write(raw)
        file.flush()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def merge_lines(logs: Iterable[Iterator[ArchivedLine]], tail: int | None) -> Iterator[ArchivedLine]:
    """Merge the lines of several processes by time; of each process only the last `tail` lines."""
    return heapq.merge(*(lines if tail is None else deque(lines, maxlen=tail) for lines in logs))


def parse_log(file: LogFile, raw: bytes | mmap.mmap) -> Iterator[ArchivedLine]:
    """Yield the lines of a log; a line without a time gets that of the line before it."""
    pod = TrainerPod(file.attempt, file.node, file.name, started=True)
    time = ""
    # One line at a time: a log of line breaks only has a hundred times its size as a list of lines.
    for number, match in enumerate(_LINE.finditer(raw)):
        if match.start() == len(raw):
            return
        text = match[1].decode(errors="replace")
        time = max(time, time_of(text))
        yield ArchivedLine(time, file.name, number, pod, text)


STACKS_FOLDER = "hangs"
"""Folder of a result with the stack dumps of processes that stopped sending heartbeats."""


class NoLogsError(Exception):
    """The output has none of the missing logs; the message says why."""


@dataclass(frozen=True)
class LogQuery:
    """Which archived logs to show, and how to reach the output."""

    attempt: int | None
    """None: the logs of the latest attempt, and the termination messages of all."""
    tail: int | None
    timestamps: bool
    s3_endpoint: str | None


def show_archived_logs(
    job: ClusterJob, missing: MissingLogs, query: LogQuery, printer: LogPrinter, console: Console
) -> None:
    """Print archived logs, and how the attempts ended.

    Raises:
        ClusterError: The output has none of the missing logs.

    """
    try:
        logs = find_logs(job, missing, query.s3_endpoint, lambda text: print_line(console, text))
    except NoLogsError as error:
        show_termination_messages(job, query, console, Console())
        raise ClusterError(str(error)) from error
    print_line(console, f"the pods of {missing.label} are gone; logs archived in {log_prefix(job)}/:")
    for line in merge_lines(logs, query.tail):
        printer.show(line.pod, f"{line.time} {line.text}" if query.timestamps else line.text)
    # To standard error: the log lines on standard output may be piped into a program.
    show_termination_messages(job, query, console, console)


def find_logs(
    job: ClusterJob, missing: MissingLogs, endpoint: str | None, note: Callable[[str], None] = _ignore
) -> list[Iterator[ArchivedLine]]:
    """Return the missing logs that the output has, the lines of each process.

    Raises:
        NoLogsError: The attempt has not started, or the output has none of its logs.

    """
    if missing.attempt not in started_attempts(job):
        raise NoLogsError(f"{job.ref.name} is {job.phase} and has no pods of {missing.label}: {job.explanation}")
    gone = (
        f"no log of {missing.label} of {job.ref.name}: its pods are gone (deleted, removed after spec.ttl, or lost "
        "with their node), and"
    )
    left_out: list[str] = []
    try:
        logs = read_archived_logs(job, missing, endpoint, left_out.append)
    except OutputError as error:
        raise NoLogsError(f"{gone} {error}") from error
    if not logs and left_out:
        raise NoLogsError(f"{gone} {left_out[0]}")
    for text in left_out:
        note(text)
    if not logs:
        raise NoLogsError(
            f"{gone} {log_prefix(job)}/ has no archived log: it was deleted, or the process exited before its first "
            "upload; a log collector of the cluster may have it"
        )
    return logs


def show_termination_messages(job: ClusterJob, query: LogQuery, console: Console, out: Console) -> None:
    """Print how attempts ended, and the stack dumps of hung processes, to `out`; errors go to `console`."""
    attempts = [found for found in job.status.attempts if query.attempt in {None, found.number}]
    for found in attempts:
        print_line(out, describe_attempt(found))
    if job.status.output and any(found.reason and "stacks" in found.message for found in attempts):
        _show_stacks(job.status.output.prefix, query, console, out)


def describe_attempt(attempt: Attempt) -> str:
    """Return how an attempt ended, on one line."""
    node = f" on {attempt.node}" if attempt.node else ""
    return f"attempt {attempt.number}{node}: {attempt.reason or 'running'}  {attempt.message}".rstrip()


def _show_stacks(prefix: str, query: LogQuery, console: Console, out: Console) -> None:
    try:
        for path, text in read_stacks(prefix, query.attempt, query.s3_endpoint):
            print_line(out, path)
            print_text(out, text)
    except OutputError as error:
        print_line(console, f"stack dumps are in {prefix}/{STACKS_FOLDER}/, but {error}")


def read_stacks(prefix: str, attempt: int | None, endpoint: str | None) -> Iterator[tuple[str, str]]:
    """Yield the URI and text of stack dumps, of one attempt or of all."""
    wanted = f"{STACKS_FOLDER}/attempt-{attempt}-" if attempt is not None else f"{STACKS_FOLDER}/"
    with open_output_store(prefix, endpoint) as output:
        for entry in output.list(STACKS_FOLDER, _ignore):
            if entry.path.startswith(wanted):
                yield f"{prefix}/{entry.path}", output.read(entry.path, MAX_LOG_BYTES).decode(errors="replace")
