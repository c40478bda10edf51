"""A run keeps its Job when somebody removes the labels or the owner by which the operator finds it."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import pytest

from qlora_api import names
from qlora_operator.cluster.interface import AdmissionDeniedError
from qlora_operator.cluster.stripped import build_restoration
from tests.fakes import FakeCluster
from tests.make import NOW, PREPARED_MESSAGE, PUBLISHED_MESSAGE, make_manifest
from tests.unit.operator.life import PREPARE, TRAIN, reconcile_now, reconcile_until_stable

Metadata = dict[str, Any]
SECOND: Final = timedelta(seconds=1)


def _remove_label(label: str) -> Callable[[Metadata], None]:
    def strip(metadata: Metadata) -> None:
        del metadata["labels"][label]

    return strip


def _remove_labels(metadata: Metadata) -> None:
    del metadata["labels"]


def _renumber(metadata: Metadata) -> None:
    metadata["labels"] |= {names.ATTEMPT_LABEL: "7", names.PREPARATION_LABEL: "7"}


def _rename_run(metadata: Metadata) -> None:
    metadata["labels"][names.JOB_LABEL] = "another"


def _remove_owner(metadata: Metadata) -> None:
    del metadata["ownerReferences"]


def _demote_owner(metadata: Metadata) -> None:
    metadata["ownerReferences"] = [{**metadata["ownerReferences"][0], "controller": False}]


STRIPS: Final = {
    "role": _remove_label(names.ROLE_LABEL),
    "run": _remove_label(names.JOB_LABEL),
    "watched": _remove_label(names.MANAGED_BY_LABEL),
    "labels": _remove_labels,
    "number": _renumber,
    "other run": _rename_run,
    "owner": _remove_owner,
    "no controller": _demote_owner,
}
strips = pytest.mark.parametrize("strip", STRIPS.values(), ids=STRIPS.keys())


@pytest.fixture
async def cluster() -> FakeCluster:
    cluster = FakeCluster()
    cluster.submit(make_manifest())
    await reconcile_until_stable(cluster)
    return cluster


async def _start_training(cluster: FakeCluster) -> Metadata:
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)
    metadata: Metadata = cluster.children["Job", TRAIN]["metadata"]
    return metadata


@strips
async def test_training_goes_on_in_the_job_that_was_stripped(
    cluster: FakeCluster, strip: Callable[[Metadata], None]
) -> None:
    metadata = await _start_training(cluster)
    created, uid = len(cluster.created), metadata["uid"]
    strip(metadata)
    await reconcile_until_stable(cluster)
    assert len(cluster.created) == created
    assert [attempt.get("reason") for attempt in cluster.status["attempts"]] == [None]
    cluster.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Succeeded"
    assert cluster.children["Job", TRAIN]["metadata"]["uid"] == uid


@pytest.mark.parametrize("strip", [_remove_labels, _remove_owner, _demote_owner, STRIPS["watched"], STRIPS["run"]])
async def test_labels_and_owner_are_as_before(cluster: FakeCluster, strip: Callable[[Metadata], None]) -> None:
    metadata = await _start_training(cluster)
    labels, owners = dict(metadata["labels"]), list(metadata["ownerReferences"])
    strip(metadata)
    await reconcile_until_stable(cluster)
    metadata = cluster.children["Job", TRAIN]["metadata"]
    assert metadata["labels"] == labels
    assert [owner for owner in metadata["ownerReferences"] if owner["controller"]] == owners


@strips
async def test_preparation_that_was_stripped_leads_to_training(
    cluster: FakeCluster, strip: Callable[[Metadata], None]
) -> None:
    strip(cluster.children["Job", PREPARE]["metadata"])
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Scheduling"
    assert TRAIN in cluster.created


@strips
async def test_suspension_stops_the_job_that_was_stripped(
    cluster: FakeCluster, strip: Callable[[Metadata], None]
) -> None:
    strip(await _start_training(cluster))
    cluster.change(suspend=True)
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Suspended"
    assert ("Job", TRAIN) not in cluster.children


async def test_no_other_attempt_starts_while_the_restoration_is_refused(cluster: FakeCluster) -> None:
    _remove_labels(await _start_training(cluster))
    cluster.update_error = AdmissionDeniedError("policy: labels are ours", permanent=False)
    created = len(cluster.created)
    for _ in range(3):
        cluster.pass_time(SECOND)
        with pytest.raises(AdmissionDeniedError, match="labels are ours"):
            await reconcile_now(cluster)
    assert len(cluster.created) == created
    cluster.update_error = None
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Training"


class LabelRemovingCluster(FakeCluster):
    """A mutating webhook removes the labels of Jobs at each change, from some time on."""

    removes = False

    async def patch(self, child: Metadata) -> None:
        await super().patch(child)
        if self.removes:
            _remove_labels(self.children["Job", child["metadata"]["name"]]["metadata"])


async def test_webhook_that_removes_labels_is_named_and_the_attempt_is_kept() -> None:
    cluster = LabelRemovingCluster()
    cluster.submit(make_manifest())
    await reconcile_until_stable(cluster)
    _remove_labels(await _start_training(cluster))
    cluster.removes = True
    with pytest.raises(AdmissionDeniedError, match=f"something removes the labels .*{TRAIN}.*; change the policy"):
        await reconcile_now(cluster)
    assert [attempt.get("reason") for attempt in cluster.status["attempts"]] == [None]


async def test_job_that_was_deleted_is_lost_as_before(cluster: FakeCluster) -> None:
    await _start_training(cluster)
    cluster.remove(TRAIN)
    await reconcile_until_stable(cluster)
    assert cluster.status["attempts"][0]["reason"] == "PodLost"


def _job(**metadata: Any) -> Metadata:
    labels = {
        names.MANAGED_BY_LABEL: names.FIELD_MANAGER,
        names.JOB_LABEL: "support-bot",
        names.ROLE_LABEL: "train",
        names.ATTEMPT_LABEL: "1",
    }
    owner = {"kind": names.KIND, "name": "support-bot", "uid": "run", "controller": True}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": TRAIN,
            "namespace": "ml",
            "uid": "job",
            "resourceVersion": "5",
            "creationTimestamp": "2026-03-01T12:00:01Z",
            "labels": labels,
            "ownerReferences": [owner],
            **metadata,
        },
        "spec": {"template": {"metadata": {"labels": labels}}},
    }


ANOTHER: Final = {"kind": "CronJob", "name": "nightly", "uid": "else", "controller": True}


@pytest.mark.parametrize(
    "existing",
    [
        pytest.param(_job(), id="complete"),
        pytest.param(_job(ownerReferences=[ANOTHER]), id="controller of another"),
        pytest.param(_job(labels={}, ownerReferences=[ANOTHER]), id="no labels, controller of another"),
        pytest.param(_job(labels={}, creationTimestamp="2026-03-01T11:59:59Z"), id="older than the run"),
        pytest.param(_job(labels={}, deletionTimestamp="2026-03-01T13:00:00Z"), id="being deleted"),
        pytest.param({**_job(labels={}), "spec": {"template": {"metadata": {"labels": {"app": "x"}}}}}, id="by hand"),
        pytest.param({**_job(labels={}), "spec": {"template": {}}}, id="without labels of its pods"),
    ],
)
def test_other_jobs_are_left_alone(existing: Metadata) -> None:
    assert build_restoration(existing, _job(), NOW) is None


def test_restoration_names_the_version_and_keeps_other_owners() -> None:
    other = {"kind": "App", "name": "team", "uid": "app"}
    patch = build_restoration(_job(labels=None, ownerReferences=[other]), _job(), NOW)
    assert patch is not None
    assert patch["metadata"]["resourceVersion"] == "5"
    assert patch["metadata"]["uid"] == "job"
    assert patch["metadata"]["labels"] == _job()["metadata"]["labels"]
    assert patch["metadata"]["ownerReferences"] == [other, *_job()["metadata"]["ownerReferences"]]
