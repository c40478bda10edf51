"""The pod's termination message: one line of JSON that the kubelet passes to the operator."""

import contextlib
import threading
from pathlib import Path

from qlora_api.logs.redaction import REDACTOR
from qlora_api.names import TERMINATION_MESSAGE_BYTES
from qlora_api.report import TerminationMessage
from qlora_api.v1alpha1 import Checkpoint, Progress
from qlora_trainer.errors import RunError

_ELLIPSIS = "…"
_SHARED_BYTES = 1024
"""What the kubelet leaves of a message in a pod of twelve containers: it keeps 12 KiB for all of them."""


def failure_message(error: RunError, checkpoint: Checkpoint | None = None) -> TerminationMessage:
    """Return the termination message of a failed run."""
    return TerminationMessage(reason=error.reason, message=error.message, step=error.step, checkpoint=checkpoint)


class TerminationMessageWriter:
    """Writes a process's termination message exactly once: only the first of several threads that fail counts.

    It is a progress sink too, so that the message of a failed run has the newest checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checkpoint: Checkpoint | None = None
        self._step: int | None = None
        self._lock = threading.Lock()
        self._written = False

    def report(self, progress: Progress) -> None:
        """Remember step and checkpoint."""
        self._checkpoint, self._step = progress.checkpoint, progress.step

    def note(self, text: str) -> None:
        """Ignore log messages."""

    def write_failure(self, error: RunError) -> None:
        """Write the reason of a failure."""
        message = failure_message(error, self._checkpoint)
        self.write(message if message.step is not None else message.model_copy(update={"step": self._step}))

    def write(self, message: TerminationMessage) -> None:
        """Write the message, unless one was written."""
        with self._lock:
            if not self._written:
                self._written = True
                write_termination_message(message, self._path)


def to_json_line(message: TerminationMessage, limit: int = TERMINATION_MESSAGE_BYTES) -> str:
    """Return JSON of at most `limit` bytes; without URIs that the operator knows, and with a shorter text, if needed.

    What remains is bounded by the models: 2 KiB of the model's configuration, and numbers.
    """
    line = _dump(message)
    if len(line.encode()) > min(limit, _SHARED_BYTES) and message.prepared is not None:
        message = message.model_copy(update={"prepared": message.prepared.without_known_uris()})
        line = _dump(message)
    # A character takes up to six bytes when escaped, so the length is found by binary search.
    low, high = 0, len(message.message)
    if len(line.encode()) <= limit:
        return line
    while low < high:
        middle = (low + high + 1) // 2
        if len(_dump(_shortened(message, middle)).encode()) <= limit:
            low = middle
        else:
            high = middle - 1
    return _dump(_shortened(message, low))


def write_termination_message(message: TerminationMessage, path: Path) -> None:
    """Write the message to the path that the kubelet reads; outside a pod the folder may not exist."""
    with contextlib.suppress(OSError):
        path.write_text(to_json_line(message), encoding="utf-8")


def _shortened(message: TerminationMessage, characters: int) -> TerminationMessage:
    return message.model_copy(update={"message": message.message[:characters] + _ELLIPSIS})


def _dump(message: TerminationMessage) -> str:
    # A lone surrogate (for example from an undecodable file name) has no UTF-8 form and would make writing fail.
    clean = REDACTOR.redact_text(message.message).encode("utf-8", "replace").decode("utf-8")
    return message.model_copy(update={"message": clean}).model_dump_json(by_alias=True, exclude_none=True)
