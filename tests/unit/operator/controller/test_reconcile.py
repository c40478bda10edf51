"""Reconciles of a QLoRAJob from start to end on an in-memory cluster, with and without crashes."""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from qlora_api import names
from qlora_api.accelerators import NVIDIA
from qlora_api.model_config import reduce_config
from qlora_api.names import Phase
from qlora_api.pod_profile import PodProfile
from qlora_api.reasons import Reason
from qlora_api.runconfig import RunConfig
from qlora_api.v1alpha1 import Progress
from qlora_operator.cluster.interface import AdmissionDeniedError, InvalidStatusError
from qlora_operator.controller.children import ADMISSION_DENIED_RETRY, NAME_CONFLICT_RETRY
from qlora_operator.controller.reconcile import reconcile
from qlora_operator.lifecycle import ReconcileContext
from qlora_operator.lifecycle.job_deadline import SAFETY_MARGIN
from qlora_operator.lifecycle.planning import LISTING_PATIENCE
from qlora_operator.lifecycle.prepare_retries import FIRST_PAUSE, LONGEST_PAUSE, PATIENCE
from qlora_operator.models import Manifest
from qlora_operator.resources import training_placement
from tests.fakes import FakeCluster, wire_time
from tests.make import (
    INSTALLATION,
    NOW,
    PREPARED_MESSAGE,
    PUBLISHED_MESSAGE,
    REF,
    make_manifest,
    make_prepared,
    make_result,
    make_termination_message,
)
from tests.unit.operator.life import (
    PREPARE,
    PREPARE_AGAIN,
    TRAIN,
    reconcile_now,
    reconcile_until_stable,
    run_to_success,
    without_times,
)

SECOND = names.train_job_name(REF.name, 2)
CONFIGS = Path(__file__).parents[2] / "planner" / "configs"


@pytest.fixture
def cluster() -> FakeCluster:
    fake = FakeCluster()
    fake.submit(make_manifest())
    return fake


async def test_run_from_submission_to_success(cluster: FakeCluster) -> None:
    await run_to_success(cluster)
    assert cluster.status["phase"] == Phase.SUCCEEDED
    assert cluster.status["output"]["adapter"] == make_result().adapter
    assert cluster.status["evaluation"]["adapter"]["loss"] == 2.83
    assert cluster.status["attempts"][0]["reason"] == Reason.PUBLISHED
    assert [event["reason"] for event in cluster.events.values()] == [
        "Preparing",
        "Prepared",
        "Scheduling",
        "Training",
        "Published",
    ]


async def test_first_reconcile_creates_children_before_status(cluster: FakeCluster) -> None:
    outcome = await reconcile_now(cluster)
    assert (outcome.requeue_after, outcome.status) == (timedelta(0), None)
    assert [verb for verb, _ in cluster.writes] == ["ensure", "ensure"]
    await reconcile_now(cluster)
    assert [verb for verb, _ in cluster.writes] == ["ensure", "ensure", "event", "status"]
    assert (cluster.status["phase"], cluster.child_lists) == (Phase.PREPARING, 0)


async def test_run_config_has_plan_and_prepared_facts(cluster: FakeCluster) -> None:
    await run_to_success(cluster)
    config = RunConfig.model_validate_json(cluster.children["ConfigMap", TRAIN]["data"][names.RUN_CONFIG_FILE])
    assert config.prepared == make_prepared()
    assert config.plan.model_dump(mode="json", by_alias=True, exclude_none=True) == cluster.status["plan"] | {
        "reasons": list(config.plan.reasons)
    }


@pytest.mark.parametrize("write", range(1, 20))
async def test_crash_after_any_write_same_outcome(write: int) -> None:
    quiet, crashing = FakeCluster(), FakeCluster()
    for fake in (quiet, crashing):
        fake.submit(make_manifest())
    crashing.crash_after = lambda number: number == write
    await run_to_success(quiet)
    await run_to_success(crashing)
    assert without_times(crashing.status) == without_times(quiet.status)
    assert crashing.created == quiet.created == [PREPARE, PREPARE, TRAIN, TRAIN]
    assert {event["reason"] for event in crashing.events.values()} == {
        event["reason"] for event in quiet.events.values()
    }


async def lose_and_recover(cluster: FakeCluster) -> None:
    """The training Job is deleted while it runs; what it published is found."""
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(minutes=10))
    cluster.remove(TRAIN)
    await reconcile_until_stable(cluster)
    published = make_prepared(published=make_result())
    cluster.end_pod(PREPARE_AGAIN, 0, make_termination_message(Reason.ALREADY_PUBLISHED, prepared=published))
    await reconcile_until_stable(cluster)


@pytest.mark.parametrize("write", range(1, 26))
async def test_crash_during_recovery_same_outcome(write: int) -> None:
    quiet, crashing = FakeCluster(), FakeCluster()
    for fake in (quiet, crashing):
        fake.submit(make_manifest())
    crashing.crash_after = lambda number: number == write
    await lose_and_recover(quiet)
    await lose_and_recover(crashing)
    assert without_times(crashing.status) == without_times(quiet.status)
    assert quiet.status["reason"] == Reason.ALREADY_PUBLISHED
    assert crashing.created.count(TRAIN) == quiet.created.count(TRAIN)
    assert SECOND not in crashing.created


async def test_training_continues_when_prepare_job_is_deleted(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)
    cluster.foreground_deletion = True
    cluster.children["Job", PREPARE]["metadata"]["deletionTimestamp"] = NOW.isoformat()
    await reconcile_until_stable(cluster)
    cluster.remove(PREPARE)
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.writes.count(("delete", TRAIN))) == ("Training", 0)


@pytest.mark.parametrize("minutes", [-5, 0, 5])
async def test_lost_attempt_is_prepared_again_once_despite_skew(cluster: FakeCluster, minutes: int) -> None:
    cluster.clock_skew = timedelta(minutes=minutes)
    await lose_and_recover(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Succeeded", "AlreadyPublished")
    assert cluster.created == [PREPARE, PREPARE, TRAIN, TRAIN, PREPARE_AGAIN]


async def test_invalid_child_fails_run(cluster: FakeCluster) -> None:
    cluster.admission_error = AdmissionDeniedError("Job support-bot-prepare was denied: 422 Invalid", permanent=True)
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Failed", "InvalidSpec")


async def test_child_that_the_settings_of_pods_may_make_invalid_is_waited_for(cluster: FakeCluster) -> None:
    """Who runs it would otherwise be asked to correct a spec that is right."""
    installation = replace(INSTALLATION, pods=PodProfile(scheduler_name="volcano"))
    error = AdmissionDeniedError("Job support-bot-prepare was denied: 422 Invalid", permanent=True)
    cluster.admission_error = error
    await reconcile(REF, cluster, installation, ReconcileContext(NOW))
    await reconcile(REF, cluster, installation, ReconcileContext(NOW))
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Pending", "PodRejected")
    assert cluster.status["message"] == f"{error}; correct the spec, or what the chart's values set under pods"


async def test_quota_is_waited_for(cluster: FakeCluster) -> None:
    cluster.admission_error = AdmissionDeniedError(
        "Job support-bot-prepare was denied: exceeded quota", permanent=False
    )
    outcome = await reconcile_now(cluster)
    assert outcome.requeue_after == ADMISSION_DENIED_RETRY
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Pending", "PodRejected")
    assert "exceeded quota" in cluster.status["message"]
    cluster.admission_error = None
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Preparing"


async def test_immediate_steps_requeue_at_once(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    assert (await reconcile_now(cluster)).requeue_after == timedelta(0)
    assert ("Job", TRAIN) not in cluster.children
    await reconcile_now(cluster)
    assert ("Job", TRAIN) in cluster.children


async def test_published_result_is_reused(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    prepared = make_prepared(published=make_result())
    cluster.end_pod(PREPARE, 0, make_termination_message(Reason.PREPARED, prepared=prepared))
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Succeeded", "AlreadyPublished")
    assert cluster.created == [PREPARE, PREPARE]


async def test_deleted_children_of_finished_run_are_not_recreated(cluster: FakeCluster) -> None:
    await run_to_success(cluster)
    before, writes = cluster.status, len(cluster.writes)
    cluster.children.clear()
    cluster.pods.clear()
    await reconcile_until_stable(cluster)
    assert cluster.status == before
    assert len(cluster.writes) == writes


async def test_finished_run_observes_new_generation(cluster: FakeCluster) -> None:
    await run_to_success(cluster)
    cluster.change(deadlines={"total": "48h"})
    await reconcile_until_stable(cluster)
    assert cluster.status["observedGeneration"] == 2
    assert {entry["observedGeneration"] for entry in cluster.status["conditions"]} == {2}


async def test_finished_job_without_pod_is_prepared_again(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(minutes=10))
    cluster.finish_job(TRAIN, "Complete")
    cluster.pods.clear()
    cluster.pass_time(timedelta(minutes=1))
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(minutes=1))
    await reconcile_until_stable(cluster)
    assert cluster.status["attempts"][0]["reason"] == "PodLost"
    assert ("Job", PREPARE_AGAIN) in cluster.children
    assert ("Job", PREPARE) not in cluster.children
    published = make_prepared(published=make_result())
    cluster.end_pod(PREPARE_AGAIN, 0, make_termination_message(Reason.ALREADY_PUBLISHED, prepared=published))
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Succeeded", "AlreadyPublished")


async def test_repeatedly_deleted_jobs_fail_run(cluster: FakeCluster) -> None:
    for attempt in (1, 2, 3):
        await reconcile_until_stable(cluster)
        cluster.pass_time(timedelta(minutes=1))
        await reconcile_until_stable(cluster)
        cluster.end_pod(names.prepare_job_name(REF.name, attempt), 0, PREPARED_MESSAGE)
        await reconcile_until_stable(cluster)
        cluster.pass_time(timedelta(minutes=1))
        cluster.remove(names.train_job_name(REF.name, attempt))
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Failed", "PodLost")


async def test_startup_deadline_releases_node(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.set_pod(TRAIN, "Pending", {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}})
    outcome = await reconcile_now(cluster)
    assert outcome.requeue_after == timedelta(minutes=30)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Scheduling", "ImagePullFailed")
    cluster.pass_time(timedelta(minutes=30))
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Scheduling", "ImagePullFailed")
    assert "no such image" in cluster.status["message"]
    assert ("Job", TRAIN) not in cluster.children


async def test_invalid_spec_names_field() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest(lora={"rank": 0}))
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Failed", "InvalidSpec")
    assert "spec.lora.rank" in cluster.status["message"]
    assert cluster.created == []


async def test_job_deadline_follows_spec(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    created_at = cluster.now
    assert "activeDeadlineSeconds" not in cluster.children["Job", TRAIN]["spec"]
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)
    cluster.change(deadlines={"total": "48h"})
    await reconcile_until_stable(cluster)
    deadline = timedelta(seconds=cluster.children["Job", TRAIN]["spec"]["activeDeadlineSeconds"])
    expected = timedelta(hours=48) + SAFETY_MARGIN
    assert expected <= deadline <= expected + (cluster.now - created_at)


async def test_children_of_deleted_job_with_same_name_are_waited_for(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.submit(make_manifest())
    outcome = await reconcile_now(cluster)
    assert outcome.requeue_after == NAME_CONFLICT_RETRY
    assert cluster.status["phase"] == "Pending"
    cluster.children.clear()
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Preparing"


async def test_job_of_other_owner_is_not_adopted(cluster: FakeCluster) -> None:
    foreign = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": PREPARE}}
    cluster.children["Job", PREPARE] = foreign
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Failed", "InvalidSpec")
    assert cluster.children["Job", PREPARE] is foreign


async def test_progress_fills_columns(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    live = Progress(
        percent=42, step=75, total_steps=180, remaining_seconds=190, loss=2.8312, phase=Phase.EVALUATING,
        tokens_per_second=812.4, updated_at=cluster.now,
    )  # fmt: skip
    await reconcile_until_stable(cluster, live)
    columns = {key: cluster.status[key] for key in ("phase", "progress", "eta", "loss", "step", "tokensPerSecond")}
    assert columns == {
        "phase": "Evaluating", "progress": "42%", "eta": "3m10s", "loss": "2.831", "step": "75/180",
        "tokensPerSecond": "812",
    }  # fmt: skip


async def test_report_older_than_job_is_ignored(cluster: FakeCluster) -> None:
    old = Progress(percent=99, updated_at=cluster.now - timedelta(minutes=1))
    await reconcile_until_stable(cluster, old)
    assert "progress" not in cluster.status


async def test_report_before_training_job_is_shown(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster, Progress(percent=7, updated_at=cluster.now))
    assert (cluster.status["phase"], cluster.status["progress"]) == ("Preparing", "7%")


def gpu_node(product: str, mebibytes: int) -> Manifest:
    labels = {NVIDIA.product_label: product, NVIDIA.memory_label: str(mebibytes)}
    return {"metadata": {"name": product, "labels": labels}, "status": {"allocatable": {NVIDIA.resource: "1"}}}


def prepared_message(model: str) -> str:
    config = json.loads((CONFIGS / f"{model}.json").read_text())
    prepared = make_prepared()
    known = prepared.model.model_copy(update={"config": reduce_config(config)})
    return make_termination_message(Reason.PREPARED, prepared=prepared.model_copy(update={"model": known}))


async def prepare_for_gpus(cluster: FakeCluster, model: str) -> None:
    cluster.submit(make_manifest(resources={"gpusPerNode": 1}))
    cluster.nodes = [gpu_node("Tesla-T4", 15_360), gpu_node("NVIDIA-A10", 23_028)]
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, prepared_message(model))
    await reconcile_until_stable(cluster)


async def test_run_is_sized_by_cluster_gpus() -> None:
    cluster = FakeCluster()
    await prepare_for_gpus(cluster, "llama-3.2-3b")
    plan = cluster.status["plan"]
    assert plan["gpuProduct"] == "Tesla-T4"
    assert 0 < plan["peakBytes"] < 15_360 << 20
    pod = cluster.children["Job", TRAIN]["spec"]["template"]["spec"]
    (term,) = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    product = {"key": "nvidia.com/gpu.product", "operator": "In", "values": ["Tesla-T4"]}
    assert (term, "nodeSelector" in pod) == ({"matchExpressions": [product]}, False)
    seen = cluster.node_lists
    cluster.nodes = []
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)
    assert (cluster.status["plan"], cluster.node_lists) == (plan, seen)


async def test_quarantined_node_does_not_decide_on_the_gpus_of_a_run() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest(resources={"gpusPerNode": 1}))
    cluster.nodes = [gpu_node("NVIDIA-A10", 23_028), gpu_node("Tesla-T4", 15_360)]
    await reconcile_until_stable(cluster)
    cluster.quarantined_nodes = {"Tesla-T4": NOW + timedelta(minutes=40)}
    cluster.end_pod(PREPARE, 0, prepared_message("llama-3.2-3b"))
    await reconcile_until_stable(cluster)
    assert cluster.status["plan"]["gpuProducts"] == ["NVIDIA-A10"]


async def test_run_is_sized_for_the_nodes_that_its_installation_selects_and_tolerates() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest(resources={"gpusPerNode": 1}))
    small, large = gpu_node("Tesla-T4", 15_360), gpu_node("NVIDIA-A10", 23_028)
    large["metadata"]["labels"]["pool"] = "ml"
    large["spec"] = {"taints": [{"key": "dedicated", "value": "ml", "effect": "NoSchedule"}]}
    cluster.nodes = [small, large]
    toleration = {"key": "dedicated", "value": "ml", "effect": "NoSchedule"}
    profile = {"tolerations": [toleration], "train": {"nodeSelector": {"pool": "ml"}}}
    cluster.placement = training_placement(PodProfile.model_validate(profile))
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, prepared_message("llama-3.2-3b"))
    await reconcile_until_stable(cluster)
    assert cluster.status["plan"]["gpuProducts"] == ["NVIDIA-A10"]


async def test_gpus_column_is_what_pods_hold() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest(resources={"gpusPerNode": 1}, queue={"name": "gpus"}))
    cluster.nodes = [gpu_node("Tesla-T4", 15_360)]
    seen = {}

    async def record() -> None:
        await reconcile_until_stable(cluster)
        seen[cluster.status["phase"]] = cluster.status["gpus"]

    await record()
    cluster.end_pod(PREPARE, 0, prepared_message("llama-3.2-3b"))
    await record()
    cluster.children["Job", TRAIN]["spec"]["suspend"] = False
    await record()
    cluster.start_pod(TRAIN)
    await record()
    cluster.change(suspend=True)
    await record()
    cluster.change(suspend=False)
    await reconcile_until_stable(cluster)
    cluster.children["Job", SECOND]["spec"]["suspend"] = False
    cluster.start_pod(SECOND)
    await reconcile_until_stable(cluster)
    assert cluster.status["gpus"] == 1
    cluster.end_pod(SECOND, 1, make_termination_message(Reason.NON_FINITE_LOSS, "loss is NaN"))
    await record()
    assert seen == {"Preparing": 0, "Queued": 0, "Scheduling": 0, "Training": 1, "Suspended": 0, "Failed": 0}


async def test_run_is_sized_when_prepare_pod_has_ended() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest(resources={"gpusPerNode": 1}))
    cluster.nodes = [gpu_node("Tesla-T4", 15_360)]
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, prepared_message("llama-3.2-3b"))
    cluster.children["Job", PREPARE]["status"] = {}
    await reconcile_until_stable(cluster)
    assert cluster.status["plan"]["gpuProduct"] == "Tesla-T4"


async def test_run_that_cannot_fit_requests_no_gpu() -> None:
    cluster = FakeCluster()
    await prepare_for_gpus(cluster, "llama-2-70b")
    assert (cluster.status["phase"], cluster.status["reason"]) == (Phase.PREPARING, Reason.DOES_NOT_FIT)
    cluster.job["status"]["preparation"]["failingSince"] = wire_time(cluster.now - PATIENCE)
    cluster.pass_time(LONGEST_PAUSE)
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == (Phase.FAILED, Reason.DOES_NOT_FIT)
    assert "; the nodes were checked again since " in cluster.status["message"]
    assert (
        "more than the 22.0 GiB that a process has on a NVIDIA-A10; it fits on a GPU with" in cluster.status["message"]
    )
    assert cluster.created == [PREPARE, PREPARE]
    assert "plan" not in cluster.status


async def test_run_that_does_not_fit_is_planned_once_a_larger_gpu_is_there() -> None:
    """A node without its labels, or with a taint for a repair, is back within minutes."""
    cluster = FakeCluster()
    await prepare_for_gpus(cluster, "llama-2-70b")
    assert "; the nodes are checked again until 18:00 UTC" in cluster.status["message"]
    assert cluster.status["preparation"]["retryAt"] <= wire_time(cluster.now + FIRST_PAUSE)
    cluster.nodes.append(gpu_node("NVIDIA-A100-SXM4-80GB", 81_920))
    cluster.pass_time(LONGEST_PAUSE)
    await reconcile_until_stable(cluster)
    assert cluster.status["plan"]["gpuProducts"] == ["NVIDIA-A100-SXM4-80GB"]
    assert cluster.created == [PREPARE, PREPARE, TRAIN, TRAIN]
    assert "reason" not in cluster.status["preparation"]


async def test_time_without_an_operator_does_not_use_up_the_patience_with_a_run_that_does_not_fit() -> None:
    cluster = FakeCluster()
    await prepare_for_gpus(cluster, "llama-2-70b")
    cluster.pass_time(timedelta(hours=9))
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.PREPARING


async def test_run_is_sized_although_listing_nodes_was_denied_for_a_moment() -> None:
    cluster = FakeCluster()
    cluster.may_list_nodes = False
    await prepare_for_gpus(cluster, "llama-3.2-3b")
    assert (cluster.status["phase"], cluster.status["reason"]) == (Phase.PREPARING, Reason.PREPARING)
    assert "may not list nodes" in cluster.status["message"]
    cluster.may_list_nodes = True
    cluster.pass_time(timedelta(seconds=30))
    await reconcile_until_stable(cluster)
    assert cluster.status["plan"]["peakBytes"] > 0


async def test_run_is_planned_without_nodes_if_the_operator_may_never_list_them() -> None:
    cluster = FakeCluster()
    cluster.may_list_nodes = False
    await prepare_for_gpus(cluster, "llama-3.2-3b")
    cluster.pass_time(LISTING_PATIENCE)
    await reconcile_until_stable(cluster)
    assert cluster.status["plan"]["reasons"][-1] == "peak memory is not estimated: the operator may not list nodes"
    assert cluster.created == [PREPARE, PREPARE, TRAIN, TRAIN]


async def test_preparation_whose_facts_the_kubelet_cut_is_tried_again_and_names_the_limit() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest())
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, prepared_message("llama-3.2-3b")[:600])
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == (Phase.PREPARING, Reason.POD_REJECTED)
    assert "the kubelet keeps 12288 bytes for all containers of a pod" in cluster.status["message"]
    cluster.pass_time(LONGEST_PAUSE)
    await reconcile_until_stable(cluster)
    cluster.end_pod(names.prepare_job_name(REF.name, 2), 0, prepared_message("llama-3.2-3b"))
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.SCHEDULING


async def test_cpu_run_lists_no_nodes(cluster: FakeCluster) -> None:
    await run_to_success(cluster)
    assert cluster.node_lists == 0


REPORT = Progress(percent=42, step=10**40, updated_at=NOW + timedelta(hours=1))
"""A report that makes a status invalid; the endpoint accepts none such."""


def refuse_step(status: Manifest) -> str | None:
    """Refuse a status as the API server does that has an integer of more than 64 bits."""
    return "status.lastReport.step" if str(10**40) in json.dumps(status) else None


@pytest.mark.parametrize(
    ("exit_code", "message", "phase"),
    [(0, PUBLISHED_MESSAGE, Phase.SUCCEEDED), (1, make_termination_message(Reason.INVALID_SPEC), Phase.FAILED)],
)
async def test_report_that_is_refused_does_not_keep_a_run_from_its_end(
    cluster: FakeCluster, exit_code: int, message: str, phase: Phase, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.invalid_status = refuse_step
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    cluster.pass_time(timedelta(minutes=1))
    await reconcile_until_stable(cluster, REPORT)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster, REPORT)
    assert cluster.status["phase"] == Phase.TRAINING
    cluster.end_pod(TRAIN, exit_code, message)
    await reconcile_until_stable(cluster, REPORT)
    assert cluster.status["phase"] == phase
    assert cluster.status["attempts"][0]["reason"]
    assert "the status of ml/support-bot was refused" in caplog.text


async def test_result_that_is_refused_does_not_keep_a_run_from_its_end(cluster: FakeCluster) -> None:
    cluster.invalid_status = lambda status: "status.output" if "adapter" in status.get("output", {}) else None
    await run_to_success(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == (Phase.SUCCEEDED, Reason.PUBLISHED)
    assert cluster.condition("Finished") == "True"
    assert cluster.status["finishedAt"]


async def test_status_that_is_always_refused_is_retried(cluster: FakeCluster) -> None:
    await reconcile_now(cluster)
    cluster.invalid_status = lambda _: "all of it"
    with pytest.raises(InvalidStatusError, match="all of it"):
        await reconcile_now(cluster)


async def test_report_for_an_earlier_job_of_that_name_is_dropped(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    report = Progress(percent=42, updated_at=cluster.now + timedelta(seconds=5))
    assert cluster.job
    for uid, shown in (("uid-of-earlier", "0%"), (cluster.job["metadata"]["uid"], "42%")):
        context = ReconcileContext(cluster.now, report, cluster.reports_since, uid)
        await reconcile(REF, cluster, INSTALLATION, context)
        assert cluster.status["progress"] == shown
