"""What a run left in its output, read with this computer's own credentials."""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Protocol

from qlora_api.reasons import Reason
from qlora_api.runconfig import S3Config

CREDENTIALS: Final = (
    "boto3 looks for credentials on this computer: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
    "--s3-endpoint names a server other than AWS"
)


class OutputError(Exception):
    """The output cannot be read from here; the message says why, and what to do."""


class StoredFile(Protocol):
    """One file of a listing."""

    @property
    def path(self) -> str:
        """Return its path, relative to the prefix."""


class OutputStore(Protocol):
    """A prefix of an output; every path is relative to it."""

    def list(self, prefix: str = "") -> tuple[StoredFile, ...]:
        """Return every file under a folder, in order of its path."""

    def read(self, path: str) -> bytes:
        """Return a file's content."""

    def download(self, path: str, target: Path) -> None:
        """Copy a file to this computer."""


@contextlib.contextmanager
def open_output_store(uri: str, endpoint: str | None) -> Iterator[OutputStore]:
    """Open a prefix of an output; within, its errors become OutputError."""
    if uri.startswith("s3://") and find_spec("boto3") is None:
        raise OutputError("boto3 is not installed; run pip install 'qlora-operator[cli]'")
    # Imported here, because they are the trainer's, and most commands do without.
    from qlora_trainer.errors import RunError  # noqa: PLC0415
    from qlora_trainer.storage.credentials import environment_secrets  # noqa: PLC0415
    from qlora_trainer.storage.open_store import open_store  # noqa: PLC0415
    from qlora_trainer.storage.store import OUTPUT_FIELD  # noqa: PLC0415

    try:
        yield open_store(uri, OUTPUT_FIELD, environment_secrets(), S3Config(endpoint=endpoint))
    except RunError as error:
        # The trainer's sentence speaks to whoever wrote the manifest; here the reader's own keys are at fault.
        cause = str(error.__cause__ or error).rstrip(".")
        hint = f"; {CREDENTIALS}" if error.reason in {Reason.S3_DENIED, Reason.S3_UNAVAILABLE} else ""
        raise OutputError(f"{uri} cannot be read: {cause}{hint}") from error
