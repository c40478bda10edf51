"""An attempt that its queue suspends resumes from the newest checkpoint, whatever happened to the preparation."""

import json
from datetime import timedelta
from typing import Any

import pytest

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Checkpoint, Progress
from qlora_operator.cluster.interface import AdmissionDeniedError
from qlora_operator.resources import Owner
from qlora_operator.resources.config_map import build_resumption
from tests.make import NOW, PREPARED_MESSAGE, REF, UID, make_termination_message
from tests.unit.operator.life import PREPARE, TRAIN, reconcile_now
from tests.unit.operator.simulation import Simulation, train

SHA256 = "a" * 64
MINUTE = timedelta(minutes=1)
PREEMPTED = "Preempted to accommodate a workload"


async def run_in_queue(*, sidecar: bool = False) -> Simulation:
    run = Simulation(resources={"gpusPerNode": 1}, queue={"name": "gpus"})
    run.kubernetes.sidecar = sidecar
    await run.prepare()
    run.kubernetes.admit(TRAIN)
    await run.run(2 * MINUTE)
    assert run.status["phase"] == "Training"
    return run


async def report_checkpoint(run: Simulation, step: int) -> None:
    await run.run(10 * MINUTE, MINUTE)
    uri = f"{run.status['output']['prefix']}/checkpoints/step-{step:06}-a1"
    checkpoint = Checkpoint(step=step, uri=uri, time=run.cluster.now, digest=SHA256)
    run.report = Progress(percent=20, step=step, updated_at=run.cluster.now, checkpoint=checkpoint)
    await reconcile_now(run.cluster, run.report)
    assert run.status["checkpoint"]["step"] == step


def next_start(run: Simulation) -> Any:
    """Return the step from which the next pod of the attempt resumes."""
    config = json.loads(run.cluster.children["ConfigMap", TRAIN]["data"]["run.json"])
    return config.get("checkpoint", {}).get("step")


@pytest.mark.parametrize("lost", ["nothing", "job", "pod"])
async def test_preempted_attempt_resumes_from_its_newest_checkpoint(lost: str) -> None:
    run = await run_in_queue()
    if lost == "job":
        run.cluster.remove(PREPARE)
    elif lost == "pod":
        for key in [key for key in run.cluster.pods if "-prepare-" in key]:
            del run.cluster.pods[key]
    for step in (100, 200, 300):
        await report_checkpoint(run, step)
    run.kubernetes.preempt(TRAIN, PREEMPTED)
    await run.run(3 * MINUTE)
    run.kubernetes.admit(TRAIN)
    await run.run(3 * MINUTE)
    assert run.outcome[0] == "Training"
    assert next_start(run) == 300


async def test_prepare_job_that_was_deleted_with_its_sidecar_is_not_needed() -> None:
    run = await run_in_queue(sidecar=True)
    assert PREPARE not in run.jobs
    await report_checkpoint(run, 400)
    assert next_start(run) == 400


async def test_checkpoint_is_passed_on_before_the_operator_is_away() -> None:
    run = await run_in_queue()
    await report_checkpoint(run, 500)
    run.kubernetes.preempt(TRAIN, PREEMPTED)
    run.kubernetes.step(timedelta(seconds=20))
    run.kubernetes.admit(TRAIN)
    run.kubernetes.step(timedelta(seconds=20))
    await run.run(2 * MINUTE)
    assert next_start(run) == 500


async def test_checkpoint_that_may_not_be_passed_on_is_passed_on_when_it_may() -> None:
    run = await run_in_queue()
    run.cluster.update_error = AdmissionDeniedError("policy: frozen", permanent=False)
    await report_checkpoint(run, 600)
    assert "would not resume from its newest checkpoint: policy: frozen" in run.status["message"]
    run.kubernetes.preempt(TRAIN, PREEMPTED)
    await run.run(3 * MINUTE)
    assert run.outcome[0] == "Queued"
    assert "policy: frozen" in run.status["message"]
    run.cluster.update_error = None
    await run.run(3 * MINUTE)
    assert next_start(run) == 600


@pytest.mark.parametrize("ran", [False, True], ids=["never ran", "preempted"])
async def test_configuration_that_somebody_deleted_in_the_queue_is_created_anew(ran: bool) -> None:
    run = Simulation(resources={"gpusPerNode": 1}, queue={"name": "gpus"})
    await run.prepare()
    before = dict(run.cluster.children["ConfigMap", TRAIN]["data"])
    if ran:
        run.kubernetes.admit(TRAIN)
        await run.run(2 * MINUTE)
        await report_checkpoint(run, 700)
        run.kubernetes.preempt(TRAIN, PREEMPTED)
        await run.run(3 * MINUTE)
    del run.cluster.children["ConfigMap", TRAIN]
    run.kubernetes.admit(TRAIN)
    await run.run(2 * MINUTE)
    assert next_start(run) == (700 if ran else None)
    assert run.cluster.children["ConfigMap", TRAIN]["data"].keys() == before.keys()


async def prepare_with_slow_pulls(run: Simulation, pull_time: timedelta) -> None:
    await run.run(MINUTE)
    run.kubernetes.pull_time = pull_time
    run.kubernetes.end_trainer(PREPARE, 0, PREPARED_MESSAGE)
    await run.run(MINUTE)


@pytest.mark.parametrize("attempt", [1, 2])
async def test_configuration_that_somebody_deleted_before_the_first_start_is_created_anew(attempt: int) -> None:
    run = Simulation(resources={"gpusPerNode": 1})
    await prepare_with_slow_pulls(run, 3 * MINUTE)
    if attempt > 1:
        await run.run(5 * MINUTE)
        await report_checkpoint(run, 100)
        run.kubernetes.end_trainer(TRAIN, 1, make_termination_message(Reason.S3_UNAVAILABLE, "503"))
        await run.run(MINUTE)
    name = train(attempt)
    before = dict(run.cluster.children["ConfigMap", name]["data"])
    del run.cluster.children["ConfigMap", name]
    await run.run(5 * MINUTE)
    assert run.outcome[0] == "Training"
    assert json.loads(run.cluster.children["ConfigMap", name]["data"]["run.json"]) == json.loads(before["run.json"])


async def test_configuration_is_not_read_each_time_that_a_pod_changes() -> None:
    run = Simulation(resources={"gpusPerNode": 1})
    await prepare_with_slow_pulls(run, 25 * MINUTE)
    await run.run(timedelta(minutes=20), MINUTE)
    assert 1 <= run.cluster.config_reads <= 8


async def test_run_without_a_queue_writes_no_configuration_while_it_trains() -> None:
    run = Simulation(resources={"gpusPerNode": 0})
    await run.prepare()
    await run.run(2 * MINUTE)
    before = [write for write in run.cluster.writes if "patch" in write]
    await report_checkpoint(run, 100)
    assert [write for write in run.cluster.writes if "patch" in write] == before


OWNER = Owner(REF, UID)
CHECKPOINT = Checkpoint(step=7, uri="s3://adapters/a", time=NOW, digest=SHA256)


def config_map(**change: Any) -> dict[str, Any]:
    metadata = {"namespace": "ml", "name": TRAIN, "uid": "map", "resourceVersion": "3"}
    data = {"run.json": json.dumps({"plan": {"word": "of a newer version"}, "attempt": 1})}
    return {"metadata": metadata | {"ownerReferences": [{"uid": UID}]}, "data": data} | change


def test_words_of_another_version_stay_in_the_configuration() -> None:
    patch = build_resumption(config_map(), OWNER, CHECKPOINT, ())
    assert patch is not None
    written = json.loads(patch["data"]["run.json"])
    assert written["plan"] == {"word": "of a newer version"}
    assert (written["checkpoint"]["step"], written["published"]) == (7, [])
    same = config_map(data=patch["data"])
    assert build_resumption(same, OWNER, CHECKPOINT, ()) is None
    cleared = build_resumption(same, OWNER, None, None)
    assert cleared is not None
    assert json.loads(cleared["data"]["run.json"]).keys() == {"plan", "attempt"}


@pytest.mark.parametrize(
    "existing",
    [
        pytest.param(config_map(metadata={"ownerReferences": [{"uid": "another"}]}), id="of another"),
        pytest.param(config_map(metadata={}), id="without an owner"),
        pytest.param(config_map(data={}), id="empty"),
        pytest.param({"metadata": {"ownerReferences": [{"uid": UID}]}}, id="without data"),
        pytest.param(config_map(data={"run.json": "[1]"}), id="no object"),
        pytest.param(config_map(data={"run.json": "{" * 2000}), id="no JSON"),
    ],
)
def test_configuration_of_somebody_else_or_in_ruins_is_left_alone(existing: dict[str, Any]) -> None:
    assert build_resumption(existing, OWNER, CHECKPOINT, None) is None
