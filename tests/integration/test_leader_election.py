"""Two operator processes and one Lease: one reconciles, the other stands by and takes over."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from qlora_api import names
from qlora_operator.leader_election.lease import LEASE_DURATION, RENEW_DEADLINE
from tests.chaos.promises import promise
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
from tests.integration.operator_process import (
    ACCOUNT,
    NAME,
    OPERATOR_NAMESPACE,
    PREPARE,
    TRAIN,
    JobNamespace,
    Operator,
)
from tests.make import PREPARED_MESSAGE, PUBLISHED_MESSAGE

FAIL_OVER: Final = 20.0
"""Seconds that docs/operations.md promises."""
HAND_OVER: Final = 5.0
"""Seconds from SIGTERM to the next replica's first write; three are promised, and this machine has other work."""


class Replicas:
    """Operators by the names of their pods."""

    def __init__(self, cluster: Cluster, folder: Path, lease: str, namespace: str) -> None:
        self.cluster = cluster
        self.lease = lease
        self.operators: dict[str, Operator] = {}
        for pod in (f"{lease}-a", f"{lease}-b"):
            (folder / pod).mkdir()
            cluster.kubectl("run", pod, "--image=operator:test", f"--namespace={OPERATOR_NAMESPACE}")
            self.operators[pod] = Operator(
                cluster, folder / pod, namespace, POD_NAMESPACE=OPERATOR_NAMESPACE, POD_NAME=pod, QLORA_LEASE=lease
            )

    def holder(self) -> str:
        """Whom the Lease names; empty when it names nobody."""
        leases = self.cluster.get(
            "leases", f"--namespace={OPERATOR_NAMESPACE}", f"--field-selector=metadata.name={self.lease}"
        )
        return str(leases["items"][0]["spec"].get("holderIdentity", "")) if leases["items"] else ""

    def marked(self) -> list[str]:
        """Return the pods that the progress Service selects."""
        pods = self.cluster.get("pods", f"--namespace={OPERATOR_NAMESPACE}", f"--selector={names.LEADER_LABEL}=true")[
            "items"
        ]
        return [name for pod in pods if (name := pod["metadata"]["name"]) in self.operators]

    def start(self) -> tuple[Operator, Operator]:
        """Start both; return the leader and the standby."""
        first, second = self.operators
        self.operators[first].start()
        wait_until("a leader", lambda: self.holder() == first)
        self.operators[second].start()
        return self.operators[first], self.operators[second]

    def stop(self) -> None:
        """End both, and look through what they said."""
        for operator in self.operators.values():
            operator.stop()
        self.cluster.kubectl("delete", "pods", *self.operators, f"--namespace={OPERATOR_NAMESPACE}", "--now")
        for operator in self.operators.values():
            operator.stop_and_check_log()


@pytest.fixture
def replicas(job_namespace: JobNamespace, tmp_path: Path) -> Iterator[Replicas]:
    replicas = Replicas(
        job_namespace.cluster, tmp_path, job_namespace.namespace[:40].strip("-"), job_namespace.namespace
    )
    yield replicas
    replicas.stop()


def seconds_to_first_write(job_namespace: JobNamespace, name: str) -> float:
    """Create a QLoRAJob, and say how long it takes until somebody acts on it."""
    start = time.monotonic()
    job_namespace.submit(name)
    wait_until("a status", lambda: "phase" in job_namespace.status(name), timeout=60)
    return time.monotonic() - start


def test_standby_takes_over_from_dead_leader(replicas: Replicas, job_namespace: JobNamespace) -> None:
    leader, waiting = replicas.start()
    job_namespace.submit()
    job_namespace.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    job_namespace.start_pod(TRAIN)
    job_namespace.wait_for("Training")
    before = job_namespace.jobs()
    assert waiting.healthy()
    assert "qlora_operator_leader 1.0" in leader.metrics()
    assert "qlora_operator_leader 0.0" in waiting.metrics()
    assert "qlora_jobs{" not in waiting.metrics()
    leader.kill()
    assert seconds_to_first_write(job_namespace, "meanwhile") < FAIL_OVER
    assert replicas.marked() == sorted(replicas.operators)  # the dead one's pod keeps its label until it starts again
    leader.start()
    wait_until("one label", lambda: replicas.marked() == [replicas.holder()])
    job_namespace.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    job_namespace.wait_for("Succeeded", "Published")
    assert job_namespace.jobs() == {
        **before,
        names.prepare_job_name("meanwhile"): job_namespace.jobs()["meanwhile-prepare"],
    }
    assert [entry["number"] for entry in job_namespace.status()["attempts"]] == [1]


def test_leader_on_sigterm_releases_lease(replicas: Replicas, job_namespace: JobNamespace) -> None:
    leader, _ = replicas.start()
    assert seconds_to_first_write(job_namespace, NAME) < HAND_OVER
    assert leader.terminate() == 0
    assert seconds_to_first_write(job_namespace, "meanwhile") < HAND_OVER
    expected = [names.prepare_job_name("meanwhile"), PREPARE]
    # The first write claims the namespace for the installation, if the first replica had not done so yet.
    wait_until("both preparations", lambda: sorted(job_namespace.jobs()) == expected)


def test_standby_on_sigterm_exits(replicas: Replicas) -> None:
    _, waiting = replicas.start()
    before = replicas.holder()
    assert waiting.terminate() == 0
    assert replicas.holder() == before


@promise(
    fault="the leading operator is frozen, and thaws after another one has taken over",
    promise="it writes nothing more, and ends",
    how="SIGSTOP and SIGCONT",
)
def test_frozen_leader_writes_nothing_after_thaw(replicas: Replicas, job_namespace: JobNamespace) -> None:
    leader, _ = replicas.start()
    assert leader.process
    leader.process.send_signal(signal.SIGSTOP)
    assert seconds_to_first_write(job_namespace, NAME) < FAIL_OVER
    leader.process.send_signal(signal.SIGCONT)
    assert leader.process.wait(timeout=10) == 1
    assert "lost leadership" in leader.log.read_text()
    assert sorted(job_namespace.jobs()) == [PREPARE]


def test_leader_that_cannot_renew_exits_before_lease_expires(replicas: Replicas, job_namespace: JobNamespace) -> None:
    leader, waiting = replicas.start()
    waiting.terminate()
    assert LEASE_DURATION > RENEW_DEADLINE
    patch = json.dumps([{"op": "replace", "path": "/rules", "value": []}])
    job_namespace.cluster.kubectl(
        "patch", "role", ACCOUNT, f"--namespace={OPERATOR_NAMESPACE}", "--type=json", f"--patch={patch}"
    )
    assert leader.process
    assert leader.process.wait(timeout=LEASE_DURATION.total_seconds()) == 1
    assert "lost leadership" in leader.log.read_text()
    leader.log.write_text("")  # it complains, rightly, of the right that it lacks
