"""Runs whose attempts end for causes of the run, a node, a service or the cluster, from the cause to the outcome."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import pytest

from qlora_api import names
from qlora_api.names import Phase
from qlora_api.reasons import Domain, Reason
from qlora_api.v1alpha1 import Attempt, Checkpoint, Progress
from qlora_operator.lifecycle import is_blamed
from tests.fakes import FakeCluster
from tests.make import (
    NOW,
    PREPARED_MESSAGE,
    PUBLISHED_MESSAGE,
    REF,
    make_manifest,
    make_prepared,
    make_termination_message,
)
from tests.unit.operator.life import PREPARE, TRAIN, reconcile_now, reconcile_until_stable

Fault = Callable[[FakeCluster, str], None]
"""What happens to the pod of a Job."""


@pytest.fixture
def cluster() -> FakeCluster:
    fake = FakeCluster()
    fake.submit(make_manifest(retries={"maxAttempts": 2}))
    return fake


SUSPENDED: dict[str, Any] = {
    "reason": Reason.SUSPENDED_BY_USER,
    "started_at": NOW,
    "finished_at": NOW + timedelta(minutes=1),
}


def train(number: int) -> str:
    return names.train_job_name(REF.name, number)


async def start(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)


async def wait(cluster: FakeCluster, duration: timedelta) -> None:
    cluster.pass_time(duration)
    await reconcile_until_stable(cluster)


def checkpoint(step: int) -> Checkpoint:
    uri = f"{make_prepared().prefix}/checkpoints/step-{step:06}-a1"
    return Checkpoint(step=step, uri=uri, time=NOW, verified=True)


def outcome(cluster: FakeCluster) -> tuple[str, str]:
    return cluster.status["phase"], cluster.status["reason"]


def affinity_of(cluster: FakeCluster, number: int) -> dict[str, Any]:
    pod = cluster.children["Job", train(number)]["spec"]["template"]["spec"]
    return dict(pod.get("affinity", {}).get("nodeAffinity", {}))


def excluded(affinity: dict[str, Any]) -> list[str]:
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
    return [field["values"][0] for term in terms for field in term["matchFields"]]


def terminated(code: int, reason: str, message: str = "") -> dict[str, Any]:
    return {
        "terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": "2026-03-01T12:00:00Z"}
    }


def fail(cluster: FakeCluster, job: str, state: dict[str, Any], **status: Any) -> None:
    cluster.set_pod(job, "Failed", state, **status)
    cluster.finish_job(job, "Failed")


def refuses(reason: str, message: str) -> Fault:
    return lambda cluster, job: fail(cluster, job, {}, reason=reason, message=message)


def exits(code: int, reason: str = "Error", message: str = "") -> Fault:
    return lambda cluster, job: fail(cluster, job, terminated(code, reason, message))


def never_starts(reason: str) -> Fault:
    def fault(cluster: FakeCluster, job: str) -> None:
        cluster.set_pod(job, "Pending", {"waiting": {"reason": reason, "message": "why"}})
        cluster.pass_time(timedelta(minutes=31))

    return fault


NODE_FAULTS: dict[str, Fault] = {
    "refused-after-a-reboot": refuses("UnexpectedAdmissionError", "requested number of devices unavailable"),
    "driver-not-loaded": exits(128, "StartError", "nvml error: driver not loaded"),
    "container-cannot-run": exits(127, "ContainerCannotRun", "no such file"),
    "image-not-pulled": never_starts("ImagePullBackOff"),
    "volumes-not-mounted": never_starts("ContainerCreating"),
    "aborted": exits(134, message="terminate called"),
    "bus-error": exits(135),
    "segmentation-fault": exits(139),
    "killed-by-nobody": exits(137),
    "exit-code-alone": exits(1, message="Traceback"),
    "unknown-cuda-error": exits(
        1, message=make_termination_message(Reason.TRAINER_ERROR, "CUDA error: illegal access")
    ),
    "hangs": exits(1, message=make_termination_message(Reason.HEARTBEAT_LOST, "no step")),
}


@pytest.mark.parametrize("fault", NODE_FAULTS.values(), ids=NODE_FAULTS)
async def test_node_fault_is_retried_on_another_node(cluster: FakeCluster, fault: Fault) -> None:
    await start(cluster)
    fault(cluster, TRAIN)
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.SCHEDULING
    assert cluster.status["attempts"][0]["domain"] == Domain.NODE
    assert ("Job", train(2)) not in cluster.children, "it backs off"
    await wait(cluster, timedelta(minutes=1))
    affinity = affinity_of(cluster, 2)
    preferred = affinity.get("preferredDuringSchedulingIgnoredDuringExecution", [])
    soft = [field["values"][0] for term in preferred for field in term["preference"]["matchFields"]]
    assert [*excluded(affinity), *soft] == ["node-1"]
    cluster.start_pod(train(2))
    cluster.end_pod(train(2), 0, PUBLISHED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Succeeded", "Published")


CLUSTER_FAULTS: dict[str, Fault] = {
    "refused-by-a-node-that-shuts-down": refuses("NodeShutdown", "is shutting down"),
    "terminated-by-the-kubelet": refuses("Terminated", "Pod was terminated"),
    "deadline-of-a-policy": refuses("DeadlineExceeded", "Pod was active on the node longer than the deadline"),
    "out-of-gpus": refuses("OutOfnvidia.com/gpu", "Node didn't have enough resource"),
    "affinity-no-longer-matches": refuses("NodeAffinity", "Predicate failed"),
    "topology": refuses("TopologyAffinityError", "Resources cannot be allocated with Topology locality"),
    "rebooted": exits(255, "Unknown"),
}


@pytest.mark.parametrize("fault", CLUSTER_FAULTS.values(), ids=CLUSTER_FAULTS)
async def test_lack_of_room_is_waited_for_and_blames_no_node(cluster: FakeCluster, fault: Fault) -> None:
    await start(cluster)
    for number in range(1, 9):
        fault(cluster, train(number))
        await reconcile_until_stable(cluster)
        await wait(cluster, timedelta(minutes=11))
    assert cluster.status["phase"] == Phase.SCHEDULING
    attempts = [Attempt.model_validate(attempt) for attempt in cluster.status["attempts"] if "reason" in attempt]
    assert [attempt.domain for attempt in attempts] == [Domain.CLUSTER] * 8
    assert not any(map(is_blamed, attempts))
    preferred = affinity_of(cluster, 9)["preferredDuringSchedulingIgnoredDuringExecution"]
    assert preferred[0]["preference"]["matchFields"][0]["values"] == ["node-1"]


VAULT: Final = {
    "name": "vault-agent-init",
    "state": {"terminated": {"exitCode": 1, "reason": "Error", "message": "connection refused"}},
}


async def test_failed_init_container_is_named_and_waited_for(cluster: FakeCluster) -> None:
    await start(cluster)
    for number in range(1, 9):
        ready = {"name": "wait", "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}
        fail(cluster, train(number), {"waiting": {"reason": "PodInitializing"}}, initContainerStatuses=[ready, VAULT])
        await reconcile_until_stable(cluster)
        await wait(cluster, timedelta(minutes=11))
    assert cluster.status["phase"] == Phase.SCHEDULING
    first = cluster.status["attempts"][0]
    assert (first["reason"], first["domain"]) == (Reason.POD_REJECTED, Domain.SERVICE)
    assert "init container vault-agent-init exited with code 1 (Error: connection refused)" in first["message"]


@pytest.mark.parametrize(
    ("state", "said", "domain"),
    [
        pytest.param({"running": {}}, "init container vault-agent-init has not ended", Domain.SERVICE, id="hangs"),
        pytest.param(
            {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}},
            "init container vault-agent-init has not ended (ImagePullBackOff no such image)",
            Domain.NODE,
            id="its-image-is-missing",
        ),
        pytest.param({"waiting": {"reason": "PodInitializing"}}, ": PodInitializing", Domain.NODE, id="not-begun"),
    ],
)
async def test_pod_that_does_not_start_names_the_init_container_that_it_waits_for(
    cluster: FakeCluster, state: dict[str, Any], said: str, domain: Domain
) -> None:
    await start(cluster)
    statuses = [{"name": "proxy", "started": True, "state": {"running": {}}}, {**VAULT, "state": state}]
    cluster.set_pod(TRAIN, "Pending", {"waiting": {"reason": "PodInitializing"}}, initContainerStatuses=statuses)
    cluster.pass_time(timedelta(minutes=31))
    await reconcile_until_stable(cluster)
    [first] = cluster.status["attempts"]
    assert (first["reason"], first["domain"]) == (Reason.STARTUP_DEADLINE_EXCEEDED, domain)
    assert said in first["message"]


def exceed_memory(cluster: FakeCluster, number: int, after: timedelta) -> None:
    cluster.start_pod(train(number))
    cluster.pass_time(after)
    cluster.end_pod(train(number), 137, "", keep_start=True)
    cluster.pods[train(number)]["status"]["containerStatuses"][0]["state"]["terminated"]["reason"] = "OOMKilled"


async def test_gpu_run_that_exceeds_its_memory_late_is_retried_once_on_another_node() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest(resources={"gpusPerNode": 1}))
    await start(cluster)
    exceed_memory(cluster, 1, timedelta(hours=20))
    await reconcile_until_stable(cluster)
    assert cluster.status["attempts"][0]["domain"] == Domain.NODE
    await wait(cluster, timedelta(minutes=1))
    preferred = affinity_of(cluster, 2)["preferredDuringSchedulingIgnoredDuringExecution"]
    assert preferred[0]["preference"]["matchFields"][0]["values"] == ["node-1"]
    exceed_memory(cluster, 2, timedelta(hours=20))
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Failed", "HostOutOfMemory")


async def test_gpu_run_that_exceeds_its_memory_while_it_loads_is_not_retried() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest(resources={"gpusPerNode": 1}))
    await start(cluster)
    exceed_memory(cluster, 1, timedelta(minutes=3))
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Failed", "HostOutOfMemory")


@pytest.mark.parametrize(("hours", "phase"), [(20, Phase.SCHEDULING), (0, Phase.FAILED)])
@pytest.mark.parametrize("reason", [Reason.S3_DENIED, Reason.GATED_MODEL_NO_ACCESS])
async def test_run_that_had_access_waits_for_renewed_keys(
    cluster: FakeCluster, reason: Reason, hours: int, phase: Phase
) -> None:
    await start(cluster)
    cluster.start_pod(TRAIN)
    cluster.pass_time(timedelta(hours=hours))
    denied = make_termination_message(reason, "ExpiredToken")
    cluster.end_pod(TRAIN, 1, denied, keep_start=True)
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == phase
    if phase is Phase.FAILED:
        return
    for number in range(2, 20):
        await wait(cluster, timedelta(minutes=11))
        cluster.start_pod(train(number))
        cluster.end_pod(train(number), 1, denied, keep_start=True)
        await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.SCHEDULING
    assert cluster.status["attempts"][-1]["domain"] == Domain.SERVICE


@pytest.mark.parametrize("fault", NODE_FAULTS.values(), ids=NODE_FAULTS)
async def test_node_faults_are_bounded(cluster: FakeCluster, fault: Fault) -> None:
    await start(cluster)
    for number in range(1, 8):
        if cluster.status["phase"] == Phase.FAILED:
            break
        fault(cluster, train(number))
        await reconcile_until_stable(cluster)
        await wait(cluster, timedelta(minutes=11))
    assert cluster.status["phase"] == Phase.FAILED
    assert cluster.status["reason"] in {"RetriesExhausted", "TrainerError"}
    assert len(cluster.status["attempts"]) <= 6


async def test_pod_deleted_before_it_had_a_node_is_retried(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.set_pod(TRAIN, "Failed", {})
    cluster.pods[TRAIN]["metadata"]["deletionTimestamp"] = "2026-03-01T12:00:00Z"
    cluster.pods[TRAIN]["spec"] = {}
    cluster.pods[TRAIN]["status"] = {"phase": "Failed"}
    cluster.finish_job(TRAIN, "Failed")
    await reconcile_until_stable(cluster)
    assert cluster.status["attempts"][0]["reason"] == "Interrupted"
    assert ("Job", train(2)) in cluster.children


async def test_pod_refused_after_the_deadline_of_its_job_never_ran(cluster: FakeCluster) -> None:
    await start(cluster)
    fail(cluster, TRAIN, {}, reason="OutOfcpu", message="Node has no cpu left")
    cluster.finish_job(TRAIN, "Failed", "DeadlineExceeded")
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.SCHEDULING
    assert cluster.status["attempts"][0]["reason"] == "Interrupted"


async def test_gang_that_got_some_nodes_blames_none() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest(resources={"nodes": 2}))
    await start(cluster)
    cluster.set_pod(TRAIN, "Pending", {"waiting": {"reason": "ContainerCreating"}})
    second = {
        "metadata": {**cluster.pods[TRAIN]["metadata"], "name": "second", "uid": "second"},
        "spec": {},
        "status": {},
    }
    second["metadata"]["annotations"] = {"batch.kubernetes.io/job-completion-index": "1"}
    cluster.pods["second"] = second
    cluster.start_pod(TRAIN)
    await wait(cluster, timedelta(minutes=31))
    first = cluster.status["attempts"][0]
    assert (first["reason"], first["domain"]) == ("StartupDeadlineExceeded", Domain.CLUSTER)
    assert [name for kind, name in cluster.children if kind == "Job" and name != PREPARE] == [], "it holds no node"
    assert cluster.status["gpus"] == 0
    await wait(cluster, timedelta(minutes=3))
    assert affinity_of(cluster, 2) == {}


async def test_service_outage_of_hours_does_not_end_a_run(cluster: FakeCluster) -> None:
    await start(cluster)
    number, began = 1, cluster.now
    while cluster.now - began < timedelta(hours=5):
        if ("Job", train(number)) in cluster.children:
            cluster.start_pod(train(number))
            cluster.pass_time(timedelta(seconds=90))
            cluster.end_pod(train(number), 1, make_termination_message(Reason.S3_UNAVAILABLE, "503"))
            number += 1
        await wait(cluster, timedelta(minutes=4))
    assert cluster.status["phase"] == Phase.SCHEDULING
    await wait(cluster, timedelta(minutes=10))
    cluster.start_pod(train(number))
    cluster.end_pod(train(number), 0, PUBLISHED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Succeeded", "Published")


async def test_sigkill_without_a_cause_is_bounded(cluster: FakeCluster) -> None:
    await start(cluster)
    number = 1
    for _ in range(200):
        if ("Job", train(number)) in cluster.children:
            cluster.start_pod(train(number))
            cluster.end_pod(train(number), 137, "")
            number += 1
        await wait(cluster, timedelta(minutes=1))
    assert outcome(cluster) == ("Failed", "RetriesExhausted")
    assert number - 1 == 6
    assert "6 attempts failed on node-1," in cluster.status["message"]
    assert (
        "the last one ended with Interrupted: pod support-bot-6-0-uid-27 was killed by SIGKILL"
        in cluster.status["message"]
    )
    assert "raise spec.retries.maxAttempts" in cluster.status["message"]


async def test_progress_refills_the_budget_of_the_run(cluster: FakeCluster) -> None:
    await start(cluster)
    for number in range(1, 6):
        cluster.start_pod(train(number))
        message = make_termination_message(Reason.CUDA_OUT_OF_MEMORY, "too few", checkpoint=checkpoint(10 * number))
        cluster.end_pod(train(number), 1, message)
        if cluster.status["plan"]["microBatchSize"] == 1:
            break
        await reconcile_until_stable(cluster)
        assert cluster.status["phase"] == Phase.SCHEDULING
    assert [attempt["checkpointStep"] for attempt in cluster.status["attempts"]][:2] == [10, 20]


async def test_reported_checkpoint_counts_as_progress(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.start_pod(TRAIN)
    live = Progress(percent=20, step=50, updated_at=cluster.now, phase=Phase.TRAINING, checkpoint=checkpoint(50))
    await reconcile_until_stable(cluster, live)
    cluster.end_pod(TRAIN, 137, "")
    await reconcile_until_stable(cluster, live)
    assert cluster.status["attempts"][0]["checkpointStep"] == 50


async def test_third_attempt_may_be_lost_after_two_drains(cluster: FakeCluster) -> None:
    await start(cluster)
    for number in (1, 2):
        cluster.start_pod(train(number))
        cluster.end_pod(train(number), 143, make_termination_message(Reason.INTERRUPTED, "asked to stop"))
        await reconcile_until_stable(cluster)
        await wait(cluster, timedelta(minutes=1))
    cluster.start_pod(train(3))
    await reconcile_until_stable(cluster)
    cluster.remove(train(3))
    await reconcile_until_stable(cluster)
    assert cluster.status["attempts"][2]["reason"] == "PodLost"
    await wait(cluster, timedelta(minutes=1))
    assert cluster.status["phase"] == Phase.PREPARING
    cluster.end_pod(names.prepare_job_name(REF.name, 2), 0, PREPARED_MESSAGE)
    await wait(cluster, timedelta(minutes=1))
    assert ("Job", train(4)) in cluster.children


@pytest.mark.parametrize("cause", ["suspension", "drain"])
async def test_attempts_beyond_a_hundred_keep_the_status_writable(cluster: FakeCluster, cause: str) -> None:
    cluster.invalid_status = lambda status: "too many attempts" if len(status.get("attempts", ())) > 100 else None
    await start(cluster)
    assert cluster.job
    many = [Attempt(number=number, job=train(number), **SUSPENDED) for number in range(1, 99)]
    cluster.job["status"]["attempts"] = [attempt.model_dump(mode="json", by_alias=True) for attempt in many]
    for number in range(99, 103):
        await reconcile_until_stable(cluster)
        cluster.start_pod(train(number))
        await reconcile_until_stable(cluster)
        if cause == "suspension":
            cluster.change(suspend=True)
            await reconcile_until_stable(cluster)
            cluster.change(suspend=False)
        else:
            message = make_termination_message(Reason.INTERRUPTED, "stop", checkpoint=checkpoint(number))
            cluster.end_pod(train(number), 143, message)
    await reconcile_until_stable(cluster)
    numbers = [attempt["number"] for attempt in cluster.status["attempts"]]
    assert numbers == [1, *range(5, 104)]
    assert cluster.status["earlierAttempts"] == {"count": 3, "seconds": 180}
    cluster.start_pod(train(103))
    cluster.end_pod(train(103), 0, PUBLISHED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Succeeded", "Published")


async def test_job_of_an_attempt_that_is_no_longer_listed_is_not_lost(cluster: FakeCluster) -> None:
    await start(cluster)
    for number in (1, 2, 3):
        cluster.start_pod(train(number))
        cluster.end_pod(train(number), 143, make_termination_message(Reason.INTERRUPTED, "asked to stop"))
        await reconcile_until_stable(cluster)
        await wait(cluster, timedelta(minutes=1))
    assert cluster.job
    first, _, third, fourth = cluster.job["status"]["attempts"]
    cluster.job["status"]["attempts"] = [first, third, fourth]
    cluster.children["Job", train(2)]["metadata"]["deletionTimestamp"] = "2026-03-01T12:00:00Z"
    cluster.start_pod(train(4))
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.TRAINING


async def test_only_node_is_tried_again_when_it_is_no_longer_avoided(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.start_pod(TRAIN)
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.ACCELERATOR_MISSING, "no CUDA device"))
    await reconcile_until_stable(cluster)
    await wait(cluster, timedelta(minutes=1))
    assert excluded(affinity_of(cluster, 2)) == ["node-1"]
    assert cluster.status["attempts"][1]["avoidedNodes"] == ["node-1"]
    make_unschedulable(cluster, 2)
    await reconcile_until_stable(cluster)
    assert "0/1 nodes are available; avoided until 12:10 UTC" in cluster.status["message"]
    waits = (await reconcile_now(cluster)).requeue_after
    assert waits is not None
    await wait(cluster, waits + timedelta(seconds=1))
    assert ("Job", train(2)) not in cluster.children
    assert cluster.status["attempts"][1]["reason"] == "Unschedulable"
    await wait(cluster, timedelta(minutes=1))
    assert excluded(affinity_of(cluster, 3)) == []
    assert affinity_of(cluster, 3)["preferredDuringSchedulingIgnoredDuringExecution"]


async def test_quarantined_node_is_avoided_by_every_new_attempt(cluster: FakeCluster) -> None:
    cluster.quarantined_nodes = {"gpu-7": NOW + timedelta(minutes=40)}
    await start(cluster)
    assert excluded(affinity_of(cluster, 1)) == ["gpu-7"]
    avoids = "it avoids nodes on which attempts failed: gpu-7 (until 12:40 UTC)"
    assert [event["reason"] for event in cluster.events.values() if avoids in event["note"]] == ["Scheduling"]
    make_unschedulable(cluster, 1)
    await wait(cluster, timedelta(minutes=20))
    assert ("Job", train(1)) in cluster.children, "a quarantine holds while it lasts"
    cluster.quarantined_nodes = {}
    await wait(cluster, timedelta(minutes=21))
    await wait(cluster, timedelta(minutes=1))
    assert affinity_of(cluster, 2) == {}


async def test_gang_that_avoids_a_node_keeps_its_startup_deadline() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest(resources={"nodes": 2}))
    cluster.quarantined_nodes = {"gpu-7": NOW + timedelta(hours=1)}
    await start(cluster)
    cluster.start_pod(TRAIN)
    waiting = {**cluster.pods[TRAIN]["metadata"], "name": "second", "uid": "second"}
    waiting["annotations"] = {"batch.kubernetes.io/job-completion-index": "1"}
    condition = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available"}
    status = {"phase": "Pending", "conditions": [condition]}
    cluster.pods["second"] = {"metadata": waiting, "spec": {}, "status": status}
    outcome_then = await reconcile_now(cluster)
    assert outcome_then.requeue_after == timedelta(minutes=30)
    assert outcome(cluster) == ("Scheduling", "Unschedulable")


async def test_pod_that_avoids_nothing_waits_forever(cluster: FakeCluster) -> None:
    await start(cluster)
    make_unschedulable(cluster, 1)
    await wait(cluster, timedelta(days=9))
    assert outcome(cluster) == ("Scheduling", "Unschedulable")
    assert len(cluster.status["attempts"]) == 1


def make_unschedulable(cluster: FakeCluster, number: int) -> None:
    cluster.set_pod(train(number), "Pending", {})
    cluster.pods[train(number)]["spec"] = {}
    condition = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available"}
    cluster.pods[train(number)]["status"] = {"phase": "Pending", "conditions": [condition]}


async def test_forged_termination_message_is_not_retried(cluster: FakeCluster) -> None:
    await start(cluster)
    foreign = Checkpoint(step=1, uri="s3://elsewhere/step-1", time=NOW)
    cluster.start_pod(TRAIN)
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.S3_UNAVAILABLE, "503", checkpoint=foreign))
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Failed", "TrainerError")


def silent(cluster: FakeCluster) -> Progress:
    return Progress(percent=20, step=50, updated_at=cluster.now, phase=Phase.TRAINING)


async def test_runs_that_fall_silent_together_do_not_hang(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.start_pod(TRAIN)
    live = silent(cluster)
    cluster.others_reported_at = (cluster.now, cluster.now + timedelta(seconds=5))
    await reconcile_until_stable(cluster, live)
    for _ in range(12):
        await wait_silently(cluster, timedelta(minutes=20), live)
    assert cluster.status["phase"] == Phase.TRAINING
    assert (await reconcile_now(cluster, live)).requeue_after == timedelta(minutes=5)


async def test_runs_silent_since_before_a_restart_do_not_hang(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.start_pod(TRAIN)
    live = silent(cluster)
    cluster.others_reported_at = (cluster.now,)
    await reconcile_until_stable(cluster, live)
    cluster.pass_time(timedelta(hours=2))
    cluster.reports_since = cluster.now
    for _ in range(12):
        await wait(cluster, timedelta(minutes=20))
    assert cluster.status["phase"] == Phase.TRAINING


async def test_run_without_neighbours_hangs_after_a_longer_time(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.start_pod(TRAIN)
    live = silent(cluster)
    cluster.others_reported_at = (cluster.now - timedelta(hours=1),)
    await reconcile_until_stable(cluster, live)
    await wait_silently(cluster, timedelta(minutes=58), live)
    assert cluster.status["phase"] == Phase.TRAINING
    await wait_silently(cluster, timedelta(minutes=3), live)
    assert cluster.status["attempts"][0]["reason"] == "HeartbeatLost"


async def wait_silently(cluster: FakeCluster, duration: timedelta, live: Progress) -> None:
    cluster.pass_time(duration)
    await reconcile_until_stable(cluster, live)
