"""Many runs are admitted at once after a long queue: the Job controller, at its default rate, gives each its pods."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from benchmarks.scale.workload import build_prepare_end
from qlora_api import names
from tests.chaos.promises import Dose, promise
from tests.cluster.admin import MERGE
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
from tests.cluster.services.kwok import pods_that_run
from tests.integration.operator_process import JobNamespace, Operator, install, open_job_namespace

GANG: Final = 16
"""Nodes of a gang."""
PATIENCE: Final = 600.0
"""Seconds for all runs to get anywhere, on a busy machine."""


@pytest.fixture(scope="module")
def simulated() -> Iterator[Cluster]:
    """Twelve simulated nodes, with room for all pods: 28 fit on each."""
    stages = "\n---\n".join((pods_that_run(), build_prepare_end()))
    with Cluster.start(f"burst-{os.getpid()}", kwok_nodes=12, stages=stages, s3=False) as cluster:
        install(cluster)
        yield cluster


@pytest.fixture
def job_namespace(simulated: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[JobNamespace]:
    """A namespace with an operator."""
    with open_job_namespace(simulated, request.node.name, PATIENCE) as job_namespace:
        operator = Operator(simulated, tmp_path, job_namespace.namespace).start()
        yield job_namespace
        operator.stop_and_check_log()


def states(job_namespace: JobNamespace) -> Counter[tuple[str, str]]:
    """Count the runs by phase and reason."""
    statuses = [item.get("status", {}) for item in job_namespace.items("qlorajobs")]
    return Counter((status.get("phase", ""), status.get("reason", "")) for status in statuses)


def wait_for_all(job_namespace: JobNamespace, phase: str, runs: int) -> None:
    """Wait until every run is in a phase."""
    last: Counter[tuple[str, str]] = Counter()

    def reached() -> bool:
        nonlocal last
        last = states(job_namespace)
        assert not any(found == "Failed" for found, _ in last), last
        return sum(number for (found, _), number in last.items() if found == phase) == runs

    wait_until(f"{runs} runs {phase}", reached, timeout=PATIENCE, interval=1)


def admit(job_namespace: JobNamespace, job: str) -> None:
    """Play the queue."""
    path = f"{job_namespace.path('jobs')}/{job}"
    code, answer = job_namespace.cluster.admin.request("PATCH", path, {"spec": {"suspend": False}}, MERGE)
    assert code == 200, answer


def in_parallel(act: Callable[[str], Any], names_: list[str]) -> None:
    """Do the same for many names at once."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(act, names_))


@promise(
    fault="runs and gangs wait in a queue for longer than spec.deadlines.startup, and are admitted at once",
    promise="all of them train, each in its first attempt: waiting in a queue is not starting",
    how="100 runs, 10 gangs of 16, the Job controller at its default rate (20 and 2 in `make test`)",
)
def test_runs_admitted_at_once_after_a_queue_longer_than_startup_all_train(
    job_namespace: JobNamespace, dose: Dose, outcome: Callable[[str], None]
) -> None:
    singles, gangs, startup = dose(short=20, full=100), dose(short=2, full=10), dose(short=20, full=60)
    spec = {
        "queue": {"name": "gpus"},
        "deadlines": {"startup": f"{startup}s"},
        "training": {"globalBatchSize": GANG},
    }
    nodes = {f"single-{number}": 1 for number in range(singles)} | {f"gang-{number}": GANG for number in range(gangs)}
    in_parallel(lambda name: job_namespace.submit(name, resources={"nodes": nodes[name]}, **spec), list(nodes))
    wait_for_all(job_namespace, "Queued", len(nodes))
    time.sleep(startup + 1)
    began = time.monotonic()
    in_parallel(lambda name: admit(job_namespace, names.train_job_name(name, 1)), list(nodes))
    wait_for_all(job_namespace, "Training", len(nodes))
    outcome(f"{singles} runs and {gangs} of {GANG} nodes train {time.monotonic() - began:.0f} s after their admission")
    attempts = [item["status"]["attempts"] for item in job_namespace.items("qlorajobs")]
    assert all(len(made) == 1 for made in attempts), "none was repeated"
