"""The progress endpoint with real tokens."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
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
def job_namespace(control_plane: Cluster) -> JobNamespace:
    install(control_plane)
    control_plane.kubectl("create", "namespace", "progress")
    wait_until("account", lambda: bool(control_plane.get("serviceaccounts", "--namespace=progress")["items"]))
    return JobNamespace(control_plane, "progress")


@pytest.fixture(scope="module")
def operator(job_namespace: JobNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """One operator, and a job that trains."""
    folder: Path = tmp_path_factory.mktemp("operator")
    operator = Operator(job_namespace.cluster, folder, job_namespace.namespace).start()
    job_namespace.run_to_training()
    yield operator
    operator.stop_and_check_log()


def test_report_fills_columns_end_to_end(operator: Operator, job_namespace: JobNamespace) -> None:
    token = job_namespace.token(job_namespace.pod_of(TRAIN))
    assert operator.post(job_namespace.namespace, NAME, token, KUBEFLOW) == (200, {})
    wait_until("progress", lambda: job_namespace.status().get("progress") == "42%")
    status = job_namespace.status()
    assert {key: status[key] for key in ("eta", "loss", "step")} == {"eta": "3m10s", "loss": "2.831", "step": "75/180"}


def test_missing_token_is_unauthorized(operator: Operator, job_namespace: JobNamespace) -> None:
    code, answer = operator.post(job_namespace.namespace, NAME, "", KUBEFLOW)
    assert (code, answer["message"]) == (401, "send the pod's token: Authorization: Bearer <token>")


def test_token_for_other_audience_is_unauthorized(operator: Operator, job_namespace: JobNamespace) -> None:
    token = job_namespace.token(job_namespace.pod_of(TRAIN), audience="https://kubernetes.default.svc.cluster.local")
    assert operator.post(job_namespace.namespace, NAME, token, KUBEFLOW)[0] == 401


def test_pod_of_other_job_is_forbidden(operator: Operator, job_namespace: JobNamespace) -> None:
    job_namespace.submit("other")
    token = job_namespace.token(job_namespace.pod_of(PREPARE))
    code, answer = operator.post(job_namespace.namespace, "other", token, KUBEFLOW)
    assert (code, "does not belong to QLoRAJob progress/other" in answer["message"]) == (403, True)
    assert "progress" not in job_namespace.status("other")


def test_pod_of_other_namespace_is_forbidden(operator: Operator, job_namespace: JobNamespace) -> None:
    assert operator.post("default", NAME, job_namespace.token(job_namespace.pod_of(TRAIN)), KUBEFLOW)[0] == 403


def test_invalid_report_names_field_end_to_end(operator: Operator, job_namespace: JobNamespace) -> None:
    code, answer = operator.post(
        job_namespace.namespace, NAME, job_namespace.token(job_namespace.pod_of(TRAIN)), {"trainerStatus": {}}
    )
    assert (code, answer["message"]) == (400, "trainerStatus.lastUpdatedTime: Field required")


def test_labeled_pod_without_job_may_report(operator: Operator, job_namespace: JobNamespace) -> None:
    job_namespace.submit("plain")
    job_namespace.kubectl("run", "script", "--image=mine", "--labels=qlora.dev/job=plain")
    assert operator.post(job_namespace.namespace, "plain", job_namespace.token("script"), KUBEFLOW) == (200, {})
    wait_until("progress", lambda: job_namespace.status("plain").get("progress") == "42%")


def test_pod_of_earlier_job_with_the_same_name_is_forbidden(operator: Operator, job_namespace: JobNamespace) -> None:
    job_namespace.submit("again")
    job_namespace.kubectl("run", "earlier", "--image=mine", "--labels=qlora.dev/job=again")
    token = job_namespace.token("earlier")
    assert operator.post(job_namespace.namespace, "again", token, KUBEFLOW) == (200, {})
    job_namespace.kubectl("delete", "qlorajob", "again")
    time.sleep(1)  # creation times are in seconds
    job_namespace.submit("again")
    code, answer = operator.post(job_namespace.namespace, "again", token, KUBEFLOW)
    assert (code, "belongs to an earlier QLoRAJob progress/again" in answer["message"]) == (403, True)
    assert "lastReport" not in job_namespace.status("again")


def test_report_for_deleted_job_is_not_found(operator: Operator, job_namespace: JobNamespace) -> None:
    job_namespace.kubectl("run", "stray", "--image=mine", "--labels=qlora.dev/job=gone")
    assert operator.post(job_namespace.namespace, "gone", job_namespace.token("stray"), KUBEFLOW)[0] == 404


def test_deleted_pod_is_unauthorized(operator: Operator, job_namespace: JobNamespace) -> None:
    job_namespace.kubectl("run", "short-lived", "--image=mine", f"--labels=qlora.dev/job={NAME}")
    token = job_namespace.token("short-lived")
    job_namespace.kubectl("delete", "pod", "short-lived", "--now")
    assert operator.post(job_namespace.namespace, NAME, token, KUBEFLOW)[0] == 401


def test_report_after_end_changes_nothing(operator: Operator, job_namespace: JobNamespace) -> None:
    token = job_namespace.token(job_namespace.pod_of(TRAIN))
    job_namespace.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    before = job_namespace.wait_for("Succeeded")
    assert operator.post(job_namespace.namespace, NAME, token, KUBEFLOW)[0] == 200
    assert job_namespace.status() == before
