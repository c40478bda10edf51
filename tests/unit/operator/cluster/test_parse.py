"""What the API server's JSON means."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from qlora_api.names import Role
from qlora_operator.cluster.parse import parse_child, parse_event_message, parse_observation, parse_pod
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
                {"schedulingGates": [{"name": "kueue.x-k8s.io/topology"}]},
                conditions=[
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "SchedulingGated",
                        "message": "is blocked",
                    }
                ],
            ),
            Pod("p", "u", created_at=NOW, scheduling_gates=("kueue.x-k8s.io/topology",)),
            id="gated",
        ),
        pytest.param(
            make_raw_pod(
                {"nodeName": "n"},
                phase="Failed",
                containerStatuses=in_state(
                    terminated={
                        "exitCode": 128,
                        "reason": "StartError",
                        "startedAt": "1970-01-01T00:00:00Z",
                        "finishedAt": "0001-01-01T00:00:00Z",
                    }
                ),
            ),
            Pod("p", "u", "Failed", "n", created_at=NOW, scheduled_at=NOW, exit=Exit(128, "StartError")),
            id="times that are none",
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
                released_at=NOW,
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
    child = parse_child(make_raw_child(conditions=(target,)))
    assert (child.role, child.attempt, child.deadline_exceeded, child.finished) == (Role.TRAIN, 2, True, False)


def test_a_failed_job() -> None:
    failed = {
        "type": "Failed",
        "status": "True",
        "reason": "BackoffLimitExceeded",
        "message": "m",
        "lastTransitionTime": BORN,
    }
    child = parse_child(make_raw_child(conditions=(failed,)))
    assert (child.failure, child.deadline_exceeded) == (JobFailure("BackoffLimitExceeded", "m", NOW), False)


def test_children_of_other_job_uid_are_ignored() -> None:
    job = RawJob(REF, UID, 1, "1", datetime(2026, 1, 1, tzinfo=UTC), deleting=False, spec={}, status={})
    seen = parse_observation(job, [make_raw_child(), make_raw_child(owner="somebody else")], [])
    assert len(seen.jobs) == 1


STARTED = "2026-03-01T12:10:00Z"
RESUMED = {"type": "Suspended", "status": "False", "lastTransitionTime": STARTED}


def make_raw_pod_of_job(name: str, *, created: str, asked: str = "", index: int = 0) -> dict[str, Any]:
    deletion: dict[str, Any] = {}
    if asked:
        ends = (datetime.fromisoformat(asked) + timedelta(seconds=60)).isoformat()
        deletion = {"deletionTimestamp": ends, "deletionGracePeriodSeconds": 60}
    metadata = {
        **META, "name": name, "uid": name, "creationTimestamp": created, **deletion,
        "ownerReferences": [{"uid": "u", "controller": True}],
        "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
    }  # fmt: skip
    return {"metadata": metadata, "spec": {}, "status": {"phase": "Running"}}


@pytest.mark.parametrize(
    ("pod", "earlier"),
    [
        pytest.param({"created": BORN}, False, id="of-a-slow-batch"),
        pytest.param({"created": "2026-03-01T12:09:58Z", "asked": "2026-03-01T12:30:00Z"}, False, id="drained-later"),
        pytest.param({"created": "2026-03-01T12:11:00Z", "asked": "2026-03-01T12:12:00Z"}, False, id="drained-at-once"),
        pytest.param({"created": BORN, "asked": "2026-03-01T12:09:30Z"}, True, id="suspended"),
        pytest.param({"created": BORN, "asked": STARTED}, True, id="suspended-and-resumed-in-one-second"),
    ],
)
def test_pods_from_before_a_suspension_are_separated(pod: dict[str, str], earlier: bool) -> None:
    job = RawJob(REF, UID, 1, "1", NOW, deleting=False, spec={}, status={})
    raw = make_raw_child(conditions=(RESUMED,))
    raw["status"]["startTime"] = STARTED
    [child] = parse_observation(job, [raw], [make_raw_pod_of_job("old", **pod)]).jobs
    assert (len(child.pods), len(child.earlier_pods)) == ((0, 1) if earlier else (1, 0))


def test_job_is_suspended_until_its_controller_has_resumed_it() -> None:
    """Between the two, its startTime is that of the earlier start."""
    raw = make_raw_child(conditions=({**RESUMED, "status": "True"},))
    raw["spec"]["suspend"] = False
    raw["status"]["startTime"] = BORN
    child = parse_child(raw)
    assert (child.suspended, child.started_at) == (True, None)


def test_message_of_newest_event_since_a_time() -> None:
    def event(reason: str, message: str, **times: Any) -> dict[str, Any]:
        return {"reason": reason, "message": message, "metadata": META, **times}

    events = [
        event("FailedCreate", "Error creating: old", lastTimestamp="2026-03-01T11:00:00Z"),
        event("FailedCreate", "Error creating: exceeded quota", lastTimestamp=STARTED),
        event("FailedCreate", "Error creating: exceeded another", series={"lastObservedTime": "2026-03-01T12:20:00Z"}),
        event("SuccessfulCreate", "Created pod", eventTime="2026-03-01T12:30:00Z", lastTimestamp=None, series=None),
    ]
    assert parse_event_message(events, {"FailedCreate"}, NOW) == "exceeded another"
    assert parse_event_message(events[:2], {"FailedCreate"}, NOW) == "exceeded quota"
    assert parse_event_message(events[:1], {"FailedCreate"}, NOW) == ""


def test_nodes_that_the_pods_of_a_job_avoid() -> None:
    item = make_raw_child()
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in ("gpu-1", "gpu-2")]
    required = {"nodeSelectorTerms": [{"matchFields": fields}, {"matchExpressions": []}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    item["spec"]["template"] = {"spec": {"affinity": affinity}}
    assert parse_child(item).avoided_nodes == ("gpu-1", "gpu-2")
    assert parse_child(make_raw_child()).avoided_nodes == ()
