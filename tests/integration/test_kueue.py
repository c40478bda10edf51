"""Runs that wait in a queue of the real Kueue: queued, admitted, preempted, resumed, and finished."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from qlora_api import names
from tests.chaos.promises import promise
from tests.cluster.cluster import Cluster
from tests.cluster.controllers import start_kueue
from tests.cluster.host.commands import wait_until
from tests.cluster.host.progress import Unavailable
from tests.cluster.services.kwok import pods_that_run
from tests.integration.operator_process import JobNamespace, Operator, install, open_job_namespace
from tests.make import PREPARED_MESSAGE, PUBLISHED_MESSAGE, message_for

QUEUE: Final = "gpu-queue"
KUEUE: Final = "kueue.x-k8s.io/v1beta2"
PREEMPTED: Final = 60.0
"""Seconds for Kueue to stop a run and to start another, on a busy machine."""


@pytest.fixture(scope="module")
def with_kueue() -> Iterator[Cluster]:
    """A simulated node with eight GPUs, of which Kueue lends one."""
    with Cluster.start(f"kueue-{os.getpid()}", kwok_nodes=1, stages=pods_that_run(), s3=False) as cluster:
        install(cluster)
        try:
            start_kueue(cluster)
        except Unavailable as reason:
            pytest.skip(str(reason))
        yield cluster


@pytest.fixture
def job_namespace(with_kueue: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[JobNamespace]:
    """A namespace with a queue and an operator."""
    with open_job_namespace(with_kueue, request.node.name) as job_namespace:
        with_kueue.apply(*build_queue(job_namespace.namespace))
        operator = Operator(with_kueue, tmp_path, job_namespace.namespace).start()
        yield job_namespace
        operator.stop_and_check_log()


def build_queue(namespace: str) -> list[dict[str, Any]]:
    """One GPU for a namespace; whoever is more important takes it away."""
    offer = {"nvidia.com/gpu": "1", "cpu": "64", "memory": "512Gi"}
    group = {
        "coveredResources": list(offer),
        "flavors": [
            {"name": "any", "resources": [{"name": name, "nominalQuota": quota} for name, quota in offer.items()]}
        ],
    }
    quota = {
        "namespaceSelector": {},
        "preemption": {"withinClusterQueue": "LowerPriority"},
        "resourceGroups": [group],
    }
    return [
        {"apiVersion": KUEUE, "kind": "ResourceFlavor", "metadata": {"name": "any"}, "spec": {}},
        {"apiVersion": KUEUE, "kind": "ClusterQueue", "metadata": {"name": namespace}, "spec": quota},
        {
            "apiVersion": KUEUE, "kind": "LocalQueue", "metadata": {"name": QUEUE, "namespace": namespace},
            "spec": {"clusterQueue": namespace},
        },
        *(
            {"apiVersion": KUEUE, "kind": "WorkloadPriorityClass", "metadata": {"name": name}, "value": value}
            for name, value in (("ordinary", 1), ("urgent", 1000))
        ),
    ]  # fmt: skip


def submit(job_namespace: JobNamespace, name: str, priority: str = "ordinary") -> str:
    """Bring a run to where it asks for a GPU, and return the name of the Job that asks."""
    job_namespace.submit(name, resources={"gpusPerNode": 1}, queue={"name": QUEUE, "priorityClass": priority})
    job_namespace.end_pod(names.prepare_job_name(name), 0, message_for(name, PREPARED_MESSAGE))
    return names.train_job_name(name, 1)


def finish(job_namespace: JobNamespace, name: str) -> None:
    """End a run's training pod, once it runs, with a published adapter."""
    wait_for(job_namespace, name, "Training")
    job_namespace.end_pod(names.train_job_name(name, 1), 0, message_for(name, PUBLISHED_MESSAGE))
    wait_for(job_namespace, name, "Succeeded", "Published")


def wait_for(job_namespace: JobNamespace, name: str, phase: str, reason: str = "") -> dict[str, Any]:
    """Wait until a run stands somewhere, and return its status."""

    def reached() -> bool:
        status = job_namespace.status(name)
        return status.get("phase") == phase and reason in {"", status.get("reason")}

    wait_until(f"{name} {phase} {reason}", reached, timeout=PREEMPTED)
    return job_namespace.status(name)


def wait_for_message(job_namespace: JobNamespace, name: str, message: str) -> None:
    """Wait until the status begins with what a queue says."""
    said = f"{name} says {message}"
    wait_until(said, lambda: job_namespace.status(name).get("message", "").startswith(message), timeout=PREEMPTED)


def test_queued_run_waits_for_admission(job_namespace: JobNamespace) -> None:
    submit(job_namespace, "first")
    wait_for(job_namespace, "first", "Training")
    job = submit(job_namespace, "second")
    status = wait_for(job_namespace, "second", "Queued")
    message = (
        f"Job {job} is suspended until its queue admits it: queue {QUEUE}: couldn't assign flavors to pod set main: "
    )
    wait_for_message(job_namespace, "second", f"{message}insufficient unused quota for nvidia.com/gpu in flavor any")
    assert status["gpus"] == 0
    assert job_namespace.pods_of(job) == []
    finish(job_namespace, "first")
    finish(job_namespace, "second")
    assert job_namespace.status("second")["attempt"] == 1


@promise(
    fault="Kueue preempts a run for a more important one",
    promise="the run waits as Queued and resumes with the same attempt and the same Job",
    how="the real Kueue, a quota of one GPU, two priorities",
)
def test_preempted_run_resumes_same_attempt(job_namespace: JobNamespace) -> None:
    job = submit(job_namespace, "ordinary")
    wait_for(job_namespace, "ordinary", "Training")
    before = job_namespace.jobs()[job]
    [pod] = job_namespace.pods_of(job)
    submit(job_namespace, "urgent", "urgent")
    wait_for(job_namespace, "urgent", "Training")
    status = wait_for(job_namespace, "ordinary", "Queued")
    assert [attempt.get("reason") for attempt in status["attempts"]] == [None]
    assert [attempt.get("runningSince") for attempt in status["attempts"]] == [None]
    wait_until("the pod has left its GPU", lambda: job_namespace.pods_of(job) == [], timeout=PREEMPTED)
    wait_until("no GPU is counted", lambda: job_namespace.status("ordinary")["gpus"] == 0, timeout=PREEMPTED)
    message = f"Job {job} was suspended and resumes from its last checkpoint once it is admitted again: Preempted to"
    wait_for_message(job_namespace, "ordinary", message)
    finish(job_namespace, "urgent")
    wait_for(job_namespace, "ordinary", "Training")
    assert job_namespace.pods_of(job) != [pod]
    finish(job_namespace, "ordinary")
    assert len(job_namespace.jobs()) == 4
    assert (job_namespace.jobs()[job], job_namespace.status("ordinary")["attempt"]) == (before, 1)
