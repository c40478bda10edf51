"""Workloads of Kueue: the version of the API that is served, and what an older or newer one says."""

from datetime import UTC, datetime
from typing import Any

import pytest
from kubernetes.aio import client

from qlora_operator.cluster.http import Api, ApiError, NotFoundError
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.cluster.kueue import NO_KUEUE, Workloads, choose_workload
from qlora_operator.models import Workload

FULL = "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor any"
WAITING = {
    "metadata": {"name": "job-a-1", "creationTimestamp": "2026-01-01T00:00:00Z"},
    "spec": {"queueName": "gpus", "active": True, "podSets": [{"name": "main", "count": 1}]},
    "status": {"conditions": [{"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": FULL}]},
}
READ = Workload("job-a-1", queue="gpus", pending=FULL)


class KueueApi(Api):
    """An API server that serves some versions of Kueue's API."""

    def __init__(self, *versions: str, error: Exception | None = None) -> None:
        super().__init__(client.Configuration())
        self.versions = list(versions)
        self.error = error
        self.paths: list[str] = []

    async def request(self, _: str, path: str, *__: Any, **___: Any) -> dict[str, Any]:
        self.paths.append(path)
        parts = path.removeprefix("/apis/kueue.x-k8s.io").strip("/").split("/")
        if self.error:
            raise self.error
        if not self.versions or parts[0] not in {"", *self.versions}:
            raise NotFoundError(404, "NotFound", "404")
        if parts == [""]:
            return {
                "versions": [{"version": version} for version in self.versions],
                "preferredVersion": {"version": self.versions[0]},
            }
        return {"items": [WAITING]}


@pytest.mark.parametrize(
    ("served", "used"),
    [
        pytest.param(["v1beta1"], "v1beta1", id="0.14"),
        pytest.param(["v1beta1", "v1beta2"], "v1beta2", id="0.15"),
        pytest.param(["v1beta2"], "v1beta2", id="after-v1beta1"),
        pytest.param(["v1", "v1beta2"], "v1beta2", id="v1-and-a-known-one"),
        pytest.param(["v1"], "v1", id="v1-only"),
    ],
)
async def test_newest_known_version_is_used(served: list[str], used: str) -> None:
    api = KueueApi(*served)
    workloads = Workloads(api)
    assert [await workloads.find("ml", "uid-1") for _ in range(2)] == [READ, READ]
    path = f"/apis/kueue.x-k8s.io/{used}/namespaces/ml/workloads"
    assert api.paths == ["/apis/kueue.x-k8s.io", path, path]
    await api.close()


async def test_cluster_without_kueue_is_recognized_and_asked_again() -> None:
    api = KueueApi()
    workloads = Workloads(api)
    assert await workloads.find("ml", "uid-1") == NO_KUEUE
    api.versions = ["v1beta1"]
    assert await workloads.find("ml", "uid-1") == READ
    api.versions = ["v1beta2"]  # upgraded
    assert await workloads.find("ml", "uid-1") == NO_KUEUE
    assert await workloads.find("ml", "uid-1") == READ
    await api.close()


async def test_missing_right_is_harmless_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    api = KueueApi("v1beta2", error=ApiError(403, "Forbidden", "workloads.kueue.x-k8s.io is forbidden"))
    workloads = Workloads(api)
    assert [await workloads.find("ml", "uid-1") for _ in range(3)] == [None, None, None]
    assert [record.message for record in caplog.records] == [
        "cannot list Workloads, so the status does not say what a queue waits for: "
        "workloads.kueue.x-k8s.io is forbidden"
    ]
    await api.close()


async def test_broken_conversion_webhook_of_kueue_is_harmless() -> None:
    api = KueueApi("v1beta2", error=ClusterBusyError("500: conversion webhook for kueue.x-k8s.io/v1beta1 failed"))
    workloads = Workloads(api)
    assert await workloads.find("ml", "uid-1") is None
    api.error = None
    assert await workloads.find("ml", "uid-1") == READ
    await api.close()


def condition(kind: str, status: str, message: str = "") -> dict[str, str]:
    return {"type": kind, "status": status, "message": message}


@pytest.mark.parametrize(
    ("spec", "status", "expected"),
    [
        pytest.param({}, {}, Workload("w"), id="new"),
        pytest.param({"queueName": "q", "active": False}, {}, Workload("w", queue="q", active=False), id="deactivated"),
        pytest.param(
            {"queueName": "q"},
            {
                "conditions": [condition("QuotaReserved", "False", "full"), condition("Evicted", "True", "preempted")],
                "requeueState": {"count": 1, "requeueAt": "2026-01-01T01:00:00Z"},
            },
            Workload(
                "w", queue="q", pending="full", evicted="preempted", requeue_at=datetime(2026, 1, 1, 1, tzinfo=UTC)
            ),
            id="evicted",
        ),
        pytest.param(
            {"queueName": "q"},
            {
                "conditions": [condition("QuotaReserved", "True"), condition("Evicted", "False", "Previously: x")],
                "admissionChecks": [
                    {"name": "ready", "state": "Ready"},
                    {"name": "nodes", "state": "Pending", "message": "asked"},
                    {"name": "other"},
                ],
            },
            Workload("w", queue="q", quota_reserved=True, checks=("nodes (Pending: asked)", "other (Pending)")),
            id="checks",
        ),
        pytest.param(
            {"queueName": "q"},
            {"conditions": [condition("QuotaReserved", "True"), condition("Admitted", "True")]},
            Workload("w", queue="q", quota_reserved=True, admitted=True),
            id="admitted",
        ),
    ],
)
def test_workload_is_read(spec: dict[str, Any], status: dict[str, Any], expected: Workload) -> None:
    assert choose_workload([{"metadata": {"name": "w"}, "spec": spec, "status": status}]) == expected


@pytest.mark.parametrize(("observed", "expected"), [(1, ""), (2, "no LocalQueue"), (3, "no LocalQueue")])
def test_message_that_is_older_than_the_spec_is_left_out(observed: int, expected: str) -> None:
    reserved = {**condition("QuotaReserved", "False", "no LocalQueue"), "observedGeneration": observed}
    item = {"metadata": {"name": "w", "generation": 2}, "spec": {}, "status": {"conditions": [reserved]}}
    assert choose_workload([item]).pending == expected


def test_newest_workload_counts_and_an_unreadable_one_does_not() -> None:
    newer = {**WAITING, "metadata": {"name": "newer", "creationTimestamp": "2026-01-02T00:00:00Z"}}
    broken = {"metadata": {"name": 7, "creationTimestamp": "2026-01-03T00:00:00Z"}}
    assert choose_workload([WAITING, newer, broken]).name == "newer"
    assert choose_workload([]) == Workload()
    assert choose_workload([{"metadata": {}}, broken]) == Workload()
