"""Fixtures of the trainer's tests: an S3 server without a cluster, a proxy before it, and runs that write to it."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.trainer.lives import TrainerRuns
from tests.cluster.processes import Processes
from tests.cluster.s3 import S3, start_s3
from tests.cluster.toxiproxy import Toxiproxy, start_toxiproxy
from tests.unit.trainer.conftest import THIRD_PARTY_WARNINGS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for warning in THIRD_PARTY_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """What runs beside the tests."""
    processes = Processes(tmp_path_factory.mktemp("servers"))
    yield processes
    processes.stop_all()


@pytest.fixture(scope="session")
def s3(servers: Processes, tmp_path_factory: pytest.TempPathFactory) -> S3:
    """A real S3 server."""
    return start_s3(tmp_path_factory.mktemp("objects"), servers, "127.0.0.1")


@pytest.fixture(scope="session")
def way(s3: S3, servers: Processes) -> Toxiproxy:
    """The way to the S3 server that can be spoiled."""
    return start_toxiproxy(s3.endpoint.removeprefix("http://"), servers)


@pytest.fixture
def toxic(way: Toxiproxy) -> Iterator[Toxiproxy]:
    """The same, unspoiled, and healed afterwards."""
    way.reset()
    yield way
    way.reset()


@pytest.fixture(scope="session")
def courses(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> TrainerRuns:
    """Runs of one prepared job."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        return TrainerRuns(s3, tmp_path_factory.mktemp("courses"))


@pytest.fixture(scope="session")
def undisturbed(courses: TrainerRuns) -> tuple[str, float]:
    """The adapter of a run that nothing happened to, and how long that took."""
    course = courses.make()
    life = course.start()
    life.wait_until(lambda life: bool(life.progress))
    started = time.monotonic()
    assert life.wait_for_exit() == 0, (life.folder / "log").read_text()[-3000:]
    return course.verified_adapter(), time.monotonic() - started
