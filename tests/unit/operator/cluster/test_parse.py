"""What the API server's JSON means."""

from datetime import UTC, datetime
from typing import Any

import pytest

from qlora_api.names import Role
from qlora_operator.cluster.parse import parse_child, parse_observation, parse_pod
from qlora_operator.models import Exit, JobFailure, Pod, RawJob, Waiting
from tests.make import NOW, REF, UID

BORN = "2026-03-01T12:00:00Z"
META = {"name": "p", "uid": "u", "creationTimestamp": BORN}


def make_raw_pod(spec: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    return {"metadata": META, "spec": spec or {}, "status": {"phase": "Pending", **status}}


def in_state(**state: Any) -> list[dict[str, Any]]:
    return [{"name": "sidecar", "state": {"running": {}}}, {"name": "trainer", "state": state}]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        pytest.param(make_raw_pod(), Pod("p", "u", created_at=NOW), id="new"),
        pytest.param(
            make_raw_pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}]),
            Pod("p", "u", created_at=NOW, unschedulable="0/3 nodes"),
            id="unschedulable",
        ),
        pytest.param(
            make_raw_pod(
                {"nodeName": "n"},
                conditions=[{"type": "PodScheduled", "status": "True", "lastTransitionTime": BORN}],
                containerStatuses=in_state(waiting={"reason": "ErrImagePull", "message": "denied"}),
            ),
            Pod("p", "u", node="n", created_at=NOW, scheduled_at=NOW, waiting=Waiting("ErrImagePull", "denied")),
            id="waiting",
        ),
        pytest.param(
            make_raw_pod({"nodeName": "n"}, phase="Running", containerStatuses=in_state(running={"startedAt": BORN})),
            Pod("p", "u", "Running", "n", created_at=NOW, scheduled_at=NOW, started_at=NOW),
            id="running",
        ),
        pytest.param(
            make_raw_pod(
                phase="Failed",
                reason="Evicted",
                message="disk pressure",
                conditions=[{"type": "DisruptionTarget", "status": "True", "message": "evicted"}],
                containerStatuses=in_state(terminated={"exitCode": 137, "reason": "OOMKilled", "finishedAt": BORN}),
            ),
            Pod(
                "p",
                "u",
                "Failed",
                created_at=NOW,
                exit=Exit(137, "OOMKilled", "", NOW),
                disruption_message="evicted",
                reason="Evicted",
                message="disk pressure",
            ),
            id="evicted",
        ),
    ],
)
def test_a_pod(raw: dict[str, Any], expected: Pod) -> None:
    assert parse_pod(raw) == expected


def make_raw_child(owner: str = UID, conditions: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    labels = {"qlora.dev/job": REF.name, "qlora.dev/role": "train", "qlora.dev/attempt": "2"}
    return {
        "metadata": {
            **META, "name": f"{REF.name}-2", "labels": labels, "ownerReferences": [{"uid": owner, "controller": True}],
        },
        "spec": {"activeDeadlineSeconds": 60},
        "status": {"conditions": list(conditions)},
    }  # fmt: skip


def test_job_past_deadline_with_terminating_pod() -> None:
    target = {"type": "FailureTarget", "status": "True", "reason": "DeadlineExceeded"}
    child = parse_child(make_raw_child(conditions=(target,)), ())
    assert (child.role, child.attempt, child.deadline_exceeded, child.finished) == (Role.TRAIN, 2, True, False)


def test_a_failed_job() -> None:
    failed = {
        "type": "Failed",
        "status": "True",
        "reason": "BackoffLimitExceeded",
        "message": "m",
        "lastTransitionTime": BORN,
    }
    child = parse_child(make_raw_child(conditions=(failed,)), ())
    assert (child.failure, child.deadline_exceeded) == (JobFailure("BackoffLimitExceeded", "m", NOW), False)


def test_children_of_other_job_uid_are_ignored() -> None:
    job = RawJob(REF, UID, 1, "1", datetime(2026, 1, 1, tzinfo=UTC), deleting=False, spec={}, status={})
    seen = parse_observation(job, [make_raw_child(), make_raw_child(owner="somebody else")], [])
    assert len(seen.jobs) == 1


def test_nodes_that_the_pods_of_a_job_avoid() -> None:
    item = make_raw_child()
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in ("gpu-1", "gpu-2")]
    required = {"nodeSelectorTerms": [{"matchFields": fields}, {"matchExpressions": []}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    item["spec"]["template"] = {"spec": {"affinity": affinity}}
    assert parse_child(item, ()).avoided_nodes == ("gpu-1", "gpu-2")
    assert parse_child(make_raw_child(), ()).avoided_nodes == ()
