"""The pod's final word: one line of JSON that the kubelet hands to the operator."""

import contextlib
import threading
from pathlib import Path

from qlora_api.names import TERMINATION_MESSAGE_BYTES
from qlora_api.redaction import REDACTOR
from qlora_api.report import TerminationMessage
from qlora_api.v1alpha1 import Checkpoint, Progress
from qlora_trainer.errors import RunError

_ELLIPSIS = "…"


def failure_message(error: RunError, checkpoint: Checkpoint | None = None) -> TerminationMessage:
    """Return what is said about a failed run."""
    return TerminationMessage(reason=error.reason, message=error.message, step=error.step, checkpoint=checkpoint)


class TerminationMessageWriter:
    """The last word of a process, said once: what several threads notice of one end must not take turns.

    It hears the progress as any sink does, so that it knows the newest checkpoint of a run that did not end well.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checkpoint: Checkpoint | None = None
        self._step: int | None = None
        self._lock = threading.Lock()
        self._written = False

    def report(self, progress: Progress) -> None:
        """Remember how far the run is."""
        self._checkpoint, self._step = progress.checkpoint, progress.step

    def note(self, text: str) -> None:
        """Leave sentences to the log."""

    def write_failure(self, error: RunError) -> None:
        """Say why the run failed."""
        word = failure_message(error, self._checkpoint)
        self.write(word if word.step is not None else word.model_copy(update={"step": self._step}))

    def write(self, word: TerminationMessage) -> None:
        """Write the word, unless there is one."""
        with self._lock:
            if not self._written:
                self._written = True
                write_termination_message(word, self._path)


def to_json_line(word: TerminationMessage, limit: int = TERMINATION_MESSAGE_BYTES) -> str:
    """Return the word as JSON of at most `limit` bytes; only the message is shortened."""
    line = _dump(word)
    # Escapes make a character up to six bytes, so the length to keep is searched for, not computed.
    low, high = 0, len(word.message)
    if len(line.encode()) <= limit:
        return line
    while low < high:
        kept = (low + high + 1) // 2
        if len(_dump(_shortened(word, kept)).encode()) <= limit:
            low = kept
        else:
            high = kept - 1
    return _dump(_shortened(word, low))


def write_termination_message(word: TerminationMessage, path: Path) -> None:
    """Write the word where the kubelet looks for it; outside a pod there may be no such place."""
    with contextlib.suppress(OSError):
        path.write_text(to_json_line(word), encoding="utf-8")


def _shortened(word: TerminationMessage, characters: int) -> TerminationMessage:
    return word.model_copy(update={"message": word.message[:characters] + _ELLIPSIS})


def _dump(word: TerminationMessage) -> str:
    # A lone surrogate (from an undecodable file name, say) has no UTF-8 form and would end the last word itself.
    clean = REDACTOR.redact_text(word.message).encode("utf-8", "replace").decode("utf-8")
    return word.model_copy(update={"message": clean}).model_dump_json(by_alias=True, exclude_none=True)
