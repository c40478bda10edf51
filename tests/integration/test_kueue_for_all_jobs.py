"""The real Kueue where it manages every Job, also those without a queue (manageJobsWithoutQueueName)."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_api import names
from tests.chaos.promises import promise
from tests.cluster.cluster import Cluster
from tests.cluster.controllers import start_kueue
from tests.cluster.host.commands import wait_until
from tests.cluster.host.progress import Unavailable
from tests.cluster.services.kwok import pods_that_run
from tests.integration.operator_process import JobNamespace, Operator, install, open_job_namespace
from tests.integration.test_kueue import (
    PREEMPTED,
    QUEUE,
    build_queue,
    finish,
    wait_for,
    wait_for_message,
)
from tests.make import PREPARED_MESSAGE, message_for


@pytest.fixture(scope="module")
def with_kueue() -> Iterator[Cluster]:
    """A simulated node with eight GPUs, of which Kueue lends one, and holds every Job until it does."""
    with Cluster.start(f"kueue-all-{os.getpid()}", kwok_nodes=1, stages=pods_that_run(), s3=False) as cluster:
        install(cluster)
        try:
            start_kueue(cluster, manageJobsWithoutQueueName=True)
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


def block(job_namespace: JobNamespace, name: str) -> None:
    """Let a more important run take the whole quota."""
    quota = {"gpusPerNode": 1, "cpu": "64"}
    job_namespace.submit(name, resources=quota, queue={"name": QUEUE, "priorityClass": "urgent"})
    job_namespace.end_pod(names.prepare_job_name(name), 0, message_for(name, PREPARED_MESSAGE))
    wait_for(job_namespace, name, "Training")


def unblock(job_namespace: JobNamespace, name: str) -> None:
    """Delete that run."""
    job_namespace.kubectl("delete", "qlj", name)
    wait_until("it is gone", lambda: not job_namespace.pods_of(names.train_job_name(name, 1)), timeout=PREEMPTED)


@promise(
    fault="Kueue manages all Jobs, and preempts a preparation and later the training",
    promise="both go on where they were once they are admitted, and no GPU is counted meanwhile",
    how="the real Kueue, and a run that takes all of the quota",
)
def test_preparation_gets_the_queue_of_its_run_and_survives_preemption(job_namespace: JobNamespace) -> None:
    prepare = names.prepare_job_name("ordinary")
    job_namespace.submit("ordinary", resources={"gpusPerNode": 1}, queue={"name": QUEUE, "priorityClass": "ordinary"})
    first = job_namespace.pod_of(prepare)
    block(job_namespace, "urgent")
    wait_for(job_namespace, "ordinary", "Preparing", "Queued")
    wait_for_message(
        job_namespace, "ordinary",
        f"Job {prepare} is suspended until its queue admits it: queue {QUEUE}: couldn't assign flavors to pod set main",
    )  # fmt: skip
    unblock(job_namespace, "urgent")
    wait_for(job_namespace, "ordinary", "Preparing", "Preparing")
    assert job_namespace.pod_of(prepare) != first
    job_namespace.end_pod(prepare, 0, message_for("ordinary", PREPARED_MESSAGE))
    wait_for(job_namespace, "ordinary", "Training")
    block(job_namespace, "again")
    status = wait_for(job_namespace, "ordinary", "Queued")
    assert status["attempts"][0].get("runningSince") is None
    wait_until("no GPU is counted", lambda: job_namespace.status("ordinary")["gpus"] == 0, timeout=PREEMPTED)
    unblock(job_namespace, "again")
    finish(job_namespace, "ordinary")
    status = job_namespace.status("ordinary")
    assert (status["attempt"], status["preparation"].get("reason")) == (1, None)
    assert sorted(name for name in job_namespace.jobs() if name.startswith("ordinary")) == ["ordinary-1", prepare]


def test_run_without_a_queue_says_so_and_continues_with_one(job_namespace: JobNamespace) -> None:
    job_namespace.submit("queueless", resources={"gpusPerNode": 1})
    wait_for(job_namespace, "queueless", "Preparing", "Queued")
    prepare = names.prepare_job_name("queueless")
    wait_for_message(job_namespace, "queueless", f"spec.queue: Job {prepare} is suspended, and the run names no queue")
    set_queue(job_namespace, "queueless", "nowhere")
    wait_for_message(
        job_namespace, "queueless",
        f"Job {prepare} is suspended until its queue admits it: queue nowhere: LocalQueue nowhere doesn't exist",
    )  # fmt: skip
    set_queue(job_namespace, "queueless", QUEUE)
    job_namespace.end_pod(prepare, 0, message_for("queueless", PREPARED_MESSAGE))
    finish(job_namespace, "queueless")


def test_stopped_queue_and_deactivated_workload_are_named(job_namespace: JobNamespace) -> None:
    stop(job_namespace, "Hold")
    job_namespace.submit("held", resources={"gpusPerNode": 1}, queue={"name": QUEUE})
    prepare = names.prepare_job_name("held")
    sentence = f"Job {prepare} is suspended until its queue admits it: "
    wait_for_message(job_namespace, "held", f"{sentence}queue {QUEUE}: ClusterQueue {job_namespace.namespace} is")
    stop(job_namespace, "None")
    job_namespace.end_pod(prepare, 0, message_for("held", PREPARED_MESSAGE))
    wait_for(job_namespace, "held", "Training")
    [workload] = [name for name in workloads(job_namespace) if name.startswith("job-held-1-")]
    activate(job_namespace, workload, active=False)
    wait_for(job_namespace, "held", "Queued")
    wait_until(
        "it says so",
        lambda: f"Workload {workload} is deactivated" in job_namespace.status("held")["message"],
        timeout=PREEMPTED,
    )
    activate(job_namespace, workload, active=True)
    finish(job_namespace, "held")


def set_queue(job_namespace: JobNamespace, name: str, queue: str) -> None:
    patch(job_namespace, "qlj", name, {"spec": {"queue": {"name": queue}}})


def stop(job_namespace: JobNamespace, policy: str) -> None:
    patch(job_namespace, "clusterqueue", job_namespace.namespace, {"spec": {"stopPolicy": policy}})


def activate(job_namespace: JobNamespace, workload: str, *, active: bool) -> None:
    patch(job_namespace, "workload", workload, {"spec": {"active": active}})


def patch(job_namespace: JobNamespace, kind: str, name: str, change: dict[str, Any]) -> None:
    job_namespace.kubectl("patch", kind, name, "--type=merge", f"--patch={json.dumps(change)}")


def workloads(job_namespace: JobNamespace) -> list[str]:
    listed = json.loads(job_namespace.kubectl("get", "workloads", "--output=json"))
    return [item["metadata"]["name"] for item in listed["items"]]
