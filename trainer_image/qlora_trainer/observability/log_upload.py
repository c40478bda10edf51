"""Uploads a process's log to the output, so that it outlives the pod; an upload never fails or delays a run."""

import json
import logging
import threading
from collections import deque
from typing import Any, Final, Protocol

from qlora_api.logs.formatters import JsonFormatter, time_of, to_json_line
from qlora_api.units import MIB
from qlora_api.v1alpha1 import Checkpoint, Progress
from qlora_trainer.runtime.shutdown import StopFlag

HEAD_BYTES: Final = MIB
"""Size of the head: the setup, and some 2,500 steps."""
TAIL_BYTES: Final = 4 * MIB
"""Size of the tail: some 10,000 steps, and how the run ended."""
MAX_FIELD_CHARACTERS: Final = 16_384
"""Longest field of a line; of a longer one, such as a huge traceback, only head and tail are kept."""
INTERVAL_SECONDS: Final = 300.0
"""Time between uploads, unless a checkpoint triggers one earlier."""
FINAL_UPLOAD_SECONDS: Final = 10.0
"""Longest wait for the final upload; with the termination message it fits into the 30 s that torch's launcher gives
the other workers."""

log = logging.getLogger(__name__)


class BoundedLog:
    """Head and tail of a log, in bounded memory."""

    def __init__(self, first_bytes: int = HEAD_BYTES, last_bytes: int = TAIL_BYTES) -> None:
        self.count = 0
        """Number of lines so far, including omitted ones."""
        self._head_limit = first_bytes
        self._tail_limit = last_bytes
        self._omitted, self._omitted_bytes, self._last_omitted = 0, 0, b""
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._head_bytes_left = self._head_limit
        self._head: list[bytes] = []
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0

    def add(self, line: str) -> None:
        """Append a line; when the tail is full, its oldest line is dropped."""
        with self._lock:
            self.count += 1
            self._add(line.encode(errors="replace") + b"\n")

    def prepend(self, earlier: bytes) -> None:
        """Insert the log of an earlier pod before all lines so far."""
        with self._lock:
            lines = [*self._head, *self._tail]
            self._clear()
            for raw in [*earlier.splitlines(keepends=True), *lines]:
                self._add(raw)

    def _add(self, raw: bytes) -> None:
        if len(raw) <= self._head_bytes_left:
            self._head.append(raw)
            self._head_bytes_left -= len(raw)
            return
        self._head_bytes_left = 0
        self._tail.append(raw)
        self._tail_bytes += len(raw)
        while self._tail_bytes > self._tail_limit:
            self._drop(self._tail.popleft())

    def _drop(self, raw: bytes) -> None:
        self._omitted += 1
        self._omitted_bytes += len(raw)
        self._last_omitted = raw
        self._tail_bytes -= len(raw)

    def text(self) -> bytes:
        """Return the lines, with a line in the gap that has the number of omitted ones."""
        with self._lock:
            return b"".join([*self._head, *self._omission_line(), *self._tail])

    def _omission_line(self) -> list[bytes]:
        if not self._omitted:
            return []
        entry = {
            "time": time_of(self._last_omitted.decode(errors="replace")),
            "level": "warning",
            "logger": __name__,
            "message": f"{self._omitted:,} lines ({self._omitted_bytes:,} bytes) omitted: a long log is uploaded with "
            "its head and tail only",
        }
        return [json.dumps(entry).encode() + b"\n"]


def shorten(line: str) -> str:
    """Return a JSON line with every field shortened to a bounded length."""
    if len(line) <= MAX_FIELD_CHARACTERS:
        return line
    return to_json_line({name: _shortened(value) for name, value in json.loads(line).items()})


def _shortened(value: Any) -> Any:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= MAX_FIELD_CHARACTERS:
        return value
    half = MAX_FIELD_CHARACTERS // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters omitted … {text[-half:]}"


class TeeHandler(logging.Handler):
    """Writes every line to standard output and to the uploader, in the same order, even if SIGTERM arrives in between.

    A stop raised inside a handler would be treated as that handler's error, and be lost.
    """

    def __init__(self, output: logging.Handler, log_uploader: "LogUploader", stop: StopFlag) -> None:
        super().__init__()
        self._handlers = (output, log_uploader)
        self._stop = stop

    def handle(self, record: logging.LogRecord) -> bool:
        """Write a line, with signals delayed; the handler's lock serializes threads."""
        with self._stop.delayed():
            return super().handle(record)

    def emit(self, record: logging.LogRecord) -> None:
        """Pass the line to both handlers."""
        for handler in self._handlers:
            handler.handle(record)


class LogTarget(Protocol):
    """The object that the log is written to."""

    def read_existing(self) -> bytes:
        """Return the existing content: after a requeue, the second pod of an attempt appends to the first one's log."""

    def put(self, text: bytes) -> object:
        """Write the object."""


class LogUploader(logging.Handler):
    """Collects every log line of this process, and uploads them from a thread.

    It is a progress sink too: each new checkpoint triggers an upload, so that the log is as safe as the checkpoint.
    """

    def __init__(self, interval: float = INTERVAL_SECONDS) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self._bounded_log = BoundedLog()
        self._interval = interval
        self._target: LogTarget | None = None
        self._thread: threading.Thread | None = None
        self._wakeup = threading.Condition()
        self._upload_due = self._finishing = self._warned = self._existing_prepended = False
        self._uploaded = 0
        self._checkpoint: Checkpoint | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Collect a line; secrets are redacted, as on standard output."""
        try:
            self._bounded_log.add(shorten(self.format(record)))
        except Exception:
            self.handleError(record)

    def start(self, target: LogTarget) -> None:
        """Start to upload periodically, including all lines so far."""
        self._target = target
        self._thread = threading.Thread(target=self._work, name="log-upload", daemon=True)
        self._thread.start()

    def report(self, progress: Progress) -> None:
        """Trigger an upload for a new checkpoint."""
        if progress.checkpoint is not None and progress.checkpoint != self._checkpoint:
            self._checkpoint = progress.checkpoint
            with self._wakeup:
                self._upload_due = True
                self._wakeup.notify()

    def note(self, text: str) -> None:
        """Ignore log messages; they arrive through `emit`."""

    def finish(self, seconds: float = FINAL_UPLOAD_SECONDS) -> None:
        """Upload the remaining lines, in bounded time, before the process exits."""
        if self._thread is None:
            return
        with self._wakeup:
            self._finishing = True
            self._wakeup.notify()
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn_once(f"the end of the log was not uploaded within {seconds:g} s")

    def _work(self) -> None:
        finishing = False
        while not finishing:
            with self._wakeup:
                self._wakeup.wait_for(lambda: self._upload_due or self._finishing, self._interval)
                self._upload_due, finishing = False, self._finishing
            self._upload()

    def _upload(self) -> None:
        count = self._bounded_log.count
        if self._target is None or count == self._uploaded:
            return
        try:
            if not self._existing_prepended:
                self._bounded_log.prepend(self._target.read_existing())
                self._existing_prepended = True
            self._target.put(self._bounded_log.text())
        except Exception as error:
            # A failed upload must never end a run, and standard output has the log as well.
            self._warn_once(f"the log was not uploaded: {error}")
        else:
            self._uploaded = count

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning(text)
