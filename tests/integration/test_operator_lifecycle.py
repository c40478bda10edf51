"""The real operator on a real control plane: its life, its death, and what it may do."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from qlora_api import names
from tests.cluster.cluster import Cluster
from tests.cluster.commands import wait_until
from tests.integration.operator_process import (
    NAME,
    PREPARE,
    ROOT,
    TRAIN,
    JobNamespace,
    Operator,
    install,
    open_job_namespace,
)
from tests.make import PREPARED_MESSAGE, PUBLISHED_MESSAGE, make_prepared, make_result, make_termination_message

COLLECTED: Final = 90.0
"""Seconds: the garbage collector looks for new kinds every 30, and collects nothing of a kind that it does not know."""


@pytest.fixture(scope="module")
def installed(control_plane: Cluster) -> Cluster:
    install(control_plane)
    return control_plane


@pytest.fixture
def place(installed: Cluster, request: pytest.FixtureRequest) -> Iterator[JobNamespace]:
    """A namespace of its own for every test."""
    with open_job_namespace(installed, request.node.name) as place:
        yield place


@pytest.fixture
def operator(installed: Cluster, place: JobNamespace, tmp_path: Path) -> Iterator[Operator]:
    """An operator that serves the test's namespace; a permission that it lacks fails the test."""
    operator = Operator(installed, tmp_path, place.namespace).start()
    yield operator
    operator.stop_and_check_log()


@pytest.mark.usefixtures("operator")
def test_run_from_submission_to_success(place: JobNamespace) -> None:
    place.run_to_success()
    status = place.status()
    conditions = {entry["type"]: entry["status"] for entry in status["conditions"]}
    assert conditions == {
        "Ready": "True", "Reconciling": "False", "Stalled": "False", "Finished": "True", "Succeeded": "True",
        "Published": "True", "Prepared": "True", "Scheduled": "True", "Suspended": "False",
    }  # fmt: skip
    assert status["output"]["adapter"] == make_result().adapter
    place.kubectl("wait", "--for=condition=Finished", f"qlorajob/{NAME}", "--timeout=1s")
    assert sorted(place.jobs()) == [TRAIN, PREPARE]
    events = {event["reason"] for event in place.items("events") if event["regarding"]["kind"] == "QLoRAJob"}
    assert {"Prepared", "Training", "Published"} <= events


@pytest.mark.usefixtures("operator")
def test_the_columns(place: JobNamespace) -> None:
    place.run_to_success()
    header, row = place.kubectl("get", "qlj", "--output=wide").splitlines()
    assert header.split() == [
        "NAME", "PHASE", "PROGRESS", "ETA", "LOSS", "GPUS", "AGE", "MODEL", "STEP", "TOK/S", "ATTEMPT", "ADAPTER",
        "REASON",
    ]  # fmt: skip
    assert row.split()[:3] == [NAME, "Succeeded", "100%"]
    assert row.split()[-2:] == [make_result().adapter, "Published"]


def test_the_whole_cluster_is_served_without_namespaces(
    installed: Cluster, place: JobNamespace, tmp_path: Path
) -> None:
    operator = Operator(installed, tmp_path).start()
    try:
        place.submit()
        place.wait_for("Preparing")
    finally:
        operator.stop()


@pytest.mark.usefixtures("operator")
def test_recreated_job_gets_its_own_children(place: JobNamespace) -> None:
    place.run_to_training()
    first = place.jobs()
    place.kubectl("delete", "qlorajob", NAME, "--wait=false")
    place.submit()
    wait_until("new prepare Job", lambda: place.jobs().get(PREPARE) not in {None, first[PREPARE]}, COLLECTED)
    place.end_pod(PREPARE, 0, make_termination_message("Prepared", prepared=make_prepared(published=make_result())))
    place.wait_for("Succeeded", "AlreadyPublished")
    assert TRAIN not in place.jobs()


@pytest.mark.parametrize("moment", ["submitted", "preparing", "prepared", "training", "published"])
def test_sigkill_of_operator_loses_nothing(moment: str, operator: Operator, place: JobNamespace) -> None:
    def die(now: str) -> None:
        if now == moment:
            operator.kill()
            operator.start()

    if moment == "submitted":
        operator.kill()
    place.submit()
    if moment == "submitted":
        operator.start()
    place.pod_of(PREPARE)
    prepare = place.jobs()[PREPARE]
    die("preparing")
    if moment == "prepared":
        operator.kill()
    place.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    if moment == "prepared":
        operator.start()
    place.start_pod(TRAIN)
    train = place.jobs()[TRAIN]
    die("training")
    place.wait_for("Training")
    if moment == "published":
        operator.kill()
    place.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    if moment == "published":
        operator.start()
    place.wait_for("Succeeded", "Published")
    assert place.jobs() == {PREPARE: prepare, TRAIN: train}


def test_deletion_needs_no_operator(operator: Operator, place: JobNamespace) -> None:
    place.run_to_training()
    operator.kill()
    place.kubectl("delete", "qlorajob", NAME, "--timeout=10s")
    wait_until("no Job is left", lambda: not place.jobs(), COLLECTED)
    wait_until("no ConfigMap is left", lambda: len(place.items("configmaps")) == 1, COLLECTED)
    wait_until("no pod is left", lambda: not place.items("pods"), COLLECTED)


def test_sigterm_ends_cleanly_within_seconds(operator: Operator, place: JobNamespace) -> None:
    place.submit()
    place.wait_for("Preparing")
    start = time.monotonic()
    assert operator.terminate() == 0
    assert time.monotonic() - start < 5


@pytest.mark.usefixtures("operator")
def test_deleted_children_of_finished_run_are_not_recreated(place: JobNamespace) -> None:
    place.run_to_success()
    before = place.status()
    place.kubectl("delete", "jobs", "--all")
    time.sleep(2)
    assert place.jobs() == {}
    assert place.status() == before


@pytest.mark.usefixtures("operator")
def test_job_without_termination_message_is_prepared_again(place: JobNamespace) -> None:
    place.run_to_training()
    first = place.jobs()[PREPARE]
    place.kubectl("delete", "job", TRAIN)
    wait_until("PodLost on record", lambda: "PodLost" in ends_of_attempts(place), timeout=30)
    wait_until("a new prepare Job", lambda: place.jobs().get(PREPARE) not in {None, first}, timeout=30)
    place.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    second = names.train_job_name(NAME, 2)
    place.start_pod(second)
    place.end_pod(second, 0, PUBLISHED_MESSAGE)
    assert place.wait_for("Succeeded", "Published")["attempt"] == 2


@pytest.mark.usefixtures("operator")
def test_a_manifest_with_any_letters_is_prepared_again(place: JobNamespace) -> None:
    """The second preparation finds the ConfigMap of the first, and brings it up to date."""
    place.submit(dataset={"template": {"prompt": "\U0001f600 \u2028\x7f {question}", "answer": "{answer}"}})
    place.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    place.start_pod(TRAIN)
    place.wait_for("Training")
    place.kubectl("delete", "job", TRAIN, PREPARE)
    wait_until("PodLost on record", lambda: "PodLost" in ends_of_attempts(place), timeout=30)
    place.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    place.start_pod(names.train_job_name(NAME, 2))
    assert place.wait_for("Training")["attempt"] == 2


@pytest.mark.usefixtures("operator")
def test_a_failure_names_its_reason_and_its_remedy(place: JobNamespace) -> None:
    place.submit()
    place.end_pod(PREPARE, 3, make_termination_message("DatasetInvalid", "row 7: field output is missing"))
    status = place.wait_for("Failed", "DatasetInvalid")
    assert status["message"] == "row 7: field output is missing. What to do: Correct the row in the dataset."
    assert [job["metadata"]["name"] for job in place.items("jobs")] == [PREPARE]


@pytest.mark.usefixtures("operator")
def test_the_deadline_of_the_whole_run(place: JobNamespace) -> None:
    place.submit(deadlines={"total": "1s"})
    place.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    assert "exceeded its deadline of 1 seconds" in place.wait_for("Failed", "DeadlineExceeded")["message"]


@pytest.mark.usefixtures("operator")
def test_startup_deadline_releases_node(place: JobNamespace) -> None:
    place.submit(deadlines={"startup": "5s"})
    place.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    place.bind_pod(TRAIN)
    place.set_pod(TRAIN, "Pending", {"waiting": {"reason": "ImagePullBackOff", "message": "denied"}})
    place.wait_for("Scheduling", "ImagePullFailed")
    assert "denied" in place.wait_for("Failed", "ImagePullFailed")["message"]
    pod = place.pod_name(TRAIN)
    wait_until("the pod is told to end", lambda: "deletionTimestamp" in place.metadata("pods", pod), timeout=20)


@pytest.mark.usefixtures("operator")
def test_a_foreign_job_is_not_adopted(place: JobNamespace) -> None:
    place.kubectl("create", "job", PREPARE, "--image=mine", "--", "true")
    before = place.cluster.get("job", PREPARE, f"--namespace={place.namespace}")["metadata"]
    place.submit()
    assert PREPARE in place.wait_for("Failed", "InvalidSpec")["message"]
    after = place.cluster.get("job", PREPARE, f"--namespace={place.namespace}")["metadata"]
    assert (after["uid"], after.get("ownerReferences")) == (before["uid"], None)


@pytest.mark.usefixtures("operator")
def test_a_child_that_the_api_server_refuses_is_shown(place: JobNamespace) -> None:
    place.submit(resources={"tolerations": [{"key": "team", "operator": "Exists", "value": "ml"}]})
    place.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    assert "value must be empty" in place.wait_for("Failed", "InvalidSpec")["message"]


@pytest.mark.usefixtures("operator")
def test_a_quota_is_waited_for(place: JobNamespace) -> None:
    place.kubectl("create", "quota", "none", "--hard=count/jobs.batch=0")
    wait_until("quota", lambda: bool(place.items("resourcequotas")[0].get("status")), timeout=20)
    place.submit()
    assert "exceeded quota" in place.wait_for("Pending", "PodRejected")["message"]


@pytest.mark.usefixtures("operator")
def test_the_deadline_of_a_running_attempt_follows_the_spec(place: JobNamespace) -> None:
    place.run_to_training()
    place.kubectl("patch", "qlorajob", NAME, "--type=merge", '--patch={"spec": {"deadlines": {"total": "48h"}}}')

    def deadline() -> int:
        return int(place.kubectl("get", "job", TRAIN, "--output=jsonpath={.spec.activeDeadlineSeconds}"))

    wait_until("new deadline", lambda: deadline() == 48 * 3600, timeout=20)


@pytest.mark.usefixtures("operator")
def test_a_spec_that_slipped_past_the_api_server_is_refused_by_name(installed: Cluster, place: JobNamespace) -> None:
    crd = yaml.safe_load((ROOT / "crds/qlorajobs.qlora.dev.yaml").read_text())
    try:
        installed.kubectl("apply", "-f", "-", stdin=json.dumps(without_rules(crd)))
        time.sleep(1)
        place.submit(method="lora")
    finally:
        installed.kubectl("apply", "-f", str(ROOT / "crds/qlorajobs.qlora.dev.yaml"))
    assert "spec.quantization.bits is 4" in place.wait_for("Failed", "InvalidSpec")["message"]
    assert place.jobs() == {}


def ends_of_attempts(place: JobNamespace) -> list[str]:
    """How the attempts on record ended."""
    return [attempt.get("reason", "") for attempt in place.status().get("attempts", [])]


def without_rules(value: Any) -> Any:
    """The CRD of a cluster that does not know CEL."""
    if isinstance(value, dict):
        return {key: without_rules(item) for key, item in value.items() if key != "x-kubernetes-validations"}
    return [without_rules(item) for item in value] if isinstance(value, list) else value
