"""An unmodified script reports progress; a pod cannot report for another QLoRAJob."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final

import pytest

from tests.e2e.installation import OPERATOR_NAMESPACE, RELEASE, Installation, manifest_of, wait_for

NAMESPACE: Final = "scripts"
JOBS: Final = ("scripted", "neighbour")
AUDIENCE: Final = "qlora-operator"


def progress_url(job: str, host: str = f"{RELEASE}.{OPERATOR_NAMESPACE}.svc") -> str:
    return f"http://{host}:8080/apis/qlora.dev/v1alpha1/namespaces/{NAMESPACE}/qlorajobs/{job}/status"


def build_pod(name: str, job: str, image: str, command: list[str]) -> dict[str, Any]:
    """A pod as any controller might create it: it needs only the label, the token and two environment variables."""
    security = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    token = {"serviceAccountToken": {"path": "token", "audience": AUDIENCE, "expirationSeconds": 3600}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"qlora.dev/job": job}},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "containers": [
                {
                    "name": "script",
                    "image": image,
                    "imagePullPolicy": "Never",
                    "command": command,
                    "securityContext": security,
                    "env": [
                        {"name": "HOME", "value": "/work"},
                        {"name": "KUBEFLOW_TRAINER_SERVER_URL", "value": progress_url(job)},
                        {"name": "KUBEFLOW_TRAINER_SERVER_TOKEN", "value": "/var/run/progress/token"},
                    ],
                    "volumeMounts": [
                        {"name": "work", "mountPath": "/work"},
                        {"name": "token", "mountPath": "/var/run/progress"},
                        {"name": "script", "mountPath": "/script"},
                    ],
                }
            ],
            "volumes": [
                {"name": "work", "emptyDir": {}},
                {"name": "token", "projected": {"sources": [token]}},
                {"name": "script", "configMap": {"name": "script"}},
            ],
        },
    }


@pytest.fixture(scope="module")
def waiting(installation: Installation) -> Installation:
    """Two QLoRAJobs that wait for a GPU product that no node has, so that no trainer reports for them."""
    installation.make_namespace(NAMESPACE)
    script = Path(__file__).with_name("trainer_script.py").read_text(encoding="utf-8")
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "script", "namespace": NAMESPACE}}
    installation.cluster.apply({**config, "data": {"train.py": script}})
    for job in JOBS:
        nowhere = {"gpusPerNode": 1, "gpuProduct": "NVIDIA-Nowhere"}
        # The seed makes the digest differ from the quickstart's, which is already published.
        installation.submit(manifest_of(job, NAMESPACE, resources=nowhere, training={"seed": 7}))
    return installation


def test_an_unmodified_script_reports_progress(waiting: Installation):
    pod = build_pod("script", "scripted", waiting.trainer_image, ["python3", "/script/train.py"])
    waiting.cluster.run_pod(pod, timeout=240)
    wait_for("the last report", lambda: last_report(waiting, "scripted").get("percent") == 100, 180)
    report = last_report(waiting, "scripted")
    assert report["loss"] > 0
    assert last_report(waiting, "neighbour") == {}


def last_report(installation: Installation, job: str) -> dict[str, Any]:
    return installation.job(job, NAMESPACE)["status"].get("lastReport", {})


def test_pod_reports_for_other_job_is_forbidden(waiting: Installation):
    speaker = build_pod("speaker", "scripted", waiting.trainer_image, ["sleep", "600"])
    waiting.cluster.apply(speaker)
    wait_for("the speaker", lambda: waiting.cluster.phase("speaker", NAMESPACE) == "Running", 180)
    token = waiting.cluster.kubectl(
        "exec", f"--namespace={NAMESPACE}", "speaker", "--", "cat", "/var/run/progress/token"
    )
    address = waiting.leaders()[0]["status"]["podIP"]
    assert post(progress_url("scripted", address), token) == 200
    assert post(progress_url("neighbour", address), token) == 403
    assert post(progress_url("scripted", address), "nonsense") == 401
    assert post(progress_url("scripted", address), None) == 401


def post(url: str, token: str | None) -> int:
    """Post a report as the protocol has it, and return the answer's status code."""
    status = {"progressPercentage": 41, "lastUpdatedTime": "2030-01-01T00:00:00Z", "metrics": []}
    request = urllib.request.Request(url, json.dumps({"trainerStatus": status}).encode(), method="POST")
    request.add_header("Content-Type", "application/json")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refusal:
        return refusal.code
