"""Streams and prints log lines of pods; the trainer writes JSON (docs/logs.md), launchers write plain text."""

import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

from qlora_api.escapes import escape_json, escape_line
from qlora_api.logs.formatters import parse_entry, to_text
from qlora_cli.cluster.client import ClusterClient, ClusterError
from qlora_cli.cluster.pods import TrainerPod
from qlora_cli.console import Console, echo, print_text

_WAITING_LINES: Final = 1000
"""Lines that have not been printed yet; a pod that writes faster waits."""


class LogStreams:
    """Streams the logs of several pods; lines of one pod keep their order."""

    def __init__(self, cluster: ClusterClient, namespace: str, query: Mapping[str, str]) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._query = query
        self._threads: dict[str, threading.Thread] = {}
        self._lines: queue.Queue[tuple[TrainerPod, str]] = queue.Queue(_WAITING_LINES)

    @property
    def running(self) -> bool:
        """Return whether a stream is still open."""
        return any(thread.is_alive() for thread in self._threads.values())

    @property
    def opened(self) -> bool:
        """Return whether any stream was opened."""
        return bool(self._threads)

    def open(self, pods: Iterable[TrainerPod]) -> None:
        """Open streams for the pods that have none."""
        for pod in pods:
            if pod.name not in self._threads:
                thread = threading.Thread(target=self._read, args=(pod,), name=pod.name, daemon=True)
                self._threads[pod.name] = thread
                thread.start()

    def drain(self, show: Callable[[TrainerPod, str], None]) -> None:
        """Pass the lines received so far to `show`."""
        while not self._lines.empty():
            show(*self._lines.get())

    def _read(self, pod: TrainerPod) -> None:
        try:
            for line in self._cluster.log(self._namespace, pod.name, self._query):
                self._lines.put((pod, line))
        except ClusterError as error:
            self._lines.put((pod, f"(log stream ended: {error})"))


_PREFIX_FIELDS: Final = frozenset({"namespace", "job", "attempt", "rank", "updatedAt"})
"""Fields that are redundant with the prefix or the time of a line."""

LABEL_STYLES: Final = ("cyan", "green", "magenta", "yellow", "blue", "red")


class LogLine(NamedTuple):
    """A line, and the rank of the process that wrote it, if known."""

    rank: int | None
    text: str


def parse_line(line: str) -> LogLine:
    """Format a JSON line as text; any other line is returned unchanged."""
    entry = parse_entry(line)
    if entry is None or "message" not in entry:
        return LogLine(None, line)
    rank = entry.get("rank")
    text = to_text({name: value for name, value in entry.items() if name not in _PREFIX_FIELDS})
    return LogLine(rank if isinstance(rank, int) else None, text)


class LogPrinter:
    """Prints lines of several pods to standard output, with a color per process."""

    def __init__(self, *, prefix: bool, raw: bool, console: Console | None = None) -> None:
        self._console = console or Console()
        self._prefix = prefix
        self._raw = raw
        self._styles: dict[str, str] = {}

    def show(self, pod: TrainerPod, line: str) -> None:
        """Print one line."""
        rank, text = LogLine(None, escape_json(line)) if self._raw else parse_line(line)
        label = pod.label if rank is None else f"{pod.label}/{rank}"
        style = self._styles.setdefault(label, LABEL_STYLES[len(self._styles) % len(LABEL_STYLES)])
        prefix = f"{label} | " if self._prefix else ""
        for part in text.split("\n"):
            print_text(self._console, part, prefix, style)

    @staticmethod
    def note(text: str) -> None:
        """Print a message of the command itself to standard error."""
        echo(escape_line(text), err=True)
