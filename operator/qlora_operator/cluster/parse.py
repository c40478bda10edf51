"""Parses the API server's JSON into the operator's values; no other module knows its field names."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from hashlib import sha256
from typing import Any, Final, Generic, NamedTuple, TypeVar

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.names import Role
from qlora_api.v1alpha1.status import MAX_RETRY_REQUEST
from qlora_operator.cluster.interface import PodOwner
from qlora_operator.models import ChildJob, Exit, JobFailure, Observation, Pod, RawJob, Waiting

Json = Mapping[str, Any]
Child = TypeVar("Child", ChildJob, Pod)

_INDEX: Final = "batch.kubernetes.io/job-completion-index"
"""Annotation of a pod of an Indexed Job."""

_FAILING: Final = ("FailureTarget", "Failed")
"""Conditions of a Job whose pods are being terminated, and of one whose pods have terminated."""


def parse_time(text: str | None) -> datetime | None:
    """Parse an RFC 3339 time."""
    return datetime.fromisoformat(text) if text else None


def _created(item: Json) -> datetime:
    return datetime.fromisoformat(item["metadata"]["creationTimestamp"])


def parse_job(item: Json) -> RawJob:
    """Parse a QLoRAJob; spec and status stay unparsed."""
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
        retry_request=_retry_request(metadata),
    )


def _retry_request(metadata: Json) -> str | None:
    """Return the value of the annotation; its SHA-256 if it is too long for the status."""
    value = (metadata.get("annotations") or {}).get(names.RETRY_ANNOTATION)
    if value is None or len(value) <= MAX_RETRY_REQUEST:
        return value
    return sha256(value.encode(errors="replace")).hexdigest()


def controller_of(item: Json) -> Json | None:
    """Return the reference to the object that controls this one."""
    return next((owner for owner in item["metadata"].get("ownerReferences", ()) if owner.get("controller")), None)


def controller_uid(item: Json) -> str | None:
    """Return the uid of the object that controls this one."""
    controller = controller_of(item)
    return controller["uid"] if controller else None


def parse_pod_owner(pod: Json, controller: Json | None) -> PodOwner | None:
    """Return the QLoRAJob in a pod's label, and the uid of the one that controls its Job; None without the label."""
    label = pod["metadata"].get("labels", {}).get(names.JOB_LABEL)
    uid = controller["uid"] if controller and controller["kind"] == names.KIND else None
    return PodOwner(label, uid, _created(pod)) if label else None


class CachedObject(NamedTuple, Generic[Child]):
    """A Job or a pod at one resourceVersion."""

    uid: str
    owner_uid: str
    """The uid of its controller: the QLoRAJob for a Job, the Job for a pod."""
    version: int
    value: Child


def parse_cached_job(item: Json) -> CachedObject[ChildJob] | None:
    """Parse a batch/v1 Job; None if it has no role label, so is not one of ours."""
    return (
        _to_cached_object(item, parse_child(item, ()))
        if names.ROLE_LABEL in item["metadata"].get("labels", {})
        else None
    )


def parse_cached_pod(item: Json) -> CachedObject[Pod]:
    """Parse a pod."""
    return _to_cached_object(item, parse_pod(item))


def _to_cached_object(item: Json, value: Child) -> CachedObject[Child]:
    metadata = item["metadata"]
    return CachedObject(metadata["uid"], controller_uid(item) or "", int(metadata.get("resourceVersion", 0)), value)


def parse_observation(job: RawJob, jobs: Iterable[Json], pods: Iterable[Json]) -> Observation:
    """Parse Jobs and pods, and return those that belong to this QLoRAJob."""
    return assemble_observation(job, filter(None, map(parse_cached_job, jobs)), map(parse_cached_pod, pods))


def assemble_observation(
    job: RawJob, jobs: Iterable[CachedObject[ChildJob]], pods: Iterable[CachedObject[Pod]]
) -> Observation:
    """Return the Jobs of this QLoRAJob with their pods; children of an earlier one with the same name are left out."""
    pods_of_job: dict[str, dict[int, Pod]] = {}
    for pod in sorted(pods, key=lambda pod: pod.value.created_at or job.created_at):
        pods_of_job.setdefault(pod.owner_uid, {})[pod.value.index] = pod.value
    return Observation(
        tuple(
            replace(child.value, pods=_by_index(pods_of_job.get(child.uid, {})))
            for child in jobs
            if child.owner_uid == job.uid
        )
    )


def _by_index(pods: Mapping[int, Pod]) -> tuple[Pod, ...]:
    return tuple(pods[index] for index in sorted(pods))


def _index_of(pod: Json) -> int:
    """Return a pod's completion index in an Indexed Job."""
    return int(pod["metadata"].get("annotations", {}).get(_INDEX, 0))


def parse_child(item: Json, pods: tuple[Pod, ...]) -> ChildJob:
    """Parse a child Job; pods from before it was suspended and resumed are left out."""
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
    """Return whether a pod is terminating because its Job was suspended, and the Job has been resumed since."""
    return pod.deleting and started is not None and pod.created_at is not None and pod.created_at < started


def _conditions(item: Json) -> dict[str, Json]:
    """Return the conditions whose status is True, by type."""
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
    """Parse a pod of a child Job."""
    metadata, status = item["metadata"], item.get("status", {})
    conditions = _conditions(item)
    disruption = conditions.get("DisruptionTarget", {})
    state = _container_state(status)
    started = state.get("running") or state.get("terminated") or {}
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        index=_index_of(item),
        phase=status.get("phase", "Pending"),
        node=item["spec"].get("nodeName", ""),
        created_at=_created(item),
        deleting="deletionTimestamp" in metadata,
        deletion_timestamp=parse_time(metadata.get("deletionTimestamp")),
        scheduled_at=_scheduled_at(item, conditions),
        unschedulable=_unschedulable(status),
        started_at=parse_time(started.get("startedAt")),
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


def _scheduled_at(item: Json, conditions: dict[str, Json]) -> datetime | None:
    """Return when the pod was bound to its node; if no scheduler was involved, when it was created."""
    if "PodScheduled" in conditions:
        return parse_time(conditions["PodScheduled"].get("lastTransitionTime"))
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
