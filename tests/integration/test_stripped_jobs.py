"""A run on a real control plane whose Job somebody relabels, or takes from its owner."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from qlora_api import names
from tests.chaos.promises import promise
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
from tests.integration.operator_process import PREPARE, TRAIN, JobNamespace, Operator
from tests.make import PREPARED_MESSAGE, PUBLISHED_MESSAGE

REMOVE_LABELS: Final = json.dumps({"metadata": {"labels": None}})
REMOVE_OWNER: Final = json.dumps({"metadata": {"ownerReferences": None}})


@pytest.fixture(autouse=True)
def operator(installed: Cluster, job_namespace: JobNamespace, tmp_path: Path) -> Iterator[Operator]:
    operator = Operator(installed, tmp_path, job_namespace.namespace).start()
    yield operator
    operator.stop_and_check_log()


def restored(namespace: JobNamespace, job: str) -> bool:
    metadata = namespace.metadata("jobs", job)
    return bool(metadata.get("ownerReferences")) and names.MANAGED_BY_LABEL in (metadata.get("labels") or {})


@promise(
    fault="somebody removes the labels or the owner of a training Job",
    promise="it gets them back, trains on, and no second one is created",
    how="`kubectl patch` of a Job in training",
)
@pytest.mark.parametrize("patch", [REMOVE_LABELS, REMOVE_OWNER], ids=["labels", "owner"])
def test_job_without_labels_or_owner_trains_on(job_namespace: JobNamespace, patch: str) -> None:
    job_namespace.run_to_training()
    before = job_namespace.jobs()
    job_namespace.kubectl("patch", "job", TRAIN, "--type=merge", f"--patch={patch}")
    wait_until("labels and owner", lambda: restored(job_namespace, TRAIN), 120)
    job_namespace.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    job_namespace.wait_for("Succeeded")
    assert job_namespace.jobs() == before
    assert [attempt["reason"] for attempt in job_namespace.status()["attempts"]] == ["Published"]


def test_preparation_that_lost_its_owner_leads_to_training(job_namespace: JobNamespace) -> None:
    job_namespace.submit()
    job_namespace.pod_of(PREPARE)
    job_namespace.kubectl("patch", "job", PREPARE, "--type=merge", f"--patch={REMOVE_OWNER}")
    wait_until("owner", lambda: restored(job_namespace, PREPARE), 120)
    job_namespace.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    wait_until("training Job", lambda: TRAIN in job_namespace.jobs(), 120)
    assert sorted(job_namespace.jobs()) == [TRAIN, PREPARE]
