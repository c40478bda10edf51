"""Publishers are killed at random times, or run concurrently: readers see one complete result, or none."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from qlora_api.report import ResultManifest
from qlora_api.result import Result
from tests.chaos.promises import Dose, promise
from tests.chaos.trainer.lives import CONTEXT
from tests.chaos.trainer.publishers import Reader, check_published, open_store, publish_files, write_files
from tests.cluster.services.s3 import S3
from tests.unit.trainer.results import DIGEST

LATEST: Final = 1.3
"""The latest kill, in durations of the last publication that nobody killed: the last write is to be hit as well."""
SLOWER: Final = 1.1
"""How much longer a publication is thought to take after each kill, so that some end on a machine that slows down."""


def start_publisher(root: str, s3: S3, folder: Path, author: int) -> Any:
    """Start a publisher, and return its process when it is ready."""
    receiver, sender = CONTEXT.Pipe()
    process = CONTEXT.Process(target=publish_files, args=(root, s3.environment(), folder, author, sender))
    process.start()
    assert receiver.poll(60)
    return process


def measure_publication(root: str, s3: S3, folder: Path) -> float:
    """Return the duration in seconds of an uninterrupted publication."""
    process, start = start_publisher(root, s3, folder, 1), time.monotonic()
    process.join(60)
    assert process.exitcode == 0
    return time.monotonic() - start


def kill_while_publishing(root: str, s3: S3, folder: Path, author: int, after: float) -> float | None:
    """Start a publisher, and kill it after some seconds; return how long it took if it ended before."""
    process, start = start_publisher(root, s3, folder, author), time.monotonic()
    process.join(after)
    seconds = time.monotonic() - start
    killed = process.exitcode is None
    process.kill()
    process.join()
    assert killed or process.exitcode == 0
    return None if killed else seconds


@promise(
    fault="a publisher is killed",
    promise="no reader ever sees a manifest with a missing or different file",
    how="SIGKILL at random times during publication, while a reader polls the bucket and checks every digest",
)
@pytest.mark.timeout(2400)
def test_kills_while_publishing(s3: S3, tmp_path: Path, dose: Dose, outcome: Callable[[str], None]) -> None:
    wanted, killed, published, chance = dose(short=20, full=1000), 0, 0, random.Random(3)
    client, bucket = s3.client(), s3.make_bucket("killed")
    seconds = measure_publication(f"s3://{bucket}/uninterrupted", s3, write_files(tmp_path / "uninterrupted", 1))
    with Reader(s3.client()) as reader:
        while killed < wanted:
            reader.root = root = f"s3://{bucket}/result-{published}"
            attempt = 0
            while check_published(client, root) is None:
                attempt += 1
                folder = write_files(tmp_path / f"{published}-{attempt}", attempt)
                ended = kill_while_publishing(root, s3, folder, attempt, chance.uniform(0, LATEST * seconds))
                killed += ended is None
                seconds = SLOWER * seconds if ended is None else ended
            published += 1
        time.sleep(0.1)
    assert reader.faults == []
    assert reader.complete > 0
    outcome(
        f"{killed} kills within {LATEST * seconds:.2f} s, {published} results published; "
        f"{reader.reads} reads, none of an incomplete result"
    )


@promise(
    fault="several publishers at once",
    promise="the digest has exactly one manifest, every publisher's own result is complete, and its files are intact",
    how="publishers with different files start at the same time",
)
def test_publishers_at_once(s3: S3, tmp_path: Path, dose: Dose, outcome: Callable[[str], None]) -> None:
    count = dose(short=10, full=100)
    root = f"s3://{s3.make_bucket('crowded')}/result"
    barrier = threading.Barrier(count)

    def publish_together(author: int) -> Result:
        folder = write_files(tmp_path / str(author), author)
        barrier.wait()
        return publish_files(root, s3.environment(), folder, author, None)

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(publish_together, range(1, count + 1)))
    manifest = check_published(s3.client(), root)
    assert manifest is not None
    store = open_store(root, s3.environment())
    manifests = {manifest.result.adapter: manifest}
    for beside in (result for result in found if result != manifest.result):
        name = beside.adapter.removeprefix(f"{store.root}/").replace("/adapter", "/manifest.json")
        manifests[beside.adapter] = ResultManifest.model_validate_json(store.read(name))
        for file in manifests[beside.adapter].files:
            assert store.sha256(f"{DIGEST}/{file.path}") == file.sha256, file.path
    assert {adapter: published.result.evaluation for adapter, published in manifests.items()} == {
        result.adapter: result.evaluation for result in found
    }
    assert len(manifests) == count
    outcome(f"{count} publishers, {count} complete results, every digest matches")
