"""Waiting is not training: queues, quotas, full clusters, preemption, and what outlives the end of a trainer."""

from datetime import datetime, timedelta
from typing import Final

import pytest

from qlora_api.reasons import Reason
from qlora_operator.cluster.interface import AdmissionDeniedError
from qlora_operator.lifecycle.job_deadline import SAFETY_MARGIN, STOP_NOW
from qlora_operator.lifecycle.leftovers import END_GRACE
from tests.make import PREPARED_MESSAGE, PUBLISHED_MESSAGE, make_termination_message
from tests.unit.operator.life import PREPARE, TRAIN, reconcile_now
from tests.unit.operator.simulation import Simulation, train

SECOND: Final = train(2)
GANG: Final = {"resources": {"nodes": 2, "gpusPerNode": 0}, "training": {"globalBatchSize": 16}}
QUOTA: Final = 'pods "support-bot-1-0-abcde" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=1'
PREEMPTION: Final = "Preempted to accommodate a workload (UID: 7, JobUID: 8) due to prioritization in the ClusterQueue"
MINUTE: Final = timedelta(minutes=1)
HOUR: Final = timedelta(hours=1)


def container_seconds(run: Simulation) -> int:
    """Return what the status counts of the containers of all attempts."""
    total = 0.0
    for attempt in run.status["attempts"]:
        total += attempt.get("containerSeconds", 0)
        if since := attempt.get("runningSince"):
            total += (run.cluster.now - datetime.fromisoformat(since)).total_seconds()
    return int(total)


# A pod that does not exist yet


@pytest.mark.parametrize("nodes", [1, 2])
async def test_run_admitted_after_hours_in_queue_trains(nodes: int) -> None:
    run = Simulation(**GANG | {"resources": {"nodes": nodes, "gpusPerNode": 0}}, queue={"name": "gpus"})
    run.kubernetes.pods_per_step = 1
    await run.prepare()
    await run.run(5 * HOUR, MINUTE)
    assert run.outcome == ("Queued", "Queued")
    run.kubernetes.admit(TRAIN)
    await run.react()  # before the Job controller has noticed
    run.kubernetes.pods_per_step = 0  # which is busy with others
    await run.run(MINUTE)
    run.kubernetes.pods_per_step = 1
    await run.run(5 * MINUTE)
    assert run.outcome == ("Training", "Training")


@pytest.mark.parametrize("job", [PREPARE, TRAIN])
async def test_refused_pod_is_waited_for_with_the_sentence_of_the_api_server(job: str) -> None:
    run = Simulation()
    if job == TRAIN:
        await run.run(MINUTE)
        run.kubernetes.end_trainer(PREPARE, 0, PREPARED_MESSAGE)
    run.kubernetes.refusal = QUOTA
    await run.run(MINUTE)
    assert run.outcome[1] == Reason.POD_REJECTED
    assert run.status["message"] == f"Job {job} gets no pod: {QUOTA}"
    before = run.cluster.event_lists
    await run.run(10 * HOUR, MINUTE)
    assert run.outcome == ("Preparing" if job == PREPARE else "Scheduling", "PodRejected")
    assert run.cluster.event_lists - before <= 10 * 60
    run.kubernetes.refusal = ""
    await run.run(MINUTE)
    assert run.outcome == (("Preparing", "Preparing") if job == PREPARE else ("Training", "Training"))


async def test_missing_pod_without_event_names_kubectl_describe() -> None:
    run = Simulation()
    run.kubernetes.pods_per_step = 0
    await run.run(MINUTE)
    assert run.status["message"] == f"Job {PREPARE} has no pod yet; `kubectl describe job {PREPARE}` shows its Events"


async def test_gang_that_is_created_in_parts_trains() -> None:
    run = Simulation(**GANG)
    await run.run(MINUTE)
    run.kubernetes.pods_per_step = 0
    run.kubernetes.end_trainer(PREPARE, 0, PREPARED_MESSAGE)
    await run.run(2 * HOUR, MINUTE)
    run.kubernetes.pods_per_step = 1
    await run.run(timedelta(seconds=20))
    run.kubernetes.pods_per_step = 0
    assert len(run.cluster.pods_of(TRAIN)) == 1
    await run.run(20 * MINUTE)
    run.kubernetes.pods_per_step = 1
    await run.run(2 * MINUTE)
    assert (run.outcome, run.ends) == (("Training", "Training"), [None])


async def test_partly_placed_gang_gives_its_node_back_at_startup_deadline() -> None:
    run = Simulation(**GANG)
    run.kubernetes.nodes = 1
    await run.prepare()
    await run.run(29 * MINUTE)
    assert run.status["phase"] == "Scheduling"
    await run.run(5 * MINUTE)
    assert run.ends[0] == "StartupDeadlineExceeded"
    assert "only 1 of 2 pods got a node" in run.status["attempts"][0]["message"]


# deadlines.total


async def test_waiting_for_a_node_does_not_count_for_total() -> None:
    run = Simulation(deadlines={"total": "1h"})
    await run.prepare()
    await run.run(MINUTE)
    run.kubernetes.preempt(TRAIN, PREEMPTION)
    await run.run(MINUTE)
    run.kubernetes.nodes = 0
    run.kubernetes.admit(TRAIN)
    await run.run(48 * HOUR, 10 * MINUTE)
    assert run.outcome == ("Scheduling", "Unschedulable")
    run.kubernetes.nodes = 1
    await run.run(50 * MINUTE)
    assert run.outcome == ("Training", "Training")
    await run.run(20 * MINUTE)
    assert run.outcome == ("Failed", "DeadlineExceeded")
    assert container_seconds(run) == pytest.approx(3600, abs=60)


async def test_preparation_that_waits_for_cpu_has_its_hour() -> None:
    run = Simulation()
    run.kubernetes.nodes = 0
    await run.run(5 * HOUR, MINUTE)
    assert run.outcome == ("Preparing", "Unschedulable")
    run.kubernetes.nodes = 1
    await run.run(55 * MINUTE)
    assert run.outcome == ("Preparing", "Preparing")
    await run.run(10 * MINUTE)
    assert run.outcome == ("Failed", "DeadlineExceeded")


async def test_total_sums_over_preemptions_and_attempts() -> None:
    run = Simulation(deadlines={"total": "1h"}, queue={"name": "gpus"})
    await run.prepare()
    for _ in range(2):
        run.kubernetes.admit(TRAIN)
        await run.run(15 * MINUTE)
        assert run.outcome == ("Training", "Training")
        run.kubernetes.preempt(TRAIN, PREEMPTION)
        await run.run(6 * HOUR, MINUTE)
    assert container_seconds(run) == pytest.approx(30 * 60, abs=90)
    run.kubernetes.admit(TRAIN)
    await run.run(15 * MINUTE)
    run.kubernetes.end_trainer(TRAIN, 143, make_termination_message(Reason.INTERRUPTED, "asked to stop"))
    await run.run(2 * MINUTE)
    assert run.ends == ["Interrupted", None]
    run.kubernetes.admit(SECOND)
    await run.run(13 * MINUTE)
    assert run.outcome == ("Training", "Training")
    await run.run(5 * MINUTE)
    assert run.outcome == ("Failed", "DeadlineExceeded")


async def test_total_stops_training_with_its_grace_period() -> None:
    run = Simulation(deadlines={"total": "10m"})
    await run.prepare()
    await run.run(9 * MINUTE)
    run.kubernetes.stop_time = timedelta(seconds=50)
    run.cluster.foreground_deletion = True
    while "being stopped" not in run.status["message"]:
        await run.run(timedelta(seconds=10))
    assert run.cluster.children["Job", TRAIN]["spec"]["activeDeadlineSeconds"] == STOP_NOW
    await run.run(timedelta(seconds=30), timedelta(seconds=10))
    assert run.status["phase"] == "Training", "it still writes its checkpoint"
    run.kubernetes.end_trainer(TRAIN, 0, PUBLISHED_MESSAGE)
    await run.react()
    assert run.outcome == ("Succeeded", "Published"), "it was done in time"


async def test_deadline_of_kubernetes_that_passed_while_waiting_is_an_interruption() -> None:
    """A run that was preempted and admitted again while the operator was away."""
    run = Simulation(deadlines={"total": "1h"}, queue={"name": "gpus"})
    await run.prepare()
    run.kubernetes.admit(TRAIN)
    await run.run(5 * MINUTE)
    deadline = run.cluster.children["Job", TRAIN]["spec"]["activeDeadlineSeconds"]
    assert deadline == pytest.approx((HOUR + SAFETY_MARGIN).total_seconds(), abs=60)
    run.kubernetes.preempt(TRAIN, PREEMPTION)
    run.kubernetes.nodes = 0
    for _ in range(10):
        run.kubernetes.step(timedelta(seconds=20))
    run.kubernetes.admit(TRAIN)
    for _ in range(100):
        run.kubernetes.step(MINUTE)
    run.kubernetes.nodes = 1
    await run.run(2 * MINUTE)
    assert run.ends == ["Interrupted", None]


# Preemption by a queue


async def test_preempted_attempt_is_followed_again() -> None:
    run = Simulation(queue={"name": "gpus"})
    await run.prepare()
    run.kubernetes.admit(TRAIN)
    await run.run(10 * MINUTE)
    run.heartbeat()
    await run.run(MINUTE)
    started_at = run.status["attempts"][0]["startedAt"]
    run.kubernetes.stop_time = timedelta(seconds=55)
    run.kubernetes.preempt(TRAIN, PREEMPTION)
    await run.react()
    await run.run(timedelta(seconds=20))
    assert run.outcome == ("Queued", "Queued")
    assert run.status["message"].endswith(f"once it is admitted again: {PREEMPTION}")
    assert [event["note"] for event in run.cluster.events.values()][-1].endswith(PREEMPTION)
    run.kubernetes.admit(TRAIN)  # while the old pod is in its grace period
    await run.run(10 * MINUTE)
    assert (run.outcome, run.ends) == (("Training", "Training"), [None])
    assert run.status["attempts"][0]["startedAt"] == started_at
    assert container_seconds(run) == pytest.approx(20 * 60, abs=120)
    run.heartbeat()
    await run.run(25 * MINUTE)
    assert run.ends[0] == "HeartbeatLost"


async def test_pod_that_cannot_be_killed_does_not_block_a_readmitted_run() -> None:
    run = Simulation(queue={"name": "gpus"})
    await run.prepare()
    run.kubernetes.admit(TRAIN)
    await run.run(10 * MINUTE)
    run.kubernetes.immortal = True
    run.kubernetes.preempt(TRAIN, PREEMPTION)
    await run.run(MINUTE)
    run.kubernetes.admit(TRAIN)
    await run.run(3 * MINUTE)
    assert run.ends == ["NodeLost", None]
    run.kubernetes.admit(SECOND)
    await run.run(MINUTE)
    assert run.outcome == ("Training", "Training")


async def test_first_admission_says_that_it_waits() -> None:
    run = Simulation(queue={"name": "gpus"})
    await run.prepare()
    assert run.status["message"] == f"Job {TRAIN} is suspended until its queue admits it"
    assert run.cluster.event_lists == 0


# What outlives the end of a trainer


@pytest.mark.parametrize(
    ("code", "message", "outcome"),
    [
        (0, PUBLISHED_MESSAGE, ("Succeeded", "Published")),
        (1, make_termination_message(Reason.NON_FINITE_LOSS, "loss nan"), ("Failed", "NonFiniteLoss")),
    ],
)
@pytest.mark.parametrize("nodes", [1, 2])
async def test_sidecars_of_finished_run_hold_nothing(
    code: int, message: str, outcome: tuple[str, str], nodes: int
) -> None:
    run = Simulation(**GANG | {"resources": {"nodes": nodes, "gpusPerNode": 0}})
    run.kubernetes.sidecar = True
    await run.prepare()
    await run.run(2 * MINUTE)
    assert PREPARE not in run.jobs, "training has started, so that its sidecar is for nothing"
    run.kubernetes.end_trainer(TRAIN, code, message)
    await run.run(2 * END_GRACE + 2 * MINUTE)
    assert run.outcome == outcome
    assert (run.jobs, run.cluster.pods) == ([], {})


async def test_next_attempt_does_not_wait_for_a_sidecar() -> None:
    run = Simulation()
    run.kubernetes.sidecar = True
    await run.prepare()
    await run.run(2 * MINUTE)
    run.kubernetes.end_trainer(TRAIN, 1, make_termination_message(Reason.S3_UNAVAILABLE, "503"))
    await run.run(5 * MINUTE)
    if PREPARE in run.jobs:  # the sidecar ended the Job that knew what was prepared
        run.kubernetes.end_trainer(PREPARE, 0, PREPARED_MESSAGE)
        await run.run(2 * MINUTE)
    assert run.ends == ["S3Unavailable", None]
    assert run.outcome == ("Training", "Training")


async def test_finished_jobs_are_kept_for_their_logs() -> None:
    run = Simulation()
    await run.prepare()
    run.kubernetes.end_trainer(TRAIN, 0, PUBLISHED_MESSAGE)
    await run.run(HOUR, MINUTE)
    assert run.jobs == [PREPARE, TRAIN]


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        (Reason.CUDA_OUT_OF_MEMORY, Reason.CUDA_OUT_OF_MEMORY),
        (Reason.S3_UNAVAILABLE, Reason.S3_UNAVAILABLE),
        (Reason.COLLECTIVE_TIMEOUT, Reason.NODE_LOST),
    ],
)
async def test_peer_that_cannot_be_killed_is_given_up(reason: Reason, cause: Reason) -> None:
    run = Simulation(**GANG)
    await run.prepare()
    await run.run(MINUTE)
    run.kubernetes.immortal = True
    run.kubernetes.end_trainer(TRAIN, 1, make_termination_message(reason, "it ended"))
    reads = run.cluster.job_reads
    await run.run(10 * MINUTE, timedelta(seconds=1))
    assert run.cluster.job_reads - reads < 50
    assert run.ends == [cause, None]
    assert run.outcome == ("Training", "Training")


async def test_hanging_peer_of_published_run_holds_nothing() -> None:
    run = Simulation(**GANG)
    await run.prepare()
    await run.run(MINUTE)
    run.kubernetes.end_trainer(TRAIN, 0, PUBLISHED_MESSAGE)
    await run.run(3 * MINUTE)
    assert (run.outcome, TRAIN in run.jobs) == (("Succeeded", "Published"), False)


async def test_gang_whose_peers_end_long_before_it_is_published_keeps_its_pods() -> None:
    run = Simulation(**GANG)
    await run.prepare()
    await run.run(MINUTE)
    run.kubernetes.end_trainer(TRAIN, 0, PUBLISHED_MESSAGE, index=1)
    await run.run(2 * MINUTE)
    for index in range(GANG["resources"]["nodes"]):
        if index != 1:
            run.kubernetes.end_trainer(TRAIN, 0, PUBLISHED_MESSAGE, index=index)
    for _ in range(3):  # before the Job controller has seen it
        await reconcile_now(run.cluster)
    await run.run(5 * MINUTE)
    assert (run.outcome, TRAIN in run.jobs) == (("Succeeded", "Published"), True)


async def test_repeated_preparation_with_sidecar_is_kept_until_training_starts() -> None:
    run = Simulation()
    run.kubernetes.sidecar = True
    await run.prepare()
    await run.run(2 * MINUTE)
    for number in range(1, 4):
        run.kubernetes.end_trainer(train(number), 1, make_termination_message(Reason.S3_UNAVAILABLE, "503"))
        await run.run(5 * MINUTE)
        run.kubernetes.end_trainer(PREPARE, 0, PREPARED_MESSAGE)
        await run.run(2 * MINUTE)
        assert (run.outcome, len(run.ends)) == (("Training", "Training"), number + 1)


async def test_attempt_lost_while_the_operator_was_away_counts_until_its_last_report() -> None:
    run = Simulation(deadlines={"total": "1h"})
    await run.prepare()
    await run.run(10 * MINUTE)
    run.heartbeat()
    await run.run(MINUTE)
    run.cluster.remove(TRAIN)
    for _ in range(600):
        run.kubernetes.step(MINUTE)
    await run.run(MINUTE)
    assert run.ends[0] == "PodLost"
    assert container_seconds(run) == pytest.approx(10 * 60, abs=90)


async def test_run_is_followed_while_a_webhook_refuses_to_change_its_jobs() -> None:
    run = Simulation(deadlines={"heartbeat": "20m"})
    run.cluster.update_error = AdmissionDeniedError("500: failed calling webhook", permanent=False)
    await run.prepare()
    await run.run(MINUTE)
    assert run.outcome == ("Training", "Training")
    assert "failed calling webhook" in run.status["message"]
    run.cluster.update_error = None
    await run.run(2 * MINUTE)
    assert run.cluster.children["Job", TRAIN]["spec"]["activeDeadlineSeconds"]
    assert "webhook" not in run.status["message"]


async def test_total_is_enforced_although_the_deadline_of_the_job_may_not_be_set() -> None:
    run = Simulation(deadlines={"total": "1h"})
    run.cluster.update_error = AdmissionDeniedError("policy: frozen", permanent=False)
    await run.prepare()
    await run.run(HOUR + SAFETY_MARGIN + 3 * MINUTE)
    assert (run.outcome, TRAIN in run.jobs) == (("Failed", "DeadlineExceeded"), False)
    assert "(spec.deadlines.total), and Kubernetes did not stop Job" in run.status["message"]
    assert run.kubernetes.ran <= HOUR + SAFETY_MARGIN + 2 * MINUTE
