"""The progress endpoint with real tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.commands import wait_until
from tests.integration.operator_process import NAME, PREPARE, TRAIN, JobNamespace, Operator, install
from tests.make import PUBLISHED_MESSAGE

KUBEFLOW: Final[dict[str, Any]] = {
    "trainerStatus": {
        "progressPercentage": 42,
        "estimatedRemainingSeconds": 190,
        "metrics": [
            {"name": "current_step", "value": "75"},
            {"name": "total_steps", "value": "180"},
            {"name": "loss", "value": "2.8312"},
            {"name": "learning_rate", "value": "0.0002"},
        ],
        "lastUpdatedTime": "2026-03-01T12:00:00Z",
    }
}
"""What transformers' KubeflowCallback sends."""


@pytest.fixture(scope="module")
def place(control_plane: Cluster) -> JobNamespace:
    install(control_plane)
    control_plane.kubectl("create", "namespace", "progress")
    wait_until("account", lambda: bool(control_plane.get("serviceaccounts", "--namespace=progress")["items"]))
    return JobNamespace(control_plane, "progress")


@pytest.fixture(scope="module")
def operator(place: JobNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """One operator, and a job that trains."""
    folder: Path = tmp_path_factory.mktemp("operator")
    operator = Operator(place.cluster, folder, place.namespace).start()
    place.run_to_training()
    yield operator
    operator.stop_and_check_log()


def test_a_report_reaches_the_columns(operator: Operator, place: JobNamespace) -> None:
    token = place.token(place.pod_of(TRAIN))
    assert operator.post(place.namespace, NAME, token, KUBEFLOW) == (200, {})
    wait_until("progress", lambda: place.status().get("progress") == "42%", timeout=20)
    status = place.status()
    assert {key: status[key] for key in ("eta", "loss", "step")} == {"eta": "3m10s", "loss": "2.831", "step": "75/180"}


def test_no_token_is_refused(operator: Operator, place: JobNamespace) -> None:
    code, answer = operator.post(place.namespace, NAME, "", KUBEFLOW)
    assert (code, answer["message"]) == (401, "send the pod's token: Authorization: Bearer <token>")


def test_a_token_for_another_audience_is_refused(operator: Operator, place: JobNamespace) -> None:
    token = place.token(place.pod_of(TRAIN), audience="https://kubernetes.default.svc.cluster.local")
    assert operator.post(place.namespace, NAME, token, KUBEFLOW)[0] == 401


def test_pod_of_other_job_is_forbidden(operator: Operator, place: JobNamespace) -> None:
    place.submit("other")
    token = place.token(place.pod_of(PREPARE))
    code, answer = operator.post(place.namespace, "other", token, KUBEFLOW)
    assert (code, "does not belong to QLoRAJob progress/other" in answer["message"]) == (403, True)
    assert "progress" not in place.status("other")


def test_pod_of_other_namespace_is_forbidden(operator: Operator, place: JobNamespace) -> None:
    assert operator.post("default", NAME, place.token(place.pod_of(TRAIN)), KUBEFLOW)[0] == 403


def test_an_invalid_report_is_refused_by_field(operator: Operator, place: JobNamespace) -> None:
    code, answer = operator.post(place.namespace, NAME, place.token(place.pod_of(TRAIN)), {"trainerStatus": {}})
    assert (code, answer["message"]) == (400, "trainerStatus.lastUpdatedTime: Field required")


def test_labeled_pod_without_job_may_report(operator: Operator, place: JobNamespace) -> None:
    place.submit("plain")
    place.kubectl("run", "script", "--image=mine", "--labels=qlora.dev/job=plain")
    assert operator.post(place.namespace, "plain", place.token("script"), KUBEFLOW) == (200, {})
    wait_until("progress", lambda: place.status("plain").get("progress") == "42%", timeout=20)


def test_a_report_for_a_job_that_is_gone_is_not_found(operator: Operator, place: JobNamespace) -> None:
    place.kubectl("run", "stray", "--image=mine", "--labels=qlora.dev/job=gone")
    assert operator.post(place.namespace, "gone", place.token("stray"), KUBEFLOW)[0] == 404


def test_a_deleted_pod_is_refused(operator: Operator, place: JobNamespace) -> None:
    place.kubectl("run", "short-lived", "--image=mine", f"--labels=qlora.dev/job={NAME}")
    token = place.token("short-lived")
    place.kubectl("delete", "pod", "short-lived", "--now")
    assert operator.post(place.namespace, NAME, token, KUBEFLOW)[0] == 401


def test_report_after_end_changes_nothing(operator: Operator, place: JobNamespace) -> None:
    token = place.token(place.pod_of(TRAIN))
    place.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    before = place.wait_for("Succeeded")
    assert operator.post(place.namespace, NAME, token, KUBEFLOW)[0] == 200
    assert place.status() == before
