"""What a process said, kept in the output for those who look when its pod is gone; it never fails or delays a run."""

import json
import logging
import threading
from collections import deque
from typing import Any, Final, Protocol

from qlora_api.logs import JsonFormatter, time_of
from qlora_api.units import MIB
from qlora_api.v1alpha1 import Checkpoint, Progress
from qlora_trainer.runtime.shutdown import StopFlag

HEAD_BYTES: Final = MIB
"""What is kept of the beginning: how the run was set up, and some 2,500 steps."""
TAIL_BYTES: Final = 4 * MIB
"""What is kept of the end: some 10,000 steps, and how it ended."""
MAX_FIELD_CHARACTERS: Final = 16_384
"""Longest field of a line; a longer one, such as an endless traceback, keeps its beginning and its end."""
INTERVAL_SECONDS: Final = 300.0
"""How long a line waits for the next upload where no checkpoint brings one."""
FINAL_UPLOAD_SECONDS: Final = 10.0
"""Longest wait for the last upload; with the last word it is within what torch's launcher gives the other processes."""

log = logging.getLogger(__name__)


class BoundedLog:
    """The first and the last lines, in bounded memory."""

    def __init__(self, first_bytes: int = HEAD_BYTES, last_bytes: int = TAIL_BYTES) -> None:
        self.count = 0
        """Lines so far, with those that were left out."""
        self._first_bytes = first_bytes
        self._limit = last_bytes
        self._left_out, self._left_out_bytes, self._left_out_last = 0, 0, b""
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._head_bytes_left = self._first_bytes
        self._first: list[bytes] = []
        self._last: deque[bytes] = deque()
        self._last_bytes = 0

    def add(self, line: str) -> None:
        """Keep a line; of those in the middle the oldest goes."""
        with self._lock:
            self.count += 1
            self._add(line.encode(errors="replace") + b"\n")

    def prepend(self, earlier: bytes) -> None:
        """Put an earlier log before all that was said so far."""
        with self._lock:
            said = [*self._first, *self._last]
            self._clear()
            for raw in [*earlier.splitlines(keepends=True), *said]:
                self._add(raw)

    def _add(self, raw: bytes) -> None:
        if len(raw) <= self._head_bytes_left:
            self._first.append(raw)
            self._head_bytes_left -= len(raw)
            return
        self._head_bytes_left = 0
        self._last.append(raw)
        self._last_bytes += len(raw)
        while self._last_bytes > self._limit:
            self._drop(self._last.popleft())

    def _drop(self, raw: bytes) -> None:
        self._left_out += 1
        self._left_out_bytes += len(raw)
        self._left_out_last = raw
        self._last_bytes -= len(raw)

    def text(self) -> bytes:
        """Return the lines, with one that tells how many are left out."""
        with self._lock:
            return b"".join([*self._first, *self._omission_line(), *self._last])

    def _omission_line(self) -> list[bytes]:
        if not self._left_out:
            return []
        told = {
            "time": time_of(self._left_out_last.decode(errors="replace")),
            "level": "warning",
            "logger": __name__,
            "message": f"{self._left_out:,} lines ({self._left_out_bytes:,} bytes) are left out here: of a long log "
            "the output has the beginning and the end",
        }
        return [json.dumps(told).encode() + b"\n"]


def shorten(line: str) -> str:
    """Return a line of JSON whose fields have a bounded length."""
    if len(line) <= MAX_FIELD_CHARACTERS:
        return line
    return json.dumps({name: _shortened(value) for name, value in json.loads(line).items()}, ensure_ascii=False)


def _shortened(value: Any) -> Any:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= MAX_FIELD_CHARACTERS:
        return value
    half = MAX_FIELD_CHARACTERS // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters are left out … {text[-half:]}"


class TeeHandler(logging.Handler):
    """Writes every line to standard output and into the logbook: in one order, and to both though a stop comes between.

    A stop that is raised in the middle of a handler would be taken for the handler's own error, and forgotten.
    """

    def __init__(self, output: logging.Handler, log_uploader: "LogUploader", stop: StopFlag) -> None:
        super().__init__()
        self._handlers = (output, log_uploader)
        self._stop = stop

    def handle(self, record: logging.LogRecord) -> bool:
        """Write a line; the handler's lock is for one thread at a time."""
        with self._stop.delayed():
            return super().handle(record)

    def emit(self, record: logging.LogRecord) -> None:
        """Hand the line on."""
        for handler in self._handlers:
            handler.handle(record)


class LogTarget(Protocol):
    """One object of the output."""

    def read_existing(self) -> bytes:
        """Return what is there: a queue may stop an attempt and start it again, and its second pod goes on there."""

    def put(self, text: bytes) -> object:
        """Write the object."""


class LogUploader(logging.Handler):
    """Collects every line of this process, and uploads them from a thread of its own.

    It hears the progress as any sink does: what was said before a checkpoint is to be as safe as the checkpoint.
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
        """Keep a line; what it says is free of secrets already, as on standard output."""
        try:
            self._bounded_log.add(shorten(self.format(record)))
        except Exception:
            self.handleError(record)

    def start(self, target: LogTarget) -> None:
        """From now on, write all that was said so far into the output from time to time."""
        self._target = target
        self._thread = threading.Thread(target=self._work, name="logbook", daemon=True)
        self._thread.start()

    def report(self, progress: Progress) -> None:
        """Upload beside the run when there is a new checkpoint."""
        if progress.checkpoint is not None and progress.checkpoint != self._checkpoint:
            self._checkpoint = progress.checkpoint
            with self._wakeup:
                self._upload_due = True
                self._wakeup.notify()

    def note(self, text: str) -> None:
        """Leave sentences to the log."""

    def finish(self, seconds: float = FINAL_UPLOAD_SECONDS) -> None:
        """Upload what is left, in bounded time; the process ends after this."""
        if self._thread is None:
            return
        with self._wakeup:
            self._finishing = True
            self._wakeup.notify()
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn_once(f"the end of the log is not in the output: it could not be written within {seconds:g} s")

    def _work(self) -> None:
        over = False
        while not over:
            with self._wakeup:
                self._wakeup.wait_for(lambda: self._upload_due or self._finishing, self._interval)
                self._upload_due, over = False, self._finishing
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
            # Whatever it is: the run is worth more than its log, which standard output has as well.
            self._warn_once(f"the log is not in the output: {error}")
        else:
            self._uploaded = count

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning(text)
