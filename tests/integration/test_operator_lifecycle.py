"""The real operator on a real control plane: its life, its death, and what it may do."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from qlora_api import names
from qlora_operator.lifecycle.job_deadline import SAFETY_MARGIN
from tests.chaos.promises import promise
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
from tests.integration.operator_process import (
    NAME,
    PREPARE,
    ROOT,
    TRAIN,
    JobNamespace,
    Operator,
)
from tests.make import PREPARED_MESSAGE, PUBLISHED_MESSAGE, make_prepared, make_result, make_termination_message

PREPARE_AGAIN: Final = names.prepare_job_name(NAME, 2)
COLLECTED: Final = 90.0
"""Seconds: the garbage collector looks for new kinds every 30, and collects nothing of a kind that it does not know."""


@pytest.fixture
def operator(installed: Cluster, job_namespace: JobNamespace, tmp_path: Path) -> Iterator[Operator]:
    """An operator that serves the test's namespace; a permission that it lacks fails the test."""
    operator = Operator(installed, tmp_path, job_namespace.namespace).start()
    yield operator
    operator.stop_and_check_log()


@pytest.mark.usefixtures("operator")
def test_run_from_submission_to_success(job_namespace: JobNamespace) -> None:
    job_namespace.run_to_success()
    status = job_namespace.status()
    conditions = {entry["type"]: entry["status"] for entry in status["conditions"]}
    assert conditions == {
        "Ready": "True", "Reconciling": "False", "Stalled": "False", "Finished": "True", "Succeeded": "True",
        "Published": "True", "Prepared": "True", "Scheduled": "True", "Suspended": "False",
    }  # fmt: skip
    assert status["output"]["adapter"] == make_result().adapter
    job_namespace.kubectl("wait", "--for=condition=Finished", f"qlorajob/{NAME}", "--timeout=1s")
    assert sorted(job_namespace.jobs()) == [TRAIN, PREPARE]
    events = {event["reason"] for event in job_namespace.items("events") if event["regarding"]["kind"] == "QLoRAJob"}
    assert {"Prepared", "Training", "Published"} <= events


@pytest.mark.usefixtures("operator")
def test_printer_columns(job_namespace: JobNamespace) -> None:
    job_namespace.run_to_success()
    header, row = job_namespace.kubectl("get", "qlj", "--output=wide").splitlines()
    assert header.split() == [
        "NAME", "PHASE", "PROGRESS", "ETA", "LOSS", "GPUS", "REASON", "AGE", "MODEL", "STEP", "TOK/S", "ATTEMPT",
        "GPU-HOURS", "ADAPTER", "MESSAGE",
    ]  # fmt: skip
    assert row.split()[:3] == [NAME, "Succeeded", "100%"]
    assert "Published" in row.split()
    assert row.partition(make_result().adapter)[2].strip() == job_namespace.status()["summary"]


def test_operator_without_namespaces_serves_cluster(
    installed: Cluster, job_namespace: JobNamespace, tmp_path: Path
) -> None:
    operator = Operator(installed, tmp_path).start()
    try:
        job_namespace.submit()
        job_namespace.wait_for("Preparing")
    finally:
        operator.stop()


@promise(
    fault="a QLoRAJob is deleted and created again while its Jobs end",
    promise="the new one has Jobs of its own, and finds the result of the old one",
    how="`kubectl delete --wait=false`, and `create`",
)
@pytest.mark.usefixtures("operator")
def test_recreated_job_gets_its_own_children(job_namespace: JobNamespace) -> None:
    job_namespace.run_to_training()
    first = job_namespace.jobs()
    job_namespace.kubectl("delete", "qlorajob", NAME, "--wait=false")
    job_namespace.submit()
    wait_until("new prepare Job", lambda: job_namespace.jobs().get(PREPARE) not in {None, first[PREPARE]}, COLLECTED)
    job_namespace.end_pod(
        PREPARE, 0, make_termination_message("Prepared", prepared=make_prepared(published=make_result()))
    )
    job_namespace.wait_for("Succeeded", "AlreadyPublished")
    assert TRAIN not in job_namespace.jobs()


@pytest.mark.parametrize("moment", ["submitted", "preparing", "prepared", "training", "published"])
def test_sigkill_of_operator_loses_nothing(moment: str, operator: Operator, job_namespace: JobNamespace) -> None:
    def die(now: str) -> None:
        if now == moment:
            operator.kill()
            operator.start()

    if moment == "submitted":
        operator.kill()
    job_namespace.submit()
    if moment == "submitted":
        operator.start()
    job_namespace.pod_of(PREPARE)
    prepare = job_namespace.jobs()[PREPARE]
    die("preparing")
    if moment == "prepared":
        operator.kill()
    job_namespace.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    if moment == "prepared":
        operator.start()
    job_namespace.start_pod(TRAIN)
    train = job_namespace.jobs()[TRAIN]
    die("training")
    job_namespace.wait_for("Training")
    if moment == "published":
        operator.kill()
    job_namespace.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    if moment == "published":
        operator.start()
    job_namespace.wait_for("Succeeded", "Published")
    assert job_namespace.jobs() == {PREPARE: prepare, TRAIN: train}


def test_deletion_needs_no_operator(operator: Operator, job_namespace: JobNamespace) -> None:
    job_namespace.run_to_training()
    operator.kill()
    job_namespace.kubectl("delete", "qlorajob", NAME, "--timeout=10s")
    wait_until("no Job is left", lambda: not job_namespace.jobs(), COLLECTED)
    wait_until("no ConfigMap is left", lambda: len(job_namespace.items("configmaps")) == 1, COLLECTED)
    wait_until("no pod is left", lambda: not job_namespace.items("pods"), COLLECTED)


def test_sigterm_ends_cleanly_within_seconds(operator: Operator, job_namespace: JobNamespace) -> None:
    job_namespace.submit()
    job_namespace.wait_for("Preparing")
    start = time.monotonic()
    assert operator.terminate() == 0
    assert time.monotonic() - start < 5


@pytest.mark.usefixtures("operator")
def test_deleted_children_of_finished_run_are_not_recreated(job_namespace: JobNamespace) -> None:
    job_namespace.run_to_success()
    before = job_namespace.status()
    job_namespace.kubectl("delete", "jobs", "--all")
    time.sleep(2)
    assert job_namespace.jobs() == {}
    assert job_namespace.status() == before


@pytest.mark.usefixtures("operator")
def test_job_without_termination_message_is_prepared_again(job_namespace: JobNamespace) -> None:
    job_namespace.run_to_training()
    job_namespace.kubectl("delete", "job", TRAIN)
    wait_until("PodLost on record", lambda: "PodLost" in ends_of_attempts(job_namespace))
    job_namespace.end_pod(PREPARE_AGAIN, 0, PREPARED_MESSAGE)
    wait_until("the first prepare Job is deleted", lambda: PREPARE not in job_namespace.jobs())
    second = names.train_job_name(NAME, 2)
    job_namespace.start_pod(second)
    job_namespace.end_pod(second, 0, PUBLISHED_MESSAGE)
    assert job_namespace.wait_for("Succeeded", "Published")["attempt"] == 2


@pytest.mark.usefixtures("operator")
def test_manifest_with_emoji_is_prepared_again(job_namespace: JobNamespace) -> None:
    """The second preparation finds the ConfigMap of the first, and brings it up to date."""
    job_namespace.submit(dataset={"template": {"prompt": "\U0001f600 \u2028\x7f {question}", "answer": "{answer}"}})
    job_namespace.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    job_namespace.start_pod(TRAIN)
    job_namespace.wait_for("Training")
    job_namespace.kubectl("delete", "job", TRAIN, PREPARE)
    wait_until("PodLost on record", lambda: "PodLost" in ends_of_attempts(job_namespace))
    job_namespace.end_pod(PREPARE_AGAIN, 0, PREPARED_MESSAGE)
    job_namespace.start_pod(names.train_job_name(NAME, 2))
    assert job_namespace.wait_for("Training")["attempt"] == 2


@pytest.mark.usefixtures("operator")
def test_failure_has_reason_and_remedy(job_namespace: JobNamespace) -> None:
    job_namespace.submit()
    job_namespace.end_pod(PREPARE, 3, make_termination_message("DatasetInvalid", "row 7: field output is missing"))
    status = job_namespace.wait_for("Failed", "DatasetInvalid")
    assert status["message"] == "row 7: field output is missing. What to do: Correct the row in the dataset."
    assert [job["metadata"]["name"] for job in job_namespace.items("jobs")] == [PREPARE]


@pytest.mark.usefixtures("operator")
def test_total_deadline_fails_run(job_namespace: JobNamespace) -> None:
    job_namespace.submit(deadlines={"total": "1s"})
    job_namespace.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    job_namespace.start_pod(TRAIN)
    status = job_namespace.wait_for("Failed", "DeadlineExceeded")
    assert "exceeded its deadline (what was left of spec.deadlines.total)" in status["message"]


@promise(
    fault="a pod with a node cannot pull its image",
    promise="its node is given back at spec.deadlines.startup, with the kubelet's sentence in the attempt",
    how="the test plays the kubelet",
)
@pytest.mark.usefixtures("operator")
def test_startup_deadline_releases_node(job_namespace: JobNamespace) -> None:
    job_namespace.submit(deadlines={"startup": "5s"})
    job_namespace.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    job_namespace.bind_pod(TRAIN)
    job_namespace.set_pod(TRAIN, "Pending", {"waiting": {"reason": "ImagePullBackOff", "message": "denied"}})
    job_namespace.wait_for("Scheduling", "ImagePullFailed")
    pod = job_namespace.pod_name(TRAIN)
    wait_until("deletion of the pod", lambda: "deletionTimestamp" in job_namespace.metadata("pods", pod))
    (attempt,) = job_namespace.wait_for("Scheduling", "ImagePullFailed")["attempts"]
    assert (attempt["reason"], attempt["domain"]) == ("ImagePullFailed", "node")
    assert "denied" in attempt["message"]


@pytest.mark.usefixtures("operator")
def test_job_of_other_owner_is_not_adopted(job_namespace: JobNamespace) -> None:
    job_namespace.kubectl("create", "job", PREPARE, "--image=mine", "--", "true")
    before = job_namespace.cluster.get("job", PREPARE, f"--namespace={job_namespace.namespace}")["metadata"]
    job_namespace.submit()
    assert PREPARE in job_namespace.wait_for("Failed", "InvalidSpec")["message"]
    after = job_namespace.cluster.get("job", PREPARE, f"--namespace={job_namespace.namespace}")["metadata"]
    assert (after["uid"], after.get("ownerReferences")) == (before["uid"], None)


def test_denied_pod_is_in_status(installed: Cluster, job_namespace: JobNamespace, tmp_path: Path) -> None:
    """A spec that makes an invalid pod is refused at submission, so it takes a wrong setting of the operator."""
    operator = Operator(installed, tmp_path, job_namespace.namespace, QLORA_TRAINER_IMAGE="trainer:test ").start()
    try:
        job_namespace.submit()
        message = job_namespace.wait_for("Preparing", "PodRejected")["message"]
    finally:
        operator.stop()
    assert "must not have leading or trailing whitespace" in message


@promise(
    fault="the quota of a namespace is used up",
    promise="the run waits as PodRejected with the API server's sentence",
    how="a ResourceQuota without Jobs",
)
@pytest.mark.usefixtures("operator")
def test_quota_is_waited_for(job_namespace: JobNamespace) -> None:
    job_namespace.kubectl("create", "quota", "none", "--hard=count/jobs.batch=0")
    wait_until("quota", lambda: bool(job_namespace.items("resourcequotas")[0].get("status")))
    job_namespace.submit()
    assert "exceeded quota" in job_namespace.wait_for("Pending", "PodRejected")["message"]


@pytest.mark.usefixtures("operator")
def test_deadline_of_running_attempt_follows_spec(job_namespace: JobNamespace) -> None:
    job_namespace.run_to_training()
    job_namespace.kubectl(
        "patch", "qlorajob", NAME, "--type=merge", '--patch={"spec": {"deadlines": {"total": "48h"}}}'
    )

    def deadline() -> int:
        return int(job_namespace.kubectl("get", "job", TRAIN, "--output=jsonpath={.spec.activeDeadlineSeconds}"))

    wait_until("new deadline", lambda: 0 <= deadline() - 48 * 3600 - SAFETY_MARGIN.total_seconds() < 600)


@pytest.mark.usefixtures("operator")
def test_invalid_spec_past_api_server_fails_run(installed: Cluster, job_namespace: JobNamespace) -> None:
    crd = yaml.safe_load((ROOT / "crds/qlorajobs.qlora.dev.yaml").read_text())
    try:
        installed.kubectl("apply", "-f", "-", stdin=json.dumps(without_rules(crd)))
        time.sleep(1)
        job_namespace.submit(method="lora")
    finally:
        installed.kubectl("apply", "-f", str(ROOT / "crds/qlorajobs.qlora.dev.yaml"))
    assert "spec.quantization.bits is 4" in job_namespace.wait_for("Failed", "InvalidSpec")["message"]
    assert job_namespace.jobs() == {}


def ends_of_attempts(job_namespace: JobNamespace) -> list[str]:
    """How the attempts on record ended."""
    return [attempt.get("reason", "") for attempt in job_namespace.status().get("attempts", [])]


def without_rules(value: Any) -> Any:
    """The CRD of a cluster that does not know CEL."""
    if isinstance(value, dict):
        return {key: without_rules(item) for key, item in value.items() if key != "x-kubernetes-validations"}
    return [without_rules(item) for item in value] if isinstance(value, list) else value
