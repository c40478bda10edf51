"""A run in a queue: what it says while it waits, and that the operator and the queue do not fight over the Job."""

import copy
from datetime import timedelta
from typing import Any, Final

import pytest

from qlora_api import names
from qlora_api.names import Role
from qlora_api.v1alpha1 import QueueSpec
from qlora_operator.cluster.interface import AdmissionDeniedError
from qlora_operator.lifecycle.exit_reasons import LONGEST_EVENT_LOOKUP
from qlora_operator.lifecycle.queue import describe_wait
from qlora_operator.models import ChildJob, Workload
from tests.make import NOW, PREPARED_MESSAGE, PUBLISHED_MESSAGE, make_job
from tests.unit.operator.life import PREPARE, TRAIN
from tests.unit.operator.simulation import Simulation, train

MINUTE: Final = timedelta(minutes=1)
HOUR: Final = timedelta(hours=1)
FULL: Final = (
    "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor any, 1 more needed"
)
EVICTED: Final = "Preempted to accommodate a workload (UID: 7, JobUID: 8) due to prioritization in the ClusterQueue"
NAMED: Final = {"name": "job-support-bot-1-a1b2c", "queue": "gpus"}
SENTENCE: Final = f"Job {TRAIN} is suspended until its queue admits it"


def pending(message: str = FULL, **change: Any) -> Workload:
    return Workload(**{**NAMED, "pending": message, **change})


@pytest.mark.parametrize(
    ("workload", "age", "expected"),
    [
        pytest.param(None, HOUR, "", id="not-readable"),
        pytest.param(pending(), HOUR, f": queue gpus: {FULL}", id="no-quota"),
        pytest.param(
            pending("LocalQueue gpus doesn't exist"), HOUR, ": queue gpus: LocalQueue gpus doesn't exist", id="no-queue"
        ),
        pytest.param(
            pending("ClusterQueue all is inactive"), HOUR, ": queue gpus: ClusterQueue all is inactive", id="stopped"
        ),
        pytest.param(pending(""), HOUR, "", id="not-considered-yet"),
        pytest.param(Workload(), MINUTE / 2, "", id="no-workload-yet"),
        pytest.param(Workload(), HOUR, ": spec.queue: Kueue has created no Workload for it; let", id="not-managed"),
        pytest.param(
            Workload(kueue_served=False), MINUTE, ": spec.queue: the cluster has no Kueue (it does not", id="no-kueue"
        ),
        pytest.param(
            pending(active=False, evicted="exceeding the maximum execution time"), HOUR,
            f": Workload {NAMED['name']} is deactivated: exceeding the maximum execution time; to queue it again, set",
            id="deactivated",
        ),
        pytest.param(
            pending(active=False, evicted="The workload is deactivated"), HOUR,
            f": Workload {NAMED['name']} is deactivated; to queue it again", id="deactivated-by-somebody",
        ),
        pytest.param(pending("LocalQueue  doesn't exist", queue=""), HOUR, "", id="not-in-its-queue-yet"),
        pytest.param(pending("full", queue="former"), HOUR, "", id="still-in-another-queue"),
        pytest.param(
            Workload(**NAMED, quota_reserved=True, checks=("provisioning (Pending: asked for nodes)",)), HOUR,
            ": queue gpus has reserved quota, and these admission checks are not ready: provisioning (Pending: asked",
            id="admission-check",
        ),
        pytest.param(
            Workload(**NAMED, quota_reserved=True, admitted=True), MINUTE,
            ": queue gpus has admitted it, and Kueue is about to start it", id="admitted",
        ),
        pytest.param(
            Workload(**NAMED, quota_reserved=True, admitted=True, evicted=EVICTED), MINUTE,
            f": queue gpus: {EVICTED}", id="being-evicted",
        ),
        pytest.param(
            pending("Exceeded the PodsReady timeout", requeue_at=NOW + 2 * HOUR), HOUR,
            f": queue gpus: Exceeded the PodsReady timeout; it is queued again at {NOW + 2 * HOUR:%H:%M:%S} UTC",
            id="back-off",
        ),
        pytest.param(pending(requeue_at=NOW - HOUR), HOUR, f": queue gpus: {FULL}", id="back-off-is-over"),
    ],
)  # fmt: skip
def test_run_that_waits_says_what_its_queue_says(workload: Workload | None, age: timedelta, expected: str) -> None:
    child = ChildJob(TRAIN, Role.TRAIN, 1, NOW - age, suspended=True, queue="gpus", workload=workload)
    message = describe_wait(make_job(queue={"name": "gpus"}), child, SENTENCE, NOW)
    assert message.startswith(SENTENCE + expected)
    assert len(message) == len(SENTENCE) or expected


def test_reason_of_an_eviction_is_said_once() -> None:
    workload = Workload(**NAMED, quota_reserved=True, admitted=True, evicted=EVICTED)
    child = ChildJob(TRAIN, Role.TRAIN, 1, NOW, suspended=True, queue="gpus", workload=workload)
    assert describe_wait(make_job(), child, f"Job {TRAIN} was suspended: {EVICTED}", NOW) == (
        f"Job {TRAIN} was suspended: {EVICTED}"
    )


def test_default_queue_of_the_namespace_counts_as_a_queue() -> None:
    child = ChildJob(PREPARE, Role.PREPARE, 1, NOW, suspended=True, queue="default", workload=pending(queue="default"))
    assert describe_wait(make_job(), child, SENTENCE, NOW) == f"{SENTENCE}: queue default: {FULL}"


async def test_queued_run_shows_the_reason_and_asks_ever_later() -> None:
    run = Simulation(queue={"name": "gpus"})
    run.cluster.workloads[TRAIN] = pending()
    await run.prepare()
    assert (*run.outcome, run.status["message"]) == ("Queued", "Queued", f"{SENTENCE}: queue gpus: {FULL}")
    assert run.status["gpus"] == 0
    before = run.cluster.workload_lists
    await run.run(10 * HOUR, MINUTE)
    assert 10 * HOUR / LONGEST_EVENT_LOOKUP * 0.8 < run.cluster.workload_lists - before < 140
    run.cluster.workloads[TRAIN] = pending("ClusterQueue all is inactive")
    await run.run(2 * LONGEST_EVENT_LOOKUP, MINUTE)
    assert run.status["message"] == f"{SENTENCE}: queue gpus: ClusterQueue all is inactive"
    run.cluster.workloads.clear()  # the right to read them was taken away
    await run.run(2 * LONGEST_EVENT_LOOKUP, MINUTE)
    assert run.status["message"] == f"{SENTENCE}: queue gpus: ClusterQueue all is inactive"
    run.kubernetes.admit(TRAIN)
    await run.run(MINUTE)
    assert run.outcome == ("Training", "Training")


async def test_preempted_run_says_who_preempted_it_and_what_it_waits_for() -> None:
    run = Simulation(queue={"name": "gpus"})
    await run.prepare()
    run.kubernetes.admit(TRAIN)
    await run.run(10 * MINUTE)
    run.cluster.workloads[TRAIN] = pending(evicted=EVICTED)
    run.kubernetes.preempt(TRAIN, EVICTED)
    await run.run(HOUR, MINUTE)
    assert run.outcome == ("Queued", "Queued")
    assert run.status["message"].endswith(f"once it is admitted again: {EVICTED}: queue gpus: {FULL}")
    assert run.status["gpus"] == 0


@pytest.mark.parametrize("phase", ["preparation", "training"])
async def test_template_that_the_queue_changes_is_left_as_it_is(phase: str) -> None:
    """Kueue adds node labels and tolerations of a ResourceFlavor on admission, and takes them away on eviction."""
    run = Simulation(queue={"name": "gpus"})
    job = PREPARE
    if phase == "training":
        await run.prepare()
        job = TRAIN
    else:
        await run.run(timedelta(seconds=20))
        run.kubernetes.preempt(job, "suspended by a queue that manages all Jobs")
        await run.run(MINUTE)
    original = copy.deepcopy(run.cluster.children["Job", job]["spec"]["template"])
    for flavor in ("a100", "h100", "a100"):
        pod = run.cluster.children["Job", job]["spec"]["template"]["spec"]
        pod["nodeSelector"] = {**pod.get("nodeSelector", {}), "flavor": flavor}
        pod["tolerations"] = [*pod.get("tolerations", ()), {"key": flavor, "operator": "Exists"}]
        admitted = copy.deepcopy(run.cluster.children["Job", job]["spec"]["template"])
        run.kubernetes.admit(job)
        await run.run(10 * MINUTE)
        assert run.kubernetes.runs(job)
        assert run.cluster.children["Job", job]["spec"]["template"] == admitted
        run.kubernetes.preempt(job, EVICTED)
        run.cluster.children["Job", job]["spec"]["template"] = copy.deepcopy(original)
        await run.run(10 * MINUTE)
        assert run.outcome == ("Preparing" if job == PREPARE else "Queued", "Queued")
        assert run.status["gpus"] == 0
        assert run.cluster.children["Job", job]["spec"]["template"] == original
        assert run.cluster.children["Job", job]["spec"]["suspend"] is True
    run.kubernetes.admit(job)
    await run.run(MINUTE)
    run.kubernetes.end_trainer(job, 0, PREPARED_MESSAGE if job == PREPARE else PUBLISHED_MESSAGE)
    await run.run(MINUTE)
    assert run.status["phase"] == ("Queued" if job == PREPARE else "Succeeded")
    assert run.ends == ([None] if job == PREPARE else ["Published"])


async def test_run_whose_queue_changes_waits_in_the_new_one() -> None:
    run = Simulation(queue={"name": "misspelt"})
    run.cluster.workloads[TRAIN] = pending("LocalQueue misspelt doesn't exist", queue="misspelt")
    await run.prepare()
    run.cluster.change(queue={"name": "gpus", "priorityClass": "nightly"})
    await run.run(MINUTE)
    labels = run.cluster.children["Job", TRAIN]["metadata"]["labels"]
    assert (labels[names.QUEUE_LABEL], labels[names.PRIORITY_CLASS_LABEL]) == ("gpus", "nightly")
    run.kubernetes.admit(TRAIN)
    await run.run(MINUTE)
    assert run.outcome == ("Training", "Training")
    patches = sum(write == ("patch", TRAIN) for write in run.cluster.writes)
    run.cluster.change(queue={"name": "other"})
    await run.run(MINUTE)
    assert sum(write == ("patch", TRAIN) for write in run.cluster.writes) == patches  # no queue changes what runs


async def test_queue_that_refuses_the_change_is_named_and_asked_again() -> None:
    run = Simulation(queue={"name": "gpus"})
    await run.prepare()
    run.cluster.patch_error = AdmissionDeniedError("the change of Job x was denied: immutable", permanent=True)
    run.cluster.change(queue={"name": "other"})
    await run.run(MINUTE)
    assert run.outcome == ("Queued", "Queued")
    assert run.status["message"] == "spec.queue: the change of Job x was denied: immutable"
    run.cluster.patch_error = None
    await run.run(2 * MINUTE)
    assert run.cluster.children["Job", TRAIN]["metadata"]["labels"][names.QUEUE_LABEL] == "other"
    assert "denied" not in run.status["message"]


async def test_training_job_without_queue_that_something_suspends_says_which_field_is_missing() -> None:
    run = Simulation()
    await run.run(MINUTE)
    run.kubernetes.end_trainer(PREPARE, 0, PREPARED_MESSAGE)
    await run.run(timedelta(seconds=20), timedelta(seconds=1))
    run.kubernetes.preempt(TRAIN, "manageJobsWithoutQueueName")
    await run.run(MINUTE)
    assert run.status["phase"] == "Queued"
    assert f"spec.queue: Job {TRAIN} is suspended, and the run names no queue" in run.status["message"]
    run.cluster.change(queue=QueueSpec(name="gpus").model_dump(by_alias=True))
    await run.run(MINUTE)
    assert run.cluster.children["Job", TRAIN]["metadata"]["labels"][names.QUEUE_LABEL] == "gpus"


@pytest.mark.parametrize("job", [PREPARE, TRAIN])
async def test_job_that_is_dispatched_to_another_cluster_fails_with_the_field(job: str) -> None:
    run = Simulation(queue={"name": "everywhere"})
    if job == TRAIN:
        await run.prepare()
    else:
        await run.run(timedelta(seconds=1), timedelta(seconds=1))
    run.cluster.children["Job", job]["spec"] |= {"managedBy": "kueue.x-k8s.io/multikueue", "suspend": True}
    await run.run(5 * MINUTE)
    assert run.outcome == ("Failed", "InvalidSpec")
    assert run.status["message"].startswith(
        f"spec.queue: Job {job} was handed over to kueue.x-k8s.io/multikueue (spec.managedBy)"
    )
    assert job not in run.jobs
    run.cluster.change(queue={"name": "gpus"})
    run.cluster.annotate(names.RETRY_ANNOTATION, "now")
    await run.run(MINUTE)
    assert run.status["phase"] == "Preparing"


async def test_job_that_names_the_controller_of_kubernetes_is_its() -> None:
    run = Simulation()
    await run.run(timedelta(seconds=1), timedelta(seconds=1))
    run.cluster.children["Job", PREPARE]["spec"]["managedBy"] = "kubernetes.io/job-controller"
    await run.run(MINUTE)
    assert run.outcome == ("Preparing", "Preparing")


async def queue_after_bad_node() -> Simulation:
    """Return a run whose second attempt waits in a queue, and avoids the node of the first."""
    run = Simulation(resources={"gpusPerNode": 1}, queue={"name": "gpus"})
    await run.prepare()
    run.kubernetes.admit(TRAIN)
    await run.run(MINUTE)
    [pod] = run.cluster.pods_of(TRAIN)
    pod["status"] |= {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "no devices"}
    pod["status"].pop("containerStatuses")
    await run.run(3 * MINUTE)
    assert run.status["attempts"][1]["avoidedNodes"] == ["node-0"]
    return run


async def test_job_in_queue_may_use_node_again_that_is_no_longer_avoided() -> None:
    run = await queue_after_bad_node()
    await run.run(HOUR, 5 * MINUTE)
    assert "NotIn" not in str(run.cluster.children["Job", train(2)]["spec"]["template"]["spec"])
    assert "avoidedNodes" not in run.status["attempts"][1]
    run.kubernetes.admit(train(2))
    await run.run(MINUTE)
    assert run.outcome == ("Training", "Training")
    assert train(3) not in run.jobs


async def test_job_in_queue_avoids_node_that_is_quarantined_meanwhile() -> None:
    run = await queue_after_bad_node()
    run.cluster.quarantined_nodes = {"node-7": run.cluster.now + 5 * HOUR}
    await run.run(HOUR, 5 * MINUTE)
    assert run.status["attempts"][1]["avoidedNodes"] == ["node-7"]


async def test_job_whose_placement_the_queue_is_about_to_use_is_not_changed() -> None:
    run = await queue_after_bad_node()
    run.cluster.workloads[train(2)] = pending("", quota_reserved=True)
    await run.run(HOUR, 5 * MINUTE)
    assert run.status["attempts"][1]["avoidedNodes"] == ["node-0"]


async def test_refused_change_of_avoided_nodes_neither_ends_nor_stalls_a_queued_run() -> None:
    run = await queue_after_bad_node()
    run.cluster.update_error = AdmissionDeniedError("spec.template: field is immutable", permanent=True)
    await run.run(HOUR, 5 * MINUTE)
    assert run.outcome == ("Queued", "Queued")
    assert run.passes < 40
    run.kubernetes.admit(train(2))
    await run.run(MINUTE)
    assert run.outcome == ("Training", "Training")
