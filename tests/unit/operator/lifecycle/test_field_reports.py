"""What users of other controllers of training Jobs have reported: here each run recovers, holds nothing, and publishes.

The cases are named after issues of kubeflow/trainer, kueue, jobset, volcano, kuberay and argo-workflows.
"""

from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, Final

import pytest

from qlora_api import names
from qlora_operator.models import Manifest
from tests.fake_kubernetes import is_running
from tests.fakes import wire_time
from tests.make import PREPARED_MESSAGE, PUBLISHED_MESSAGE
from tests.unit.operator.life import PREPARE_AGAIN, TRAIN
from tests.unit.operator.lifecycle.test_histories import check_end
from tests.unit.operator.simulation import Simulation

Disturbance = Callable[[Simulation], Coroutine[Any, Any, None]]
MINUTE: Final = timedelta(minutes=1)
HOUR: Final = timedelta(hours=1)


async def start(nodes: int = 1, **spec: Any) -> Simulation:
    """Return a run whose first attempt trains, or waits if something keeps it."""
    run = Simulation(resources={"nodes": nodes, "gpusPerNode": 0}, training={"globalBatchSize": 16}, **spec)
    await run.prepare()
    return run


def pod_of(run: Simulation, index: int = 0) -> Manifest:
    """Return a training pod."""
    pods = run.cluster.pods.values()
    return next(pod for pod in pods if pod["metadata"]["name"].startswith(f"{TRAIN}-{index}-"))


def refuse(pod: Manifest, reason: str, message: str = "") -> None:
    """Let the kubelet refuse a pod: no container was made."""
    pod["status"] = {
        "phase": "Failed", "reason": reason, "message": message or reason,
        "conditions": pod["status"].get("conditions", []),
    }  # fmt: skip


def refused(reason: str) -> Disturbance:
    async def disturb(run: Simulation) -> None:
        refuse(pod_of(run), reason)
        await run.run(5 * MINUTE)

    return disturb


def exits(code: int) -> Disturbance:
    async def disturb(run: Simulation) -> None:
        run.kubernetes.end_trainer(TRAIN, code, "")
        await run.run(5 * MINUTE)

    return disturb


def waits(reason: str) -> Disturbance:
    """A container that does not start: the run must give its node back at the startup deadline."""

    async def disturb(run: Simulation) -> None:
        run.kubernetes.pull_time = timedelta(days=9)
        pod = pod_of(run)
        pod["status"] |= {"phase": "Pending", "containerStatuses": [container({"waiting": {"reason": reason}})]}
        await run.run(HOUR, MINUTE)
        assert TRAIN not in run.jobs, "it gave its node back"
        run.kubernetes.pull_time = timedelta(0)

    return disturb


def container(state: Manifest) -> Manifest:
    return {"name": names.CONTAINER, "state": state}


async def node_dies(run: Simulation) -> None:
    """The pod is Terminating for ever (trainer 2072, argo 1832, jobset 576)."""
    run.kubernetes.immortal = True
    run.kubernetes._delete([pod_of(run)])
    pod_of(run)["status"]["conditions"].append(
        {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
    )
    await run.run(5 * MINUTE)
    assert run.ends[0] == "NodeLost"


async def pod_is_removed_by_force(run: Simulation) -> None:
    """Nothing is left of it (argo 13533, argo 3857)."""
    del run.cluster.pods[pod_of(run)["metadata"]["name"]]
    run.cluster.finish_job(TRAIN, "Failed")
    await run.run(2 * MINUTE)
    await prepare_again(run)


async def prepare_again(run: Simulation) -> None:
    """After a loss the preparation looks for what was published."""
    run.kubernetes.end_trainer(PREPARE_AGAIN, 0, PREPARED_MESSAGE)
    await run.run(2 * MINUTE)


async def pod_is_removed_and_made_again(run: Simulation) -> None:
    """The Job controller replaces it, as it does where the removed pod did not count as failed (trainer 364)."""
    del run.cluster.pods[pod_of(run)["metadata"]["name"]]
    await run.run(5 * MINUTE)


async def pod_is_deleted_before_it_starts(run: Simulation) -> None:
    """It waits for its image (argo 2711, argo 3006)."""
    run.kubernetes.pull_time = HOUR
    run.kubernetes._delete([pod_of(run)])
    await run.run(2 * MINUTE)
    run.kubernetes.pull_time = timedelta(0)
    await run.run(5 * MINUTE)


async def one_worker_fails(run: Simulation) -> None:
    """The others must not hold their nodes (trainer 1579)."""
    run.kubernetes.end_trainer(TRAIN, 1, "", index=1)
    await run.run(3 * MINUTE)
    first = [pod for pod in run.cluster.pods.values() if pod["metadata"]["name"].startswith(f"{TRAIN}-")]
    assert not any(is_running(pod) for pod in first)


async def worker_is_evicted_and_its_room_taken(run: Simulation) -> None:
    """The gang waits for a node without holding the others, and fails at no time (volcano 4950, 5805)."""
    run.kubernetes._delete([pod_of(run, 1)])
    run.kubernetes.nodes = 1
    await run.run(8 * HOUR, 2 * MINUTE)
    assert run.status["phase"] != "Failed", run.status["message"]
    run.kubernetes.nodes = 100


async def queue_evicts_before_pods_are_ready(run: Simulation) -> None:
    """Kueue's waitForPodsReady (kueue 4224, 14811): admitted and taken back again and again, for days."""
    run.kubernetes.pull_time = HOUR
    for _ in range(30):
        run.kubernetes.admit(TRAIN)
        await run.run(5 * MINUTE, MINUTE)
        run.kubernetes.preempt(TRAIN, "Exceeded the PodsReady timeout")
        await run.run(HOUR, 10 * MINUTE)
    assert run.ends == [None], "it has only waited"
    run.kubernetes.pull_time = timedelta(0)


async def pods_are_preempted_again_and_again(run: Simulation) -> None:
    """Two runs evict each other (volcano 377); each time there is some progress."""
    for number in range(1, 12):
        job = names.train_job_name("support-bot", number)
        for _ in range(40):
            if run.kubernetes.runs(job):
                break
            await run.run(MINUTE)
        run.kubernetes.end_trainer(job, 143, "")
        await run.run(MINUTE)
    assert run.status["phase"] != "Failed", run.status["message"]


async def job_is_deleted_while_the_operator_is_away(run: Simulation) -> None:
    """Somebody cleans up (trainer 2185: deleted when a limit of another tool is exceeded)."""
    run.cluster.remove(TRAIN)
    run.cluster.pass_time(5 * HOUR)
    await run.run(5 * MINUTE)
    await prepare_again(run)


async def pod_succeeds_and_is_evicted_at_once(run: Simulation) -> None:
    """The kubelet overwrites the phase, but the termination message counts (argo 1832)."""
    run.kubernetes.end_trainer(TRAIN, 0, PUBLISHED_MESSAGE)
    pod_of(run)["status"] |= {
        "phase": "Failed",
        "reason": "Evicted",
        "message": "The node was low on resource: memory.",
    }
    await run.run(2 * MINUTE)
    assert run.outcome == ("Succeeded", "Published")


async def suspended_while_its_pod_waits(run: Simulation) -> None:
    """Suspension deletes at once what only waits (kuberay 1791)."""
    run.cluster.change(suspend=True)
    await run.run(3 * MINUTE)
    assert TRAIN not in run.jobs
    run.cluster.change(suspend=False)
    await run.run(3 * MINUTE)


async def native_sidecar_never_becomes_ready(run: Simulation) -> None:
    """An injected init container crashes for ever; the trainer's container stays in PodInitializing."""
    await waits("PodInitializing")(run)


async def times_of_a_node_are_wrong(run: Simulation) -> None:
    """Its containers ended before they started, a day ago (kuberay 1933: startTime redefined)."""
    [status] = pod_of(run)["status"]["containerStatuses"]
    day_ago = wire_time(run.cluster.now - timedelta(days=1))
    status["state"] = {"terminated": {"exitCode": 137, "startedAt": wire_time(run.cluster.now), "finishedAt": day_ago}}
    pod_of(run)["status"]["phase"] = "Failed"
    await run.run(5 * MINUTE)


SINGLE: Final[dict[str, Disturbance]] = {
    "trainer 1570: graceful node shutdown": refused("NodeShutdown"),
    "trainer 1570: pod was terminated by the shutdown": refused("Terminated"),
    "kubernetes 125579: devices are not there after a reboot": refused("UnexpectedAdmissionError"),
    "kubernetes 130145: devices unavailable": refused("OutOfnvidia.com/gpu"),
    "kubelet: no room for pods": refused("OutOfpods"),
    "kubelet: label of the node was changed": refused("NodeAffinity"),
    "kubelet: topology manager": refused("TopologyAffinityError"),
    "pod-level deadline of a policy": refused("DeadlineExceeded"),
    "trainer 2044: exit code below 128": exits(2),
    "exit code of a full disk": exits(28),
    "exit code of a signal": exits(139),
    "exit code of an unknown killer": exits(137),
    "argo 947: ImagePullBackOff": waits("ImagePullBackOff"),
    "argo 3857: ContainerCreating for hours": waits("ContainerCreating"),
    "CreateContainerConfigError": waits("CreateContainerConfigError"),
    "init container crashes": native_sidecar_never_becomes_ready,
    "trainer 2072: node is off": node_dies,
    "argo 13533: force deletion": pod_is_removed_by_force,
    "trainer 364: pod is replaced": pod_is_removed_and_made_again,
    "argo 2711: deleted before it started": pod_is_deleted_before_it_starts,
    "volcano 377: endless eviction": pods_are_preempted_again_and_again,
    "trainer 2185: Job is deleted": job_is_deleted_while_the_operator_is_away,
    "kuberay 1791: suspended": suspended_while_its_pod_waits,
    "clock of a node": times_of_a_node_are_wrong,
    "evicted after its end": pod_succeeds_and_is_evicted_at_once,
}


@pytest.mark.parametrize("case", SINGLE)
async def test_run_recovers_from_what_others_reported(case: str) -> None:
    run = await start()
    await SINGLE[case](run)
    await check_end(run)
    assert run.outcome == ("Succeeded", "Published"), run.status["message"]


@pytest.mark.parametrize("disturb", [one_worker_fails, worker_is_evicted_and_its_room_taken])
async def test_gang_recovers_from_what_others_reported(disturb: Disturbance) -> None:
    run = await start(nodes=2)
    await disturb(run)
    await check_end(run)
    assert run.outcome == ("Succeeded", "Published"), run.status["message"]


async def test_queued_run_recovers_from_what_others_reported() -> None:
    run = await start(queue={"name": "gpus"})
    await queue_evicts_before_pods_are_ready(run)
    await check_end(run)
    assert run.outcome == ("Succeeded", "Published"), run.status["message"]
