"""Runs that have ended, with the real operator and its permissions: retried in place, expired, deleted."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from qlora_api import names
from qlora_api.reasons import Reason
from qlora_operator.cluster.rbac import build_cluster_rules, build_retention_rules, build_rules
from tests.chaos.promises import promise
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
from tests.gpu_time import check_gpu_time
from tests.integration.operator_process import (
    ACCOUNT,
    NAME,
    PREPARE,
    TRAIN,
    JobNamespace,
    Operator,
    build_rbac,
    install,
)
from tests.make import PREPARED_MESSAGE, PUBLISHED_MESSAGE, make_termination_message, message_for

INVALID: Final = make_termination_message(Reason.DATASET_INVALID, "row 7: field output is missing")
NAN: Final = make_termination_message(Reason.NON_FINITE_LOSS, "the loss is NaN")


@pytest.fixture
def operator(job_namespace: JobNamespace, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Operator]:
    environment = getattr(request, "param", {})
    started = Operator(job_namespace.cluster, tmp_path, job_namespace.namespace, **environment).start()
    yield started
    started.stop_and_check_log()


def request_retry(job_namespace: JobNamespace, value: str) -> None:
    job_namespace.kubectl("annotate", f"qlorajob/{NAME}", "--overwrite", f"{names.RETRY_ANNOTATION}={value}")


def children(job_namespace: JobNamespace) -> set[str]:
    """Kind and name of every child, without what Kubernetes itself puts into a namespace."""
    return {
        f"{kind}/{item['metadata']['name']}"
        for kind in ("jobs", "configmaps", "services")
        for item in job_namespace.items(kind)
        if names.JOB_LABEL in item["metadata"].get("labels", {})
    }


@promise(
    fault="a run failed, and what was wrong was corrected",
    promise="the annotation runs it again in place, once for each value",
    how="a preparation that fails, and one that succeeds",
)
@pytest.mark.usefixtures("operator")
def test_failed_run_is_retried_in_place_once_per_request(job_namespace: JobNamespace) -> None:
    job_namespace.submit()
    job_namespace.end_pod(PREPARE, 1, INVALID)
    job_namespace.wait_for("Failed", "DatasetInvalid")
    uid = job_namespace.metadata("qlorajobs", NAME)["uid"]
    request_retry(job_namespace, "first")
    job_namespace.wait_for("Preparing")
    job_namespace.end_pod(names.prepare_job_name(NAME, 2), 0, PREPARED_MESSAGE)
    job_namespace.start_pod(TRAIN)
    job_namespace.wait_for("Training")
    job_namespace.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    job_namespace.wait_for("Succeeded")
    request_retry(job_namespace, "second")
    wait_until("request seen", lambda: job_namespace.status()["retry"]["request"] == "second")
    assert job_namespace.status()["phase"] == "Succeeded"
    notes = [event.get("note", "") for event in job_namespace.items("events")]
    assert any("has no effect: the run has succeeded" in note for note in notes)
    assert job_namespace.metadata("qlorajobs", NAME)["uid"] == uid


@pytest.mark.usefixtures("operator")
def test_gpu_time_is_that_of_the_pods(job_namespace: JobNamespace) -> None:
    job_namespace.submit(resources={"nodes": 2})
    job_namespace.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    for index in range(2):
        job_namespace.bind_pod(TRAIN, index)
        time.sleep(2)
    for index in range(2):
        job_namespace.start_pod(TRAIN, index)
    job_namespace.wait_for("Training")
    time.sleep(3)
    for index in range(2):
        job_namespace.end_pod(TRAIN, 0, PUBLISHED_MESSAGE, index)
    job_namespace.wait_for("Succeeded")
    wait_until("nothing is held", lambda: not job_namespace.status()["attempts"][0]["usage"]["holding"])
    assert job_namespace.status()["usage"]["podSeconds"] >= 10
    check_gpu_time(job_namespace.status(), job_namespace.items("pods"))


def fail_gang(job_namespace: JobNamespace, name: str, **change: Any) -> None:
    """A run on two nodes, which has a Service, fails in its training."""
    job_namespace.submit(name, resources={"nodes": 2}, **change)
    job_namespace.end_pod(f"{name}-prepare", 0, message_for(name, PREPARED_MESSAGE))
    for index in range(2):
        job_namespace.start_pod(f"{name}-1", index)
    job_namespace.wait_for("Training", name=name)
    job_namespace.end_pod(f"{name}-1", 1, NAN)
    job_namespace.wait_for("Failed", "NonFiniteLoss", name=name)


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("operator", [{"QLORA_TTL": "8s"}], indirect=True, ids=["ttl"])
def test_expired_run_leaves_only_its_qlorajob(job_namespace: JobNamespace) -> None:
    """Of two runs whose names begin alike; the other has a longer ttl of its own."""
    fail_gang(job_namespace, "7b", ttl="1h")
    fail_gang(job_namespace, "7b-1")
    service = names.gang_service_name("7b-1", 1)
    expired = {"configmaps/7b-1-prepare", "configmaps/7b-1-1", f"services/{service}", "jobs/7b-1-prepare"}
    kept = {"configmaps/7b-prepare", "configmaps/7b-1", f"services/{names.gang_service_name('7b', 1)}"}
    wait_until("expiry", lambda: not expired & children(job_namespace))
    assert kept <= children(job_namespace)
    assert job_namespace.status("7b-1")["childrenDeletedAt"]
    assert job_namespace.status("7b-1")["reason"] == "NonFiniteLoss"


@pytest.fixture
def _deletion_allowed(installed: Cluster) -> Iterator[None]:
    rules = build_rules() + build_retention_rules() + build_cluster_rules()
    installed.apply(*build_rbac("ClusterRole", rules, {"name": ACCOUNT}))
    yield
    install(installed)


@pytest.mark.usefixtures("_deletion_allowed", "operator")
@pytest.mark.parametrize("operator", [{"QLORA_RETENTION": "5s"}], indirect=True, ids=["retention"])
def test_finished_qlorajob_is_deleted_after_retention(job_namespace: JobNamespace) -> None:
    job_namespace.submit("waiting", suspend=True)
    job_namespace.run_to_success()
    wait_until(
        "deletion", lambda: [item["metadata"]["name"] for item in job_namespace.items("qlorajobs")] == ["waiting"]
    )
