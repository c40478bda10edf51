"""The object in the output that holds a process's log."""

from functools import cached_property
from typing import Final

from qlora_api.logs.files import LogFile, log_folder
from qlora_api.reasons import Reason
from qlora_api.runconfig import PrepareConfig, RunConfig
from qlora_trainer.errors import RunError
from qlora_trainer.observability.log_upload import HEAD_BYTES, TAIL_BYTES
from qlora_trainer.observability.progress import no_log
from qlora_trainer.storage.results import open_own_output
from qlora_trainer.storage.store import Store

_LARGEST_BYTES: Final = 2 * (HEAD_BYTES + TAIL_BYTES)
"""Largest object that is read; logs that the trainer uploads are smaller."""


class LogObject:
    """One object in the output; the uploading thread opens the store."""

    def __init__(self, config: PrepareConfig | RunConfig, file: LogFile) -> None:
        self._config = config
        self._folder = log_folder(config.uid)
        self._path = f"{self._folder}/{file.name}"

    @cached_property
    def _output(self) -> Store:
        return open_own_output(self._config)

    def read_existing(self) -> bytes:
        """Return the existing content: after a requeue, the second pod of an attempt appends to the first one's log."""
        try:
            sizes: dict[str, int] = {entry.path: entry.size for entry in self._output.list(self._folder, no_log)}
            return (
                self._output.read(self._path, _LARGEST_BYTES) if 0 < sizes.get(self._path, 0) <= _LARGEST_BYTES else b""
            )
        except RunError as error:
            if error.reason is not Reason.S3_DENIED:
                raise
            return b""  # write-only credentials are enough for logs

    def put(self, text: bytes) -> None:
        """Write the object."""
        self._output.put(self._path, text)
