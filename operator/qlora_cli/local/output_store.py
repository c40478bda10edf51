"""Reads a run's output with the local credentials."""

import contextlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Protocol

from qlora_api.object_names import ObjectName
from qlora_api.reasons import Reason
from qlora_api.runconfig import S3Config
from qlora_api.units import MIB

CREDENTIALS: Final = (
    "boto3 uses the credentials of this machine: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
    "--s3-endpoint sets a server other than AWS"
)


class OutputError(Exception):
    """The output cannot be read from this machine; the message has the cause and the fix."""


MAX_REPORT_BYTES: Final = 64 * MIB
"""Longest report.json that is read: one of 100,000 steps has 21 MiB."""
MAX_LOG_BYTES: Final = 16 * MIB
"""Longest log or stack dump that is read; the trainer keeps logs below 5 MiB."""


class StoredFile(Protocol):
    """One file of a listing."""

    @property
    def path(self) -> ObjectName:
        """Return its path, relative to the prefix."""

    @property
    def size(self) -> int:
        """Return its bytes."""


class OutputStore(Protocol):
    """A prefix of an output; every path is relative to it."""

    def list(self, prefix: str = "", on_refused: Callable[[str], None] | None = None) -> tuple[StoredFile, ...]:
        """Return every file below a folder, sorted by path; `on_refused` gets messages about refused names."""

    def read(self, path: str, max_bytes: int) -> bytes:
        """Return a file's content; one that is longer is an error."""

    def download(self, path: str, target: Path) -> None:
        """Download a file."""


@contextlib.contextmanager
def open_output_store(uri: str, endpoint: str | None) -> Iterator[OutputStore]:
    """Open a prefix of an output.

    Args:
        uri: Prefix in S3, or a file:// URI of a folder.
        endpoint: URL of an S3-compatible server; None: AWS.

    Raises:
        OutputError: boto3 is missing, or an access in the context failed.

    """
    if uri.startswith("s3://") and find_spec("boto3") is None:
        raise OutputError("boto3 is not installed; run pip install '.[cli]' in a checkout of the project")
    # Imported here because they belong to the optional trainer, which most commands do not need.
    from qlora_trainer.errors import RunError  # noqa: PLC0415
    from qlora_trainer.storage.credentials import environment_secrets  # noqa: PLC0415
    from qlora_trainer.storage.open_store import open_store  # noqa: PLC0415
    from qlora_trainer.storage.store import OUTPUT_FIELD  # noqa: PLC0415

    try:
        yield open_store(uri, OUTPUT_FIELD, environment_secrets(), S3Config(endpoint=endpoint))
    except RunError as error:
        # The trainer's message is about the manifest's Secrets; here the local credentials are the cause.
        cause = str(error.__cause__ or error).rstrip(".")
        hint = f"; {CREDENTIALS}" if error.reason in {Reason.S3_DENIED, Reason.S3_UNAVAILABLE} else ""
        raise OutputError(f"cannot read {uri}: {cause}{hint}") from error
