"""What takes a training away and gives it back: suspension, queues, hangs, dead nodes, missing GPUs, the clock."""

from datetime import timedelta

import pytest

from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.runconfig import RunConfig
from qlora_api.v1alpha1 import Checkpoint, Progress
from qlora_operator.cluster.interface import AdmissionDeniedError
from qlora_operator.lifecycle.job_deadline import SAFETY_MARGIN
from tests.fakes import FakeCluster, wire_time
from tests.make import NOW, PREPARED_MESSAGE, PUBLISHED_MESSAGE, make_manifest, make_prepared, make_termination_message
from tests.unit.operator.life import PREPARE, TRAIN, reconcile_now, reconcile_until_stable, run_to_success

SECOND = "support-bot-2"
CHECKPOINT = Checkpoint(
    step=50,
    uri=f"{make_prepared().prefix}/checkpoints/step-000050-a1",
    time=NOW + timedelta(days=1),
    verified=True,
    digest="d" * 64,
)


@pytest.fixture
def cluster() -> FakeCluster:
    fake = FakeCluster()
    fake.submit(make_manifest())
    return fake


async def start(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)


def report(cluster: FakeCluster) -> Progress:
    return Progress(percent=20, step=50, updated_at=cluster.now, phase=Phase.TRAINING, checkpoint=CHECKPOINT)


def run_config(cluster: FakeCluster, name: str) -> RunConfig:
    """Return the configuration of a training attempt."""
    return RunConfig.model_validate_json(cluster.children["ConfigMap", name]["data"]["run.json"])


def outcome(cluster: FakeCluster) -> tuple[str, str]:
    return cluster.status["phase"], cluster.status["reason"]


def ends(cluster: FakeCluster) -> list[str | None]:
    return [attempt.get("reason") for attempt in cluster.status["attempts"]]


async def test_suspended_job_starts_nothing() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest(suspend=True))
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Suspended", "SuspendedByUser")
    assert (cluster.created, cluster.condition("Suspended"), cluster.condition("Finished")) == ([], "True", "False")
    cluster.change(suspend=False)
    await run_to_success(cluster)
    assert outcome(cluster) == ("Succeeded", "Published")


async def test_suspended_training_resumes_as_next_attempt(cluster: FakeCluster) -> None:
    await start(cluster)
    await reconcile_until_stable(cluster, report(cluster))
    cluster.change(suspend=True)
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Suspended", "SuspendedByUser")
    assert ("Job", TRAIN) not in cluster.children
    assert f"the checkpoint of step 50 is in {make_prepared().prefix}/checkpoints/" in cluster.status["message"]
    cluster.change(suspend=False)
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["attempt"]) == (Phase.SCHEDULING, 2)
    assert run_config(cluster, TRAIN).checkpoint is None
    assert run_config(cluster, SECOND).checkpoint == CHECKPOINT
    cluster.start_pod(SECOND)
    cluster.end_pod(SECOND, 0, PUBLISHED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert (outcome(cluster), ends(cluster)) == (("Succeeded", "Published"), ["SuspendedByUser", "Published"])
    assert "checkpoint" not in cluster.status


async def test_suspended_preparation_runs_again(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.start_pod(PREPARE)
    cluster.change(suspend=True)
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Suspended", "SuspendedByUser")
    assert ("Job", PREPARE) not in cluster.children
    cluster.change(suspend=False)
    await run_to_success(cluster)
    assert outcome(cluster) == ("Succeeded", "Published")


async def test_suspension_keeps_ended_preparation(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.children["Job", PREPARE]["status"] = {}  # the Job controller is seconds behind its pods
    cluster.change(suspend=True)
    await reconcile_until_stable(cluster)
    cluster.change(suspend=False)
    await reconcile_until_stable(cluster)
    assert ("Job", SECOND) in cluster.children
    assert cluster.created.count(PREPARE) == 2  # its configuration and its Job, once


async def test_suspended_message_when_no_pod_runs(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.foreground_deletion = True
    cluster.change(suspend=True)
    await reconcile_until_stable(cluster)
    assert cluster.status["message"] == "training is being stopped: it writes a checkpoint and ends"
    cluster.remove(TRAIN)
    await reconcile_until_stable(cluster)
    assert cluster.status["message"].startswith("spec.suspend is true: no pod runs")


async def test_suspended_preparation_message_has_no_checkpoint(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.set_pod(PREPARE, "Running", {"running": {}})
    cluster.foreground_deletion = True
    cluster.change(suspend=True)
    await reconcile_until_stable(cluster)
    assert (outcome(cluster), cluster.status["message"]) == (
        ("Suspended", "SuspendedByUser"), "preparation is being stopped"
    )  # fmt: skip
    cluster.remove(PREPARE)
    await reconcile_until_stable(cluster)
    assert cluster.status["message"] == "spec.suspend is true: no pod runs; set it to false to resume"


async def test_publication_during_suspension_succeeds(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.foreground_deletion = True
    cluster.change(suspend=True)
    await reconcile_until_stable(cluster)
    cluster.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert (outcome(cluster), ends(cluster)) == (("Succeeded", "Published"), ["Published"])


async def test_exit_before_suspension_is_recorded(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.NON_FINITE_LOSS, "loss nan"))
    cluster.change(suspend=True)
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Failed", "NonFiniteLoss")


async def test_next_attempt_waits_for_stopped_pods(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.foreground_deletion = True
    cluster.change(suspend=True)
    await reconcile_until_stable(cluster)
    cluster.change(suspend=False)
    await reconcile_until_stable(cluster)
    assert ("Job", SECOND) not in cluster.children
    cluster.remove(TRAIN)
    await reconcile_until_stable(cluster)
    assert ("Job", SECOND) in cluster.children


async def test_queue_admits_and_evicts_job(cluster: FakeCluster) -> None:
    cluster.submit(make_manifest(queue={"name": "gpus"}))
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Queued", "Queued")
    cluster.children["Job", TRAIN]["spec"]["suspend"] = False
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.TRAINING
    cluster.children["Job", TRAIN]["spec"]["suspend"] = True
    cluster.pods.clear()
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Queued", "Queued")
    assert ends(cluster) == [None]


@pytest.mark.parametrize("node_ahead", [-30, 0, 30])
async def test_heartbeat_lost_starts_next_attempt(cluster: FakeCluster, node_ahead: int) -> None:
    cluster.node_clock_skew = timedelta(minutes=node_ahead)
    await start(cluster)
    live = report(cluster)
    await reconcile_until_stable(cluster, live)
    assert (await reconcile_now(cluster, live)).requeue_after is not None
    cluster.pass_time(timedelta(minutes=19))
    await reconcile_until_stable(cluster, live)
    assert cluster.status["phase"] == Phase.TRAINING
    cluster.pass_time(timedelta(minutes=1))
    await reconcile_until_stable(cluster, live)
    assert ends(cluster) == ["HeartbeatLost"]
    cluster.pass_time(timedelta(minutes=1))
    await reconcile_until_stable(cluster, live)
    assert ends(cluster) == ["HeartbeatLost", None]
    assert ("Job", TRAIN) not in cluster.children
    assert ("Job", SECOND) in cluster.children
    assert "has not reported since 2026-03-01 12:00" in cluster.status["attempts"][0]["message"]


async def test_pod_whose_token_is_refused_is_alive_until_its_kubelet_has_renewed_it() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest(deadlines={"heartbeat": "1m"}))
    await start(cluster)
    live = report(cluster)
    await reconcile_until_stable(cluster, live)
    for _ in range(11):
        cluster.pass_time(timedelta(minutes=1))
        cluster.refused_at = cluster.now
        await reconcile_until_stable(cluster, live)
        assert ends(cluster) == [None]
    cluster.pass_time(timedelta(minutes=1))
    cluster.refused_at = cluster.now  # whoever sends them, they count for no longer
    await reconcile_until_stable(cluster, live)
    assert ends(cluster)[0] == "HeartbeatLost"


@pytest.mark.parametrize("node_ahead", [-60, 0, 60])
async def test_reports_do_not_count_for_next_attempt(cluster: FakeCluster, node_ahead: int) -> None:
    await start(cluster)
    live = report(cluster)
    await reconcile_until_stable(cluster, live)
    cluster.end_pod(TRAIN, 143, make_termination_message(Reason.INTERRUPTED, "asked to stop"))
    cluster.node_clock_skew = timedelta(minutes=node_ahead)
    await reconcile_until_stable(cluster, live)
    cluster.start_pod(SECOND)
    await reconcile_until_stable(cluster, live)
    cluster.pass_time(timedelta(minutes=30))
    await reconcile_until_stable(cluster, live)
    assert (cluster.status["phase"], ends(cluster)) == ("Training", ["Interrupted", None])


async def test_restarted_operator_waits_for_reports_before_heartbeat_lost(cluster: FakeCluster) -> None:
    await start(cluster)
    await reconcile_until_stable(cluster, report(cluster))
    cluster.pass_time(timedelta(hours=3))
    cluster.reports_since = cluster.now
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.TRAINING
    cluster.pass_time(timedelta(minutes=20))
    await reconcile_until_stable(cluster)
    assert ends(cluster) == ["HeartbeatLost"]


async def test_pod_without_reports_has_no_heartbeat_deadline(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.pass_time(timedelta(hours=3))
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.TRAINING


async def test_node_lost_starts_next_attempt(cluster: FakeCluster) -> None:
    """Its pod stays for ever; the next attempt goes on elsewhere."""
    await start(cluster)
    cluster.foreground_deletion = True
    cluster.delete_pod(TRAIN, grace=timedelta(seconds=60), disruption_reason="DeletionByTaintManager")
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.TRAINING
    assert (await reconcile_now(cluster)).requeue_after is not None
    cluster.pass_time(timedelta(seconds=90))
    await reconcile_until_stable(cluster)
    assert ends(cluster) == ["NodeLost", None]
    assert "deletionTimestamp" in cluster.children["Job", TRAIN]["metadata"]
    cluster.start_pod(SECOND)
    cluster.end_pod(SECOND, 0, PUBLISHED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Succeeded", "Published")


async def test_node_without_gpu_is_avoided(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.ACCELERATOR_MISSING, "no CUDA device"))
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(minutes=1))
    await reconcile_until_stable(cluster)
    pod = cluster.children["Job", SECOND]["spec"]["template"]["spec"]
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert terms == [{"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["node-1"]}]}]
    assert cluster.status["attempts"][0]["node"] == "node-1"


@pytest.mark.parametrize("node_ahead", [-60, 0, 60])
async def test_attempts_share_one_deadline(cluster: FakeCluster, node_ahead: int) -> None:
    cluster.node_clock_skew = timedelta(minutes=node_ahead)
    await start(cluster)
    cluster.pass_time(timedelta(hours=20))
    cluster.end_pod(TRAIN, 143, make_termination_message(Reason.INTERRUPTED, "asked to stop"), keep_start=True)
    await reconcile_until_stable(cluster)
    assert "activeDeadlineSeconds" not in cluster.children["Job", SECOND]["spec"]
    cluster.start_pod(SECOND)
    await reconcile_until_stable(cluster)
    left = cluster.children["Job", SECOND]["spec"]["activeDeadlineSeconds"] - SAFETY_MARGIN.total_seconds()
    assert 4 * 3600 - 60 < left <= 4 * 3600 + 60
    cluster.pass_time(timedelta(hours=5))
    cluster.end_pod(SECOND, 143, make_termination_message(Reason.INTERRUPTED, "asked to stop"), keep_start=True)
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Failed", "DeadlineExceeded")


async def test_termination_message_checkpoint_is_in_status(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.end_pod(TRAIN, 143, make_termination_message(Reason.INTERRUPTED, "asked to stop", checkpoint=CHECKPOINT))
    await reconcile_until_stable(cluster)
    assert Checkpoint.model_validate(cluster.status["checkpoint"]) == CHECKPOINT


async def test_ttl_deletes_children(cluster: FakeCluster) -> None:
    cluster.submit(make_manifest(ttl="24h"))
    await run_to_success(cluster)
    outcome_then = await reconcile_now(cluster)
    assert outcome_then.requeue_after is not None
    assert timedelta(hours=23) < outcome_then.requeue_after <= timedelta(hours=24)
    assert ("Job", TRAIN) in cluster.children
    before = cluster.status
    cluster.pass_time(timedelta(hours=24))
    await reconcile_until_stable(cluster)
    assert cluster.children == {}
    assert cluster.status == before | {"childrenDeletedAt": cluster.status["childrenDeletedAt"]}


async def test_run_that_is_deleted_but_kept_by_a_finalizer_stops_its_trainer(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.foreground_deletion = True
    assert cluster.job
    cluster.job["metadata"] |= {"deletionTimestamp": wire_time(cluster.now), "finalizers": ["example.com/hold"]}
    await reconcile_until_stable(cluster)
    assert "deletionTimestamp" in cluster.children["Job", TRAIN]["metadata"]
    cluster.remove(TRAIN)
    await reconcile_until_stable(cluster)
    assert SECOND not in cluster.created
    assert cluster.created.count(PREPARE) == 2, "its Job and its ConfigMap"


async def test_denied_deletion_of_jobs_of_deleted_run_is_tried_again(cluster: FakeCluster) -> None:
    await start(cluster)
    assert cluster.job
    cluster.job["metadata"] |= {"deletionTimestamp": wire_time(cluster.now), "finalizers": ["example.com/hold"]}
    cluster.deletion_error = AdmissionDeniedError("policy: Jobs are kept", permanent=False)
    assert (await reconcile_now(cluster)).requeue_after == timedelta(minutes=1)
    cluster.deletion_error = None
    assert (await reconcile_now(cluster)).requeue_after is None
    assert ("Job", TRAIN) not in cluster.children
