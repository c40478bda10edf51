"""The progress endpoint with real tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.commands import wait_until
from tests.integration.operator_process import NAME, PREPARE, TRAIN, Operator, Place, install
from tests.make import PUBLISHED_WORD

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
def place(control_plane: Cluster) -> Place:
    install(control_plane)
    control_plane.kubectl("create", "namespace", "progress")
    wait_until("account", lambda: bool(control_plane.get("serviceaccounts", "--namespace=progress")["items"]))
    return Place(control_plane, "progress")


@pytest.fixture(scope="module")
def operator(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """One operator, and a job that trains."""
    folder: Path = tmp_path_factory.mktemp("operator")
    operator = Operator(place.cluster, folder, place.namespace).start()
    place.live_to_training()
    yield operator
    operator.dismiss()


def test_a_report_reaches_the_columns(operator: Operator, place: Place) -> None:
    token = place.token(place.pod_of(TRAIN))
    assert operator.post(place.namespace, NAME, token, KUBEFLOW) == (200, {})
    wait_until("progress", lambda: place.status().get("progress") == "42%", timeout=20)
    status = place.status()
    assert {key: status[key] for key in ("eta", "loss", "step")} == {"eta": "3m10s", "loss": "2.831", "step": "75/180"}


def test_no_token_is_refused(operator: Operator, place: Place) -> None:
    code, answer = operator.post(place.namespace, NAME, "", KUBEFLOW)
    assert (code, answer["message"]) == (401, "send the pod's token: Authorization: Bearer <token>")


def test_a_token_for_another_audience_is_refused(operator: Operator, place: Place) -> None:
    token = place.token(place.pod_of(TRAIN), audience="https://kubernetes.default.svc.cluster.local")
    assert operator.post(place.namespace, NAME, token, KUBEFLOW)[0] == 401


def test_a_pod_cannot_speak_for_another_job(operator: Operator, place: Place) -> None:
    place.submit("other")
    token = place.token(place.pod_of(PREPARE))
    code, answer = operator.post(place.namespace, "other", token, KUBEFLOW)
    assert (code, "does not belong to QLoRAJob progress/other" in answer["message"]) == (403, True)
    assert "progress" not in place.status("other")


def test_a_pod_cannot_speak_for_another_namespace(operator: Operator, place: Place) -> None:
    assert operator.post("default", NAME, place.token(place.pod_of(TRAIN)), KUBEFLOW)[0] == 403


def test_an_invalid_report_is_refused_by_field(operator: Operator, place: Place) -> None:
    code, answer = operator.post(place.namespace, NAME, place.token(place.pod_of(TRAIN)), {"trainerStatus": {}})
    assert (code, answer["message"]) == (400, "trainerStatus.lastUpdatedTime: Field required")


def test_a_plain_pod_speaks_for_its_job(operator: Operator, place: Place) -> None:
    place.submit("plain")
    place.kubectl("run", "script", "--image=mine", "--labels=qlora.dev/job=plain")
    assert operator.post(place.namespace, "plain", place.token("script"), KUBEFLOW) == (200, {})
    wait_until("progress", lambda: place.status("plain").get("progress") == "42%", timeout=20)


def test_a_report_for_a_job_that_is_gone_is_not_found(operator: Operator, place: Place) -> None:
    place.kubectl("run", "stray", "--image=mine", "--labels=qlora.dev/job=gone")
    assert operator.post(place.namespace, "gone", place.token("stray"), KUBEFLOW)[0] == 404


def test_a_deleted_pod_is_refused(operator: Operator, place: Place) -> None:
    place.kubectl("run", "short-lived", "--image=mine", f"--labels=qlora.dev/job={NAME}")
    token = place.token("short-lived")
    place.kubectl("delete", "pod", "short-lived", "--now")
    assert operator.post(place.namespace, NAME, token, KUBEFLOW)[0] == 401


def test_a_late_report_changes_nothing(operator: Operator, place: Place) -> None:
    token = place.token(place.pod_of(TRAIN))
    place.end_pod(TRAIN, 0, PUBLISHED_WORD)
    before = place.wait_for("Succeeded")
    assert operator.post(place.namespace, NAME, token, KUBEFLOW)[0] == 200
    assert place.status() == before
