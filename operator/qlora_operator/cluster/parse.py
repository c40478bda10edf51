"""From the API server's JSON to our values: the only place that knows its field names."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, Final, Generic, NamedTuple, TypeVar

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.names import Role
from qlora_operator.models import ChildJob, Exit, JobFailure, Observation, Pod, RawJob, Waiting

Json = Mapping[str, Any]
Child = TypeVar("Child", ChildJob, Pod)

_INDEX: Final = "batch.kubernetes.io/job-completion-index"
"""Annotation of a pod of an Indexed Job."""

_FAILING: Final = ("FailureTarget", "Failed")
"""Conditions of a Job whose pods are being ended, and of one whose pods have ended."""


def parse_time(text: str | None) -> datetime | None:
    """Read an RFC 3339 time."""
    return datetime.fromisoformat(text) if text else None


def _created(item: Json) -> datetime:
    return datetime.fromisoformat(item["metadata"]["creationTimestamp"])


def parse_job(item: Json) -> RawJob:
    """Read a QLoRAJob, leaving spec and status as they are."""
    metadata = item["metadata"]
    return RawJob(
        ref=JobRef(metadata["namespace"], metadata["name"]),
        uid=metadata["uid"],
        generation=metadata["generation"],
        resource_version=metadata["resourceVersion"],
        created_at=_created(item),
        deleting="deletionTimestamp" in metadata,
        spec=item.get("spec", {}),
        status=item.get("status", {}),
    )


def controller_uid(item: Json) -> str | None:
    """Return the uid of the object that controls this one."""
    return next(
        (owner["uid"] for owner in item["metadata"].get("ownerReferences", ()) if owner.get("controller")), None
    )


class CachedObject(NamedTuple, Generic[Child]):
    """A Job or a pod as it was at one version."""

    uid: str
    owner_uid: str
    """The uid of what controls it: the QLoRAJob for a Job, the Job for a pod."""
    version: int
    value: Child


def parse_cached_job(item: Json) -> CachedObject[ChildJob] | None:
    """Read a batch/v1 Job; nothing if it is not one of ours."""
    return (
        _to_cached_object(item, parse_child(item, ()))
        if names.ROLE_LABEL in item["metadata"].get("labels", {})
        else None
    )


def parse_cached_pod(item: Json) -> CachedObject[Pod]:
    """Read a pod."""
    return _to_cached_object(item, parse_pod(item))


def _to_cached_object(item: Json, what: Child) -> CachedObject[Child]:
    metadata = item["metadata"]
    return CachedObject(metadata["uid"], controller_uid(item) or "", int(metadata.get("resourceVersion", 0)), what)


def parse_observation(job: RawJob, jobs: Iterable[Json], pods: Iterable[Json]) -> Observation:
    """Put together what belongs to this QLoRAJob."""
    return assemble_observation(job, filter(None, map(parse_cached_job, jobs)), map(parse_cached_pod, pods))


def assemble_observation(
    job: RawJob, jobs: Iterable[CachedObject[ChildJob]], pods: Iterable[CachedObject[Pod]]
) -> Observation:
    """Put together what belongs to this QLoRAJob; a namesake's children do not."""
    gangs: dict[str, dict[int, Pod]] = {}
    for pod in sorted(pods, key=lambda pod: pod.value.created_at or job.created_at):
        gangs.setdefault(pod.owner_uid, {})[pod.value.index] = pod.value
    return Observation(
        tuple(
            replace(child.value, pods=_by_index(gangs.get(child.uid, {})))
            for child in jobs
            if child.owner_uid == job.uid
        )
    )


def _by_index(gang: Mapping[int, Pod]) -> tuple[Pod, ...]:
    return tuple(gang[index] for index in sorted(gang))


def _index_of(pod: Json) -> int:
    """Return a pod's number in an Indexed Job."""
    return int(pod["metadata"].get("annotations", {}).get(_INDEX, 0))


def parse_child(item: Json, pods: tuple[Pod, ...]) -> ChildJob:
    """Read a batch/v1 Job of ours; pods from before it was suspended speak for it no more."""
    metadata, conditions = item["metadata"], _conditions(item)
    started = parse_time(item.get("status", {}).get("startTime"))
    failed = conditions.get("Failed")
    return ChildJob(
        name=metadata["name"],
        role=Role(metadata["labels"][names.ROLE_LABEL]),
        attempt=int(metadata["labels"].get(names.ATTEMPT_LABEL, 0)),
        created_at=_created(item),
        deadline_seconds=item["spec"].get("activeDeadlineSeconds"),
        deleting="deletionTimestamp" in metadata,
        suspended=item["spec"].get("suspend", False),
        complete="Complete" in conditions,
        failure=_failure(failed) if failed else None,
        deadline_exceeded=any(conditions.get(kind, {}).get("reason") == "DeadlineExceeded" for kind in _FAILING),
        completions=item["spec"].get("completions", 1),
        pods=tuple(pod for pod in pods if not _is_of_earlier_start(pod, started)),
    )


def _is_of_earlier_start(pod: Pod, started: datetime | None) -> bool:
    """Whether a pod is on its way out since its Job was suspended, and the Job has been resumed."""
    return pod.deleting and started is not None and pod.created_at is not None and pod.created_at < started


def _conditions(item: Json) -> dict[str, Json]:
    """Return the conditions that hold."""
    return {
        condition["type"]: condition
        for condition in item.get("status", {}).get("conditions") or ()
        if condition["status"] == "True"
    }


def _failure(condition: Json) -> JobFailure:
    return JobFailure(
        condition.get("reason", ""), condition.get("message", ""), parse_time(condition.get("lastTransitionTime"))
    )


def parse_pod(item: Json) -> Pod:
    """Read a pod of a child Job."""
    metadata, status = item["metadata"], item.get("status", {})
    holds = _conditions(item)
    disruption = holds.get("DisruptionTarget", {})
    state = _container_state(status)
    ran = state.get("running") or state.get("terminated") or {}
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        index=_index_of(item),
        phase=status.get("phase", "Pending"),
        node=item["spec"].get("nodeName", ""),
        created_at=_created(item),
        deleting="deletionTimestamp" in metadata,
        deletion_timestamp=parse_time(metadata.get("deletionTimestamp")),
        scheduled_at=_scheduled_at(item, holds),
        unschedulable=_unschedulable(status),
        started_at=parse_time(ran.get("startedAt")),
        waiting=_waiting(state.get("waiting")),
        exit=_exit(state.get("terminated")),
        disruption_message=disruption.get("message", ""),
        disruption_reason=disruption.get("reason", ""),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
    )


def _container_state(status: Json) -> Json:
    states = (
        container.get("state", {})
        for container in status.get("containerStatuses") or ()
        if container["name"] == names.CONTAINER
    )
    return next(states, {})


def _scheduled_at(item: Json, holds: dict[str, Json]) -> datetime | None:
    """Return when the pod got its node; a node that was named without a scheduler counts from the creation."""
    if "PodScheduled" in holds:
        return parse_time(holds["PodScheduled"].get("lastTransitionTime"))
    return _created(item) if item["spec"].get("nodeName") else None


def _unschedulable(status: Json) -> str:
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(condition.get("message", ""))
    return ""


def _waiting(state: Json | None) -> Waiting | None:
    return Waiting(state.get("reason", ""), state.get("message", "")) if state else None


def _exit(state: Json | None) -> Exit | None:
    if not state:
        return None
    return Exit(
        state["exitCode"], state.get("reason", ""), state.get("message", ""), parse_time(state.get("finishedAt"))
    )
