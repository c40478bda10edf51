"""Progress reports to the operator over HTTP and to the log; a lost report never delays or fails a step."""

import logging
import math
import os
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol, Self

from qlora_api.logs.formatters import log_fields
from qlora_api.names import PROGRESS_TOKEN_ENV, PROGRESS_URL_ENV, Phase
from qlora_api.progress import ProgressReport, ReportedMetric, TrainerStatus
from qlora_api.v1alpha1 import Checkpoint, ManifestRef, Progress

LogFn = Callable[[str], None]


def no_log(_: str) -> None:
    """Discard a log message."""


CA_ENV: Final = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
"""Path of the CA certificate for an https endpoint."""
INTERVAL_SECONDS: Final = 5.0
"""Minimum time between two reports of a phase, as in transformers' KubeflowCallback."""
_CHECKPOINT_SECONDS: Final = 1.0
"""Minimum time before the report of a new checkpoint or manifest: the next attempt believes only what was reported,
and the operator accepts a report each second."""
HEARTBEAT_SECONDS: Final = 30.0
"""Time between two heartbeats while there is no progress to report."""
_TIMEOUT_SECONDS: Final = 5.0

log = logging.getLogger(__name__)


class ProgressSink(Protocol):
    """Receiver of progress and log messages."""

    def report(self, progress: Progress) -> None:
        """Receive progress; never raises, never blocks."""

    def note(self, text: str) -> None:
        """Receive a log message; never raises, never blocks."""


class LogSink:
    """Writes progress to the log."""

    def report(self, progress: Progress) -> None:
        """Log the progress as one line."""
        log.info("progress", extra=log_fields(**progress.model_dump(mode="json", by_alias=True, exclude_none=True)))

    def note(self, text: str) -> None:
        """Log the message."""
        log.info(text)


class Sinks:
    """Forwards to several sinks."""

    def __init__(self, sinks: Sequence[ProgressSink]) -> None:
        self._sinks = tuple(sinks)

    def report(self, progress: Progress) -> None:
        """Report to each sink."""
        for sink in self._sinks:
            sink.report(progress)

    def note(self, text: str) -> None:
        """Pass the message to each sink."""
        for sink in self._sinks:
            sink.note(text)


class Heartbeat:
    """Repeats the last progress during downloads, evaluations and uploads, which report none of their own.

    It does not repeat it between steps: there progress is expected, and a hang is detected by its absence.
    """

    def __init__(self, sink: ProgressSink, seconds: float = HEARTBEAT_SECONDS) -> None:
        self._sink = sink
        self._seconds = seconds
        self._latest: Progress | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def report(self, progress: Progress) -> None:
        """Forward the progress, and remember it."""
        self._latest = progress
        self._sink.report(progress)

    def note(self, text: str) -> None:
        """Forward the message."""
        self._sink.note(text)

    def repeat(self, now: datetime) -> None:
        """Report the last progress again, unless training steps are running."""
        latest = self._latest
        if latest is not None and (latest.phase is not Phase.TRAINING or latest.loss is None):
            self._sink.report(latest.model_copy(update={"updated_at": now}))

    def _work(self) -> None:
        while not self._closed.wait(self._seconds):
            self.repeat(datetime.now(UTC))


def to_body(progress: Progress) -> bytes:
    """Return the request body of Kubeflow Trainer's status protocol, in which numbers are strings."""
    values = {
        "current_step": progress.step,
        "total_steps": progress.total_steps,
        "loss": progress.loss,
        "tokens_per_second": progress.tokens_per_second,
        "phase": progress.phase,
        **_prefixed("checkpoint", progress.checkpoint),
        **_prefixed("manifest", progress.manifest),
    }
    status = TrainerStatus(
        progress_percentage=progress.percent,
        estimated_remaining_seconds=progress.remaining_seconds,
        metrics=tuple(
            ReportedMetric(name=name, value=str(value)) for name, value in values.items() if value is not None
        ),
        last_updated_time=progress.updated_at,
    )
    report = ProgressReport(trainer_status=status)
    return report.model_dump_json(by_alias=True, exclude_none=True).encode()


def _prefixed(prefix: str, reported: Checkpoint | ManifestRef | None) -> dict[str, object]:
    if reported is None:
        return {}
    return {f"{prefix}_{name}": value for name, value in reported.model_dump(mode="json").items()}


class DeliveredReports:
    """What the operator knows, because a report of it was accepted."""

    def __init__(self) -> None:
        self.checkpoint = ""
        """Folder name of the newest checkpoint."""

    def record(self, progress: Progress) -> None:
        """Record an accepted report."""
        if progress.checkpoint is not None:
            self.checkpoint = progress.checkpoint.uri.rpartition("/")[2]


DELIVERED: Final = DeliveredReports()
"""Of this process."""


class HttpSink:
    """Posts the latest progress from a background thread."""

    def __init__(self, url: str, token_file: Path | None, ca_file: Path | None = None) -> None:
        self._url = url
        self._token_file = token_file
        self._context = ssl.create_default_context(cafile=ca_file) if ca_file else None
        self._pending: Progress | None = None
        self._posted: Progress | None = None
        self._posted_at = -math.inf
        self._closed = False
        self._wakeup = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="progress", daemon=True)
        self._thread.start()

    @classmethod
    def from_environment(cls) -> "HttpSink | None":
        """Return the sink configured by the pod's environment; None without a URL."""
        url = os.environ.get(PROGRESS_URL_ENV)
        if not url:
            return None
        token, authority = os.environ.get(PROGRESS_TOKEN_ENV), os.environ.get(CA_ENV)
        return cls(url, Path(token) if token else None, Path(authority) if authority else None)

    def report(self, progress: Progress) -> None:
        """Queue the progress for the next post; it replaces one that is still queued."""
        with self._wakeup:
            self._pending = progress
            self._wakeup.notify()

    def note(self, text: str) -> None:
        """Ignore log messages: the protocol has numbers only."""

    def close(self) -> None:
        """Post the queued progress, and end the thread."""
        with self._wakeup:
            self._closed = True
            self._wakeup.notify()
        self._thread.join(timeout=2 * _TIMEOUT_SECONDS)

    def _work(self) -> None:
        while (progress := self._next_report()) is not None:
            self._post(progress)

    def _next_report(self) -> Progress | None:
        """Wait for progress to post, at most one per interval; None when closed."""
        with self._wakeup:
            while True:
                waiting = self._pending
                left = self._posted_at + self._interval(waiting) - time.monotonic() if waiting else math.inf
                if waiting is not None and (left <= 0 or self._closed):
                    self._pending, self._posted, self._posted_at = None, waiting, time.monotonic()
                    return waiting
                if self._closed:
                    return None
                self._wakeup.wait(left if waiting is not None else None)

    def _interval(self, progress: Progress) -> float:
        """Return the seconds that must have passed since the last post."""
        if self._posted is None or progress.phase != self._posted.phase:
            return 0.0
        posted = (self._posted.checkpoint, self._posted.manifest)
        return INTERVAL_SECONDS if (progress.checkpoint, progress.manifest) == posted else _CHECKPOINT_SECONDS

    def _post(self, progress: Progress) -> None:
        headers = {"Content-Type": "application/json"}
        try:
            if self._token_file is not None:
                # Read each time: the kubelet replaces the token well before it expires.
                headers["Authorization"] = f"Bearer {self._token_file.read_text().strip()}"
            # The URL is the operator's, from the pod's own environment.
            request = urllib.request.Request(self._url, data=to_body(progress), headers=headers, method="POST")  # noqa: S310
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS, context=self._context):  # noqa: S310
                DELIVERED.record(progress)
        except (OSError, ValueError) as error:
            log.info("progress was not delivered", extra=log_fields(error=str(error)))
