"""Publishers of a few small files, in processes that tests kill and in threads, and a reader that verifies them."""

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from qlora_api.report import ResultManifest
from qlora_api.result import Result
from qlora_api.runconfig import S3Config
from qlora_trainer.publishing.publish import publish
from qlora_trainer.storage.credentials import Credentials
from qlora_trainer.storage.s3 import S3Store
from qlora_trainer.storage.store import OUTPUT_FIELD
from tests.unit.trainer.results import DIGEST, config, result

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

FILES: Final = 6


def write_files(folder: Path, author: int, size: int = 100) -> Path:
    """Write a result; half of the files depend on the author, as reports do."""
    for number in range(FILES):
        path = folder / "adapter" / f"file-{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{number} {author * (number % 2)} ".encode() * (size // 4))
    return folder


def open_store(root: str, keys: Mapping[str, str]) -> S3Store:
    """Open an output as the trainer does."""
    return S3Store(root, OUTPUT_FIELD, Credentials(dict(keys)), S3Config())


def publish_files(root: str, keys: Mapping[str, str], folder: Path, author: int, ready: Connection | None) -> Result:
    """Publish a folder, after sending "ready" to the connection."""
    store = open_store(root, keys)
    if ready is not None:
        ready.send("ready")
    return publish(store, config(root), result(float(author)), folder, datetime.now(UTC))


def check_published(client: "S3Client", root: str) -> ResultManifest | None:
    """Compare every file with the manifest and return it; None if there is none yet."""
    bucket, _, key = root.removeprefix("s3://").partition("/")
    found = client.list_objects_v2(Bucket=bucket, Prefix=f"{key}/{DIGEST}/manifest.json").get("Contents")
    if not found:
        return None

    def read(path: str) -> bytes:
        return client.get_object(Bucket=bucket, Key=f"{key}/{DIGEST}/{path}")["Body"].read()

    content = json.loads(read("manifest.json"))
    for file in content["files"]:
        assert hashlib.sha256(read(file["path"])).hexdigest() == file["sha256"], file["path"]
    return ResultManifest.model_validate(content)


@dataclass
class Reader:
    """Verifies the current result continuously in a thread."""

    client: "S3Client"
    root: str = ""
    reads: int = 0
    complete: int = 0
    faults: list[str] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.thread.join()

    def _work(self) -> None:
        while not self.closed.wait(0.01):
            if not self.root:
                continue
            try:
                self.complete += check_published(self.client, self.root) is not None
            except (AssertionError, self.client.exceptions.ClientError) as fault:
                self.faults.append(f"{self.root}: {fault}")
            self.reads += 1
