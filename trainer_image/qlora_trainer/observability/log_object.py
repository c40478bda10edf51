"""Where a process's log lies in the output."""

from functools import cached_property
from typing import Final

from qlora_api.logfiles import LogFile, log_folder
from qlora_api.reasons import Reason
from qlora_api.runconfig import PrepareConfig, RunConfig
from qlora_trainer.errors import RunError
from qlora_trainer.observability.log_upload import HEAD_BYTES, TAIL_BYTES
from qlora_trainer.storage.results import open_own_output
from qlora_trainer.storage.store import Store

_LARGEST_BYTES: Final = 2 * (HEAD_BYTES + TAIL_BYTES)
"""What is read of what lies there: a log of ours is smaller."""


class LogObject:
    """One object of the output; the store is opened by the thread that uses it."""

    def __init__(self, config: PrepareConfig | RunConfig, file: LogFile) -> None:
        self._config = config
        self._folder = log_folder(config.uid)
        self._path = f"{self._folder}/{file.name}"

    @cached_property
    def _output(self) -> Store:
        return open_own_output(self._config)

    def read_existing(self) -> bytes:
        """Return what is there: a queue may stop an attempt and start it again, and its second pod goes on there."""
        try:
            sizes = {entry.path: entry.size for entry in self._output.list(self._folder)}
            return self._output.read(self._path) if 0 < sizes.get(self._path, 0) <= _LARGEST_BYTES else b""
        except RunError as error:
            if error.reason is not Reason.S3_DENIED:
                raise
            return b""  # who may only write has its log all the same

    def put(self, text: bytes) -> None:
        """Write the object."""
        self._output.put(self._path, text)
