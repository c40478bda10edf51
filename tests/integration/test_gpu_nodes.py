"""Runs for GPUs on simulated nodes with the labels of GPU feature discovery: sized, placed, and left by a dead node."""

import json
import os
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from qlora_api.model_config import reduce_config
from qlora_api.reasons import Reason
from tests.chaos.promises import promise
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
from tests.cluster.services.kwok import A100, MIG, T4, GpuProduct, pods_that_run, start_simulator
from tests.integration.operator_process import PREPARE, TRAIN, JobNamespace, Operator, install, open_job_namespace
from tests.make import PUBLISHED_MESSAGE, make_prepared, make_termination_message

CONFIGS: Final = Path(__file__).parents[1] / "unit/planner/configs"
SECOND: Final = "support-bot-2"
GPU: Final = {"gpusPerNode": 1}
MEDIUM: Final = GpuProduct("NVIDIA-L4", 23_034, (8, 9), "ada-lovelace")
"""A product that only the test of a dead node has nodes of."""
A10: Final = GpuProduct("NVIDIA-A10", 23_028, (8, 6), "ampere")
MORTAL: Final = "mortal"
"""Name of the simulator that dies."""
LONGEST_LOSS: Final = 400.0
"""Seconds until a dead node is left: Kubernetes' 50, and the 150 of docs/attempts.md, on a busy machine."""


@pytest.fixture(scope="module")
def simulated() -> Iterator[Cluster]:
    """A node with an old small GPU, one with a small GPU and two with eight large ones."""
    with Cluster.start(f"gpus-{os.getpid()}", kwok_nodes=2, stages=pods_that_run(), s3=False) as cluster:
        cluster.add_simulated_nodes(1, T4, 1, "old")
        cluster.add_simulated_nodes(1, A10, 1, "small")
        cluster.add_simulated_nodes(1, MIG, 2, "mig")
        install(cluster)
        yield cluster


@pytest.fixture
def job_namespace(simulated: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[JobNamespace]:
    """A namespace of its own, with an operator."""
    with open_job_namespace(simulated, request.node.name) as job_namespace:
        operator = Operator(simulated, tmp_path, job_namespace.namespace).start()
        yield job_namespace
        operator.stop_and_check_log()


def prepared_word(model: str) -> str:
    """What preparation tells of a public model."""
    prepared, config = make_prepared(), json.loads((CONFIGS / f"{model}.json").read_text())
    known = prepared.model.model_copy(update={"config": reduce_config(config)})
    return make_termination_message(Reason.PREPARED, prepared=prepared.model_copy(update={"model": known}))


def prepare(job_namespace: JobNamespace, model: str, **resources: Any) -> None:
    job_namespace.submit(resources=GPU | resources)
    pod = job_namespace.pod_of(PREPARE)
    # A pod that ended before its simulator looked at it would be made to run, for ever.
    wait_until(
        "a start",
        lambda: (
            job_namespace.cluster.get("pod", pod, f"--namespace={job_namespace.namespace}")["status"]["phase"]
            == "Running"
        ),
    )
    job_namespace.end_pod(PREPARE, 0, prepared_word(model))


def node_of(job_namespace: JobNamespace, job: str) -> str:
    """Wait until the scheduler has placed a Job's pod, and return where."""
    pod = job_namespace.pod_of(job)

    def found() -> str:
        return str(
            job_namespace.cluster.get("pod", pod, f"--namespace={job_namespace.namespace}")["spec"].get("nodeName", "")
        )

    wait_until(f"node of {pod}", lambda: bool(found()))
    return found()


def test_small_run_is_scheduled_on_smallest_gpu(job_namespace: JobNamespace) -> None:
    prepare(job_namespace, "llama-3.2-3b")
    status = job_namespace.wait_for("Training")
    assert status["plan"]["gpuProduct"] == A10.name
    assert status["plan"]["gpuProducts"] == [A10.name, A100.name]
    assert 0 < status["plan"]["peakBytes"] < A10.memory_mib << 20
    assert node_of(job_namespace, TRAIN) == "small-0"


def test_run_for_a_partition_is_sized_for_it_and_scheduled_there(job_namespace: JobNamespace) -> None:
    prepare(job_namespace, "llama-3.2-3b", gpuResource=MIG.resource)
    status = job_namespace.wait_for("Training")
    assert status["plan"]["gpuProducts"] == [MIG.name]
    assert node_of(job_namespace, TRAIN) == "mig-0"
    pod = job_namespace.cluster.get("pod", job_namespace.pod_of(TRAIN), f"--namespace={job_namespace.namespace}")
    [container] = pod["spec"]["containers"]
    assert container["resources"]["limits"][MIG.resource] == "1"
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_run_too_large_for_a_partition_requests_none(job_namespace: JobNamespace) -> None:
    prepare(job_namespace, "llama-2-70b", gpuResource=MIG.resource)
    job_namespace.wait_for("Preparing", "DoesNotFit")
    assert sorted(job_namespace.jobs()) == [PREPARE]


def test_small_run_goes_to_a_large_gpu_when_the_small_one_is_taken(job_namespace: JobNamespace) -> None:
    job_namespace.cluster.kubectl("cordon", "small-0")
    try:
        prepare(job_namespace, "llama-3.2-3b")
        status = job_namespace.wait_for("Training")
        assert status["plan"]["gpuProducts"] == [A10.name, A100.name]
        assert node_of(job_namespace, TRAIN).startswith("gpu-")
    finally:
        job_namespace.cluster.kubectl("uncordon", "small-0")


def test_large_run_is_scheduled_on_large_gpu(job_namespace: JobNamespace) -> None:
    prepare(job_namespace, "llama-2-70b")
    status = job_namespace.wait_for("Training")
    assert status["plan"]["gpuProduct"] == A100.name
    assert node_of(job_namespace, TRAIN).startswith("gpu-")


def test_run_too_large_for_any_node_requests_no_gpu(job_namespace: JobNamespace) -> None:
    prepare(job_namespace, "llama-2-70b", gpuProduct=T4.name)
    status = job_namespace.wait_for("Preparing", "DoesNotFit")
    assert "more than the" in status["message"]
    assert sorted(job_namespace.jobs()) == [PREPARE]


def test_cuda_oom_retries_with_smaller_micro_batch(job_namespace: JobNamespace) -> None:
    """The word is what a trainer on a GPU says; pods and nodes are simulated."""
    prepare(job_namespace, "llama-3.2-3b")
    before = job_namespace.wait_for("Training")["plan"]
    job_namespace.end_pod(
        TRAIN, 1, make_termination_message(Reason.CUDA_OUT_OF_MEMORY, "the GPU has too little memory")
    )
    wait_until("second attempt", lambda: SECOND in job_namespace.jobs())
    job_namespace.start_pod(SECOND)
    status = job_namespace.wait_for("Training")
    assert status["plan"]["microBatchSize"] == before["microBatchSize"] // 2
    assert status["plan"]["gradientAccumulation"] == before["gradientAccumulation"] * 2
    assert [attempt["microBatchSize"] for attempt in status["attempts"]] == [
        before["microBatchSize"],
        before["microBatchSize"] // 2,
    ]
    config = json.loads(
        job_namespace.cluster.get("configmap", SECOND, f"--namespace={job_namespace.namespace}")["data"]["run.json"]
    )
    assert config["plan"]["microBatchSize"] == before["microBatchSize"] // 2


@promise(
    fault="a node dies with a training on it",
    promise="the run resumes on another node within minutes, although the dead pod never terminates",
    how="a simulated node whose kubelet stops reporting",
)
@pytest.mark.full_dose
def test_node_lost_starts_next_attempt(job_namespace: JobNamespace, outcome: Callable[[str], None]) -> None:
    cluster = job_namespace.cluster
    assert cluster.plane
    assert cluster.processes
    # Its nodes are silent as soon as the process is gone.
    start_simulator(cluster.plane, cluster.processes, pods_that_run(), MORTAL)
    cluster.add_simulated_nodes(1, MEDIUM, 1, "mortal", MORTAL)
    prepare(job_namespace, "llama-3.2-3b", gpuProduct=MEDIUM.name)
    job_namespace.wait_for("Training")
    node = node_of(job_namespace, TRAIN)
    assert node == "mortal-0"
    cluster.add_simulated_nodes(1, MEDIUM, 1, "medium")
    cluster.processes.stop(MORTAL)
    wait_until("second attempt", lambda: SECOND in job_namespace.jobs(), timeout=LONGEST_LOSS)
    assert node_of(job_namespace, SECOND) != node
    job_namespace.wait_for("Training")
    job_namespace.end_pod(SECOND, 0, PUBLISHED_MESSAGE)
    status = job_namespace.wait_for("Succeeded")
    assert [attempt["reason"] for attempt in status["attempts"]] == ["NodeLost", "Published"]
    assert status["attempts"][0]["node"] == node
    outcome(f"the next attempt ran {time_between(status).total_seconds():.0f} s after the first")


def time_between(status: dict[str, Any]) -> timedelta:
    """Return the time from the start of the first attempt to that of the second."""
    first, second = (datetime.fromisoformat(attempt["startedAt"]) for attempt in status["attempts"])
    return second - first
