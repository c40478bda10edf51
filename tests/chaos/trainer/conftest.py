"""Fixtures of the trainer's chaos tests: an S3 server without a cluster, a proxy in front of it, and runs."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.trainer.lives import TrainerRuns
from tests.cluster.host.processes import Processes
from tests.cluster.services.s3 import S3, start_s3
from tests.cluster.services.toxiproxy import Toxiproxy, start_toxiproxy
from tests.unit.trainer.conftest import THIRD_PARTY_WARNINGS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for warning in THIRD_PARTY_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Background processes of the tests."""
    processes = Processes(tmp_path_factory.mktemp("servers"))
    yield processes
    processes.stop_all()


@pytest.fixture(scope="session")
def s3(servers: Processes, tmp_path_factory: pytest.TempPathFactory) -> S3:
    """A real S3 server."""
    return start_s3(tmp_path_factory.mktemp("objects"), servers, "127.0.0.1")


@pytest.fixture(scope="session")
def proxy(s3: S3, servers: Processes) -> Toxiproxy:
    """A proxy in front of the S3 server that can inject faults."""
    return start_toxiproxy(s3.endpoint.removeprefix("http://"), servers)


@pytest.fixture
def toxic(proxy: Toxiproxy) -> Iterator[Toxiproxy]:
    """The proxy without faults; they are removed after the test."""
    proxy.reset()
    yield proxy
    proxy.reset()


@pytest.fixture(scope="session")
def runs(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> TrainerRuns:
    """Runs of one prepared job."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        return TrainerRuns(s3, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def uninterrupted(runs: TrainerRuns) -> tuple[str, float]:
    """The adapter digest of an uninterrupted run, and its duration in seconds."""
    run = runs.make()
    process = run.start()
    process.wait_until(lambda process: bool(process.progress))
    started = time.monotonic()
    assert process.wait_for_exit() == 0, (process.folder / "log").read_text()[-3000:]
    return run.verified_adapter(), time.monotonic() - started
