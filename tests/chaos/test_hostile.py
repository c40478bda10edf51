"""Edits of the status by others: nothing restarts, nothing runs twice, and the operator keeps working."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from qlora_api import names
from tests.chaos.promises import Dose, promise
from tests.cluster.admin import Admin
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
from tests.integration.operator_process import NAME, TRAIN, JobNamespace, Operator, open_job_namespace
from tests.make import PUBLISHED_MESSAGE

LONG_AGO: Final = "2001-01-01T00:00:00Z"
LOST: Final = {"number": 1, "job": TRAIN, "reason": "PodLost", "message": "", "finishedAt": LONG_AGO}
EDITS: Final[dict[str, Any]] = {
    "no-status": None,
    "succeeded": {"phase": "Succeeded", "reason": "Published"},
    "failed": {"phase": "Failed", "reason": "DatasetInvalid"},
    "pending": {"phase": "Pending", "reason": "Accepted"},
    "no-attempts": {"attempts": []},
    "no-plan": {"plan": None},
    "no-preparation": {"preparation": None},
    "preparation-8": {"preparation": {"number": 8, "failures": 3, "message": ""}},
    "no-output": {"output": None, "model": None, "dataset": None},
    "lost-attempt": {"attempts": [LOST]},
    "attempt-99": {"attempts": [{"number": 99, "job": "elsewhere", "message": ""}]},
    "ended-attempt-7": {"attempts": [{"number": 7, "job": "elsewhere", "reason": "Interrupted", "message": ""}]},
    "pending-after-attempt-7": {
        "phase": "Pending", "reason": "Accepted",
        "attempts": [{"number": 7, "job": "elsewhere", "reason": "Interrupted", "message": ""}],
    },
    "other-plan": {
        "plan": {
            "device": "cuda", "nodes": 64, "gpusPerNode": 16, "microBatchSize": 1, "gradientAccumulation": 1,
            "totalSteps": 1, "reasons": [],
        }
    },
    "from-the-future": {"observedGeneration": 2**40, "startedAt": "2999-01-01T00:00:00Z", "finishedAt": LONG_AGO},
    "no-conditions": {"conditions": []},
}  # fmt: skip
"""Edits of the status that the API server accepts."""


@dataclass(frozen=True)
class EditedStatusScenario:
    """An operator for every namespace, and an administrator."""

    cluster: Cluster
    operator: Operator
    admin: Admin

    def run(self, names: list[str], play: Callable[[JobNamespace, str], None]) -> None:
        """Run each edit in a namespace of its own."""
        for name in names:
            with open_job_namespace(self.cluster, f"{play.__name__}-{name}") as job_namespace:
                play(job_namespace, name)
                assert self.operator.healthy()


@pytest.fixture
def scenario(installed: Cluster, tmp_path: Path) -> Iterator[EditedStatusScenario]:
    """A scenario whose operator must log no traceback."""
    scenario = EditedStatusScenario(installed, Operator(installed, tmp_path).start(), installed.admin)
    yield scenario
    scenario.operator.stop_and_check_log()


@pytest.fixture
def chosen(dose: Dose) -> list[str]:
    """Some of the edits, or all."""
    return list(EDITS)[:: dose(short=5, full=1)]


def edit(job_namespace: JobNamespace, admin: Admin, status: Any) -> None:
    """Write into the status, as `kubectl edit --subresource=status` would."""
    path = f"/apis/{names.GROUP}/{names.VERSION}/namespaces/{job_namespace.namespace}/{names.PLURAL}/{NAME}"
    if status is None:
        job = admin.request("GET", path)[1]
        code, answer = admin.request("PUT", f"{path}/status", {key: job[key] for key in job if key != "status"})
    else:
        code, answer = admin.patch_status(path, status)
    assert code == 200, answer


def trigger_reconcile(job_namespace: JobNamespace) -> None:
    """Trigger a reconcile, and wait for it."""
    generation = int(job_namespace.metadata("qlorajobs", NAME)["generation"]) + 1
    change = json.dumps({"spec": {"retries": {"maxAttempts": generation + 1}}})
    job_namespace.kubectl("patch", "qlorajob", NAME, "--type=merge", f"--patch={change}")
    wait_until("a reconcile", lambda: job_namespace.status().get("observedGeneration") == generation)


@promise(
    fault="Somebody edits the status of a finished run",
    promise="Nothing is trained again: no Job is created, and an erased status is rebuilt from the children.",
    how="Edits that the schema allows, one at a time, each after publication.",
)
@pytest.mark.timeout(600)
def test_edited_status_of_finished_run_starts_nothing(
    scenario: EditedStatusScenario, chosen: list[str], outcome: Callable[[str], None]
) -> None:
    def finished(job_namespace: JobNamespace, name: str) -> None:
        job_namespace.run_to_success()
        before = job_namespace.jobs()
        edit(job_namespace, scenario.admin, EDITS[name])
        trigger_reconcile(job_namespace)
        wait_until("an end", lambda: job_namespace.status().get("phase") in {"Succeeded", "Failed"})
        assert job_namespace.jobs() == before

    scenario.run(chosen, finished)
    outcome(f"{len(chosen)} edits")


@promise(
    fault="Somebody edits the status of a training run",
    promise="There are never two running training Jobs, and the operator keeps working.",
    how="Edits that the schema allows, one at a time, each during training.",
)
@pytest.mark.timeout(600)
def test_edited_status_of_running_run_creates_no_second_job(
    scenario: EditedStatusScenario, chosen: list[str], outcome: Callable[[str], None]
) -> None:
    def training(job_namespace: JobNamespace, name: str) -> None:
        job_namespace.run_to_training()
        edit(job_namespace, scenario.admin, EDITS[name])
        trigger_reconcile(job_namespace)
        assert len(running(job_namespace)) <= 1
        if TRAIN in job_namespace.jobs() and "deletionTimestamp" not in job_namespace.metadata("jobs", TRAIN):
            job_namespace.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
            trigger_reconcile(job_namespace)
        assert len(running(job_namespace)) <= 1

    scenario.run(chosen, training)
    outcome(f"{len(chosen)} edits")


def running(job_namespace: JobNamespace) -> list[str]:
    """Return the names of training Jobs that are running and not being deleted."""
    return [
        job["metadata"]["name"]
        for job in job_namespace.items("jobs")
        if job["metadata"]["labels"][names.ROLE_LABEL] == names.Role.TRAIN
        and "deletionTimestamp" not in job["metadata"]
        and not any(entry["status"] == "True" for entry in job["status"].get("conditions", ()))
    ]
