"""Logs of pods that are gone, as their processes left them in the output."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qlora_api.logfiles import PREPARATION, LogFile, log_folder
from qlora_api.logs import time_of
from qlora_cli.jobs import ClusterJob
from qlora_cli.pods import TrainerPod
from qlora_cli.results import open_output


@dataclass(frozen=True)
class Missing:
    """What no pod can tell: the logs of an attempt, of some nodes or of all."""

    attempt: int
    nodes: frozenset[int] | None = None

    def __contains__(self, file: LogFile) -> bool:
        return file.attempt == self.attempt and (self.nodes is None or file.node in self.nodes)

    @property
    def label(self) -> str:
        """Return what is missing, in words."""
        if self.attempt == PREPARATION:
            return "the preparation"
        if self.nodes is None:
            return f"attempt {self.attempt}"
        return f"attempt {self.attempt}, node {', '.join(map(str, sorted(self.nodes)))}"


@dataclass(frozen=True, order=True)
class KeptLine:
    """A line of a process, with its time and place among all of them."""

    time: str
    file: str
    number: int
    pod: TrainerPod
    text: str


def log_prefix(job: ClusterJob) -> str:
    """Return the URI of the folder with a QLoRAJob's logs."""
    return f"{job.spec().output.uri.rstrip('/')}/{job.ref.name}/{log_folder(job.uid)}"


def started(job: ClusterJob) -> set[int]:
    """Return the attempts whose pods have run."""
    trained = {found.number for found in job.status.attempts if found.started_at or found.reason}
    prepared = job.finished or trained or job.status.dataset is not None
    return trained | {PREPARATION} if prepared else set()


def latest_started(job: ClusterJob) -> int:
    """Return the latest attempt whose pods have run; the preparation before the first one."""
    return max(started(job), default=PREPARATION)


def read_kept(job: ClusterJob, missing: Missing, endpoint: str | None) -> list[list[KeptLine]]:
    """Return what the output has of missing logs, for each process apart."""
    found = []
    with open_output(log_prefix(job), endpoint) as output:
        for entry in output.list():
            file = LogFile.read(entry.path)
            if file is not None and file in missing:
                found.append(list(parse_log(file, output.read(entry.path))))
    return found


def merge(logs: Iterable[list[KeptLine]], tail: int | None) -> list[KeptLine]:
    """Return the lines of several processes in the order of time; of each at most so many of the last ones."""
    return list(heapq.merge(*(lines if tail is None else lines[max(len(lines) - tail, 0) :] for lines in logs)))


def parse_log(file: LogFile, raw: bytes) -> Iterator[KeptLine]:
    """Yield the lines of a log; one without a time belongs to the one before it."""
    pod = TrainerPod(file.attempt, file.node, file.name, started=True)
    time = ""
    for number, text in enumerate(raw.decode(errors="replace").splitlines()):
        time = max(time, time_of(text))
        yield KeptLine(time, file.name, number, pod, text)
