"""The whole life of a QLoRAJob over a cluster in memory, with and without crashes."""

import json
from datetime import timedelta
from pathlib import Path

import pytest

from qlora_api import names
from qlora_api.accelerators import NVIDIA
from qlora_api.model_config import reduce_config
from qlora_api.names import Phase, Reason
from qlora_api.runconfig import RunConfig
from qlora_api.v1alpha1 import Progress
from qlora_operator.cluster.interface import RefusedError
from qlora_operator.controller.reconcile import NAME_TAKEN_RETRY, REFUSED_RETRY
from qlora_operator.models import Manifest
from tests.fakes import FakeCluster
from tests.make import (
    PREPARED_WORD,
    REF,
    make_manifest,
    make_prepared,
    make_result,
    make_word,
)
from tests.unit.operator.life import PREPARE, TRAIN, live_to_the_end, once, settle, without_times

SECOND = names.train_job_name(REF.name, 2)
CONFIGS = Path(__file__).parents[2] / "planner" / "configs"


@pytest.fixture
def cluster() -> FakeCluster:
    fake = FakeCluster()
    fake.submit(make_manifest())
    return fake


async def test_the_whole_life(cluster: FakeCluster) -> None:
    await live_to_the_end(cluster)
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


async def test_children_are_made_first_and_told_when_others_have_theirs(cluster: FakeCluster) -> None:
    outcome = await once(cluster)
    assert (outcome.requeue, outcome.status) == (timedelta(0), None)
    assert [verb for verb, _ in cluster.writes] == ["ensure", "ensure"]
    await once(cluster)
    assert [verb for verb, _ in cluster.writes] == ["ensure", "ensure", "tell", "status"]
    assert (cluster.status["phase"], cluster.looks) == (Phase.PREPARING, 0)


async def test_the_training_pod_gets_plan_and_facts(cluster: FakeCluster) -> None:
    await live_to_the_end(cluster)
    config = RunConfig.model_validate_json(cluster.children["ConfigMap", TRAIN]["data"][names.RUN_CONFIG_FILE])
    assert config.prepared == make_prepared()
    assert config.plan.model_dump(mode="json", by_alias=True, exclude_none=True) == cluster.status["plan"] | {
        "reasons": list(config.plan.reasons)
    }


@pytest.mark.parametrize("write", range(1, 20))
async def test_a_crash_after_any_write_changes_nothing(write: int) -> None:
    quiet, crashing = FakeCluster(), FakeCluster()
    for fake in (quiet, crashing):
        fake.submit(make_manifest())
    crashing.crash_after = lambda number: number == write
    await live_to_the_end(quiet)
    await live_to_the_end(crashing)
    assert without_times(crashing.status) == without_times(quiet.status)
    assert crashing.created == quiet.created == [PREPARE, PREPARE, TRAIN, TRAIN]
    assert {event["reason"] for event in crashing.events.values()} == {
        event["reason"] for event in quiet.events.values()
    }


async def lose_and_recover(cluster: FakeCluster) -> None:
    """The training Job is deleted while it runs; what it published is found."""
    await settle(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_WORD)
    await settle(cluster)
    cluster.start_pod(TRAIN)
    await settle(cluster)
    cluster.pass_time(timedelta(minutes=10))
    cluster.remove(TRAIN)
    await settle(cluster)
    published = make_prepared(published=make_result())
    cluster.end_pod(PREPARE, 0, make_word(Reason.ALREADY_PUBLISHED, prepared=published))
    await settle(cluster)


@pytest.mark.parametrize("write", range(1, 26))
async def test_a_crash_while_recovering_changes_nothing(write: int) -> None:
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


async def test_training_goes_on_while_its_prepare_job_is_deleted(cluster: FakeCluster) -> None:
    await settle(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_WORD)
    await settle(cluster)
    cluster.start_pod(TRAIN)
    await settle(cluster)
    cluster.lingers = True
    await cluster.delete_job(REF, PREPARE)
    await settle(cluster)
    cluster.remove(PREPARE)
    await settle(cluster)
    assert (cluster.status["phase"], cluster.writes.count(("delete", TRAIN))) == ("Training", 0)


@pytest.mark.parametrize("minutes", [-5, 0, 5])
async def test_a_lost_attempt_is_prepared_again_once_whatever_the_clocks_say(
    cluster: FakeCluster, minutes: int
) -> None:
    cluster.ahead = timedelta(minutes=minutes)
    await lose_and_recover(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Succeeded", "AlreadyPublished")
    assert cluster.created == [PREPARE, PREPARE, TRAIN, TRAIN, PREPARE]


async def test_an_impossible_child_fails_the_run(cluster: FakeCluster) -> None:
    cluster.refusal = RefusedError("Job support-bot-prepare was refused: 422 Invalid", final=True)
    await settle(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Failed", "InvalidSpec")


async def test_a_quota_is_waited_for(cluster: FakeCluster) -> None:
    cluster.refusal = RefusedError("Job support-bot-prepare was refused: exceeded quota", final=False)
    outcome = await once(cluster)
    assert outcome.requeue == REFUSED_RETRY
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Pending", "PodRejected")
    assert "exceeded quota" in cluster.status["message"]
    cluster.refusal = None
    await settle(cluster)
    assert cluster.status["phase"] == "Preparing"


async def test_steps_that_wait_for_nothing_ask_to_go_on(cluster: FakeCluster) -> None:
    await settle(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_WORD)
    assert (await once(cluster)).requeue == timedelta(0)
    assert ("Job", TRAIN) not in cluster.children
    await once(cluster)
    assert ("Job", TRAIN) in cluster.children


async def test_a_published_result_is_not_trained_again(cluster: FakeCluster) -> None:
    await settle(cluster)
    prepared = make_prepared(published=make_result())
    cluster.end_pod(PREPARE, 0, make_word(Reason.PREPARED, prepared=prepared))
    await settle(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Succeeded", "AlreadyPublished")
    assert cluster.created == [PREPARE, PREPARE]


async def test_terminal_stays_terminal_when_children_are_deleted(cluster: FakeCluster) -> None:
    await live_to_the_end(cluster)
    before, writes = cluster.status, len(cluster.writes)
    cluster.children.clear()
    cluster.pods.clear()
    await settle(cluster)
    assert cluster.status == before
    assert len(cluster.writes) == writes


async def test_a_finished_run_acknowledges_a_new_generation(cluster: FakeCluster) -> None:
    await live_to_the_end(cluster)
    cluster.change(deadlines={"total": "48h"})
    await settle(cluster)
    assert cluster.status["observedGeneration"] == 2
    assert {entry["observedGeneration"] for entry in cluster.status["conditions"]} == {2}


async def test_a_vanished_pod_of_a_finished_job_is_prepared_again(cluster: FakeCluster) -> None:
    await settle(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_WORD)
    await settle(cluster)
    cluster.start_pod(TRAIN)
    await settle(cluster)
    cluster.pass_time(timedelta(minutes=10))
    cluster.finish_job(TRAIN, "Complete")
    cluster.pods.clear()
    cluster.pass_time(timedelta(minutes=1))
    await settle(cluster)
    cluster.pass_time(timedelta(minutes=1))
    await settle(cluster)
    assert cluster.status["attempts"][0]["reason"] == "PodLost"
    assert ("Job", PREPARE) in cluster.children
    assert ("Job", TRAIN) not in cluster.children
    cluster.end_pod(PREPARE, 0, make_word(Reason.ALREADY_PUBLISHED, prepared=make_prepared(published=make_result())))
    await settle(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Succeeded", "AlreadyPublished")


async def test_jobs_that_are_deleted_again_and_again_end_the_run(cluster: FakeCluster) -> None:
    for attempt in (1, 2, 3):
        await settle(cluster)
        cluster.pass_time(timedelta(minutes=1))
        await settle(cluster)
        cluster.end_pod(PREPARE, 0, PREPARED_WORD)
        await settle(cluster)
        cluster.pass_time(timedelta(minutes=1))
        cluster.remove(names.train_job_name(REF.name, attempt))
    await settle(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Failed", "PodLost")


async def test_a_pod_that_never_starts_gives_its_node_back(cluster: FakeCluster) -> None:
    await settle(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_WORD)
    await settle(cluster)
    cluster.set_pod(TRAIN, "Pending", {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}})
    outcome = await once(cluster)
    assert outcome.requeue == timedelta(minutes=30)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Scheduling", "ImagePullFailed")
    cluster.pass_time(timedelta(minutes=30))
    await settle(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Failed", "ImagePullFailed")
    assert "no such image" in cluster.status["message"]
    assert ("Job", TRAIN) not in cluster.children


async def test_an_invalid_spec_names_the_field() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest(lora={"rank": 0}))
    await settle(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Failed", "InvalidSpec")
    assert "spec.lora.rank" in cluster.status["message"]
    assert cluster.created == []


async def test_the_deadline_follows_the_spec(cluster: FakeCluster) -> None:
    await settle(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_WORD)
    await settle(cluster)
    cluster.start_pod(TRAIN)
    cluster.change(deadlines={"total": "48h"})
    await settle(cluster)
    assert cluster.children["Job", TRAIN]["spec"]["activeDeadlineSeconds"] == 48 * 3600


async def test_children_of_a_deleted_namesake_are_waited_for(cluster: FakeCluster) -> None:
    await settle(cluster)
    cluster.submit(make_manifest())
    outcome = await once(cluster)
    assert outcome.requeue == NAME_TAKEN_RETRY
    assert cluster.status["phase"] == "Pending"
    cluster.children.clear()
    await settle(cluster)
    assert cluster.status["phase"] == "Preparing"


async def test_a_foreign_job_is_not_adopted(cluster: FakeCluster) -> None:
    foreign = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": PREPARE}}
    cluster.children["Job", PREPARE] = foreign
    await settle(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Failed", "InvalidSpec")
    assert cluster.children["Job", PREPARE] is foreign


async def test_progress_reaches_the_columns(cluster: FakeCluster) -> None:
    await settle(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_WORD)
    await settle(cluster)
    cluster.start_pod(TRAIN)
    live = Progress(
        percent=42, step=75, total_steps=180, remaining_seconds=190, loss=2.8312, phase=Phase.EVALUATING,
        tokens_per_second=812.4, updated_at=cluster.now,
    )  # fmt: skip
    await settle(cluster, live)
    columns = {key: cluster.status[key] for key in ("phase", "progress", "eta", "loss", "step", "tokensPerSecond")}
    assert columns == {
        "phase": "Evaluating", "progress": "42%", "eta": "3m10s", "loss": "2.831", "step": "75/180",
        "tokensPerSecond": "812",
    }  # fmt: skip


async def test_a_report_of_a_deleted_namesake_is_ignored(cluster: FakeCluster) -> None:
    old = Progress(percent=99, updated_at=cluster.now - timedelta(minutes=1))
    await settle(cluster, old)
    assert "progress" not in cluster.status


async def test_a_plain_pod_reports_before_there_is_a_job(cluster: FakeCluster) -> None:
    await settle(cluster, Progress(percent=7, updated_at=cluster.now))
    assert (cluster.status["phase"], cluster.status["progress"]) == ("Preparing", "7%")


def gpu_node(product: str, mebibytes: int) -> Manifest:
    labels = {NVIDIA.product_label: product, NVIDIA.memory_label: str(mebibytes)}
    return {"metadata": {"name": product, "labels": labels}, "status": {"allocatable": {NVIDIA.resource: "1"}}}


def prepared_word(model: str) -> str:
    config = json.loads((CONFIGS / f"{model}.json").read_text())
    prepared = make_prepared()
    known = prepared.model.model_copy(update={"config": reduce_config(config)})
    return make_word(Reason.PREPARED, prepared=prepared.model_copy(update={"model": known}))


async def prepare_for_gpus(cluster: FakeCluster, model: str) -> None:
    cluster.submit(make_manifest(resources={"gpusPerNode": 1}))
    cluster.nodes = [gpu_node("Tesla-T4", 15_360), gpu_node("NVIDIA-A10", 23_028)]
    await settle(cluster)
    cluster.end_pod(PREPARE, 0, prepared_word(model))
    await settle(cluster)


async def test_a_run_is_sized_by_the_clusters_gpus_before_it_asks_for_one() -> None:
    cluster = FakeCluster()
    await prepare_for_gpus(cluster, "llama-3.2-3b")
    plan = cluster.status["plan"]
    assert plan["gpuProduct"] == "Tesla-T4"
    assert 0 < plan["peakBytes"] < 15_360 << 20
    pod = cluster.children["Job", TRAIN]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "Tesla-T4"}
    seen = cluster.looks_at_nodes
    cluster.nodes = []
    cluster.start_pod(TRAIN)
    await settle(cluster)
    assert (cluster.status["plan"], cluster.looks_at_nodes) == (plan, seen)


async def test_a_run_is_sized_although_its_prepare_job_is_not_complete_yet() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest(resources={"gpusPerNode": 1}))
    cluster.nodes = [gpu_node("Tesla-T4", 15_360)]
    await settle(cluster)
    cluster.end_pod(PREPARE, 0, prepared_word("llama-3.2-3b"))
    cluster.children["Job", PREPARE]["status"] = {}
    await settle(cluster)
    assert cluster.status["plan"]["gpuProduct"] == "Tesla-T4"


async def test_a_run_that_cannot_fit_asks_for_no_gpu() -> None:
    cluster = FakeCluster()
    await prepare_for_gpus(cluster, "llama-2-70b")
    assert (cluster.status["phase"], cluster.status["reason"]) == (Phase.FAILED, Reason.DOES_NOT_FIT)
    assert (
        "more than the 22.0 GiB that a process has on a NVIDIA-A10; it fits on a GPU with" in cluster.status["message"]
    )
    assert cluster.created == [PREPARE, PREPARE]
    assert "plan" not in cluster.status


async def test_nodes_are_not_looked_at_for_a_run_on_cpus(cluster: FakeCluster) -> None:
    await live_to_the_end(cluster)
    assert cluster.looks_at_nodes == 0
