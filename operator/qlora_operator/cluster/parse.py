"""Parses the API server's JSON into the operator's values; no other module knows its field names."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, Generic, NamedTuple, TypeVar

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.names import Role
from qlora_operator.cluster.interface import PodIdentity, PodOwner
from qlora_operator.cluster.tolerant import check_types, parse_or_skip
from qlora_operator.models import ChildJob, Exit, JobFailure, Observation, Pod, RawJob, Waiting

Json = Mapping[str, Any]
Child = TypeVar("Child", ChildJob, Pod)

_INDEX: Final = "batch.kubernetes.io/job-completion-index"
"""Annotation of a pod of an Indexed Job."""

_FAILING: Final = ("FailureTarget", "Failed")
"""Conditions of a Job whose pods are being terminated, and of one whose pods have terminated."""


_EARLIEST: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST: Final = datetime(9000, 1, 1, tzinfo=UTC)
"""Bounds of a time that was read, so that adding a duration to it cannot overflow."""


def parse_time(text: str | None) -> datetime | None:
    """Parse an RFC 3339 time, which has a time zone."""
    return min(max(datetime.fromisoformat(text), _EARLIEST), _LATEST) if text else None


def _created(item: Json) -> datetime:
    return min(max(datetime.fromisoformat(item["metadata"]["creationTimestamp"]), _EARLIEST), _LATEST)


def parse_job(item: Json) -> RawJob:
    """Parse a QLoRAJob; spec and status stay unparsed."""
    metadata = item["metadata"]
    return check_types(
        RawJob(
            ref=JobRef(metadata["namespace"], metadata["name"]),
            uid=metadata["uid"],
            generation=metadata["generation"],
            resource_version=str(int(metadata["resourceVersion"])),
            created_at=_created(item),
            deleting="deletionTimestamp" in metadata,
            spec=item.get("spec") or {},
            status=item.get("status") or {},
        )
    )


def controller_of(item: Json) -> Json | None:
    """Return the reference to the object that controls this one."""
    owners = item["metadata"].get("ownerReferences") or ()
    return next((owner for owner in owners if owner.get("controller")), None)


def controller_uid(item: Json) -> str | None:
    """Return the uid of the object that controls this one."""
    controller = controller_of(item)
    return controller["uid"] if controller else None


def labels_of(item: Json) -> Mapping[str, str]:
    """Return the labels of an object."""
    return item["metadata"].get("labels") or {}


def parse_pod_owner(pod: Json, controller: Json | None) -> PodOwner | None:
    """Return the QLoRAJob in a pod's label, and the uid of the one that controls its Job; None without the label."""
    label = labels_of(pod).get(names.JOB_LABEL)
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
    """Parse a batch/v1 Job; None if it has no role label or no controller, so is not one of ours."""
    if names.ROLE_LABEL not in labels_of(item) or not controller_uid(item):
        return None
    return _to_cached_object(item, parse_child(item, ()))


def parse_cached_pod(item: Json) -> CachedObject[Pod] | None:
    """Parse a pod; None if it has no controller, so is not one of a Job's."""
    return _to_cached_object(item, parse_pod(item)) if controller_uid(item) else None


def _to_cached_object(item: Json, value: Child) -> CachedObject[Child]:
    metadata = item["metadata"]
    version = int(metadata.get("resourceVersion", 0))
    return CachedObject(_text(metadata["uid"]), _text(controller_uid(item)), version, check_types(value))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.50} is not text")
    return value


def parse_observation(job: RawJob, jobs: Iterable[Json], pods: Iterable[Json]) -> Observation:
    """Parse Jobs and pods, and return those that belong to this QLoRAJob; unreadable ones are skipped."""
    parsed_jobs = (parse_or_skip("Job", parse_cached_job, item) for item in jobs)
    parsed_pods = (parse_or_skip("Pod", parse_cached_pod, item) for item in pods)
    return assemble_observation(job, filter(None, parsed_jobs), filter(None, parsed_pods))


def assemble_observation(
    job: RawJob, jobs: Iterable[CachedObject[ChildJob]], pods: Iterable[CachedObject[Pod]]
) -> Observation:
    """Return the Jobs of this QLoRAJob with their pods.

    A Job counts if this QLoRAJob controls it and it has the name that is derived from its role and attempt: children of
    an earlier QLoRAJob with the same name, and copies that somebody made of a child, are left out.
    """
    pods_of_job: dict[str, dict[int, Pod]] = {}
    for pod in sorted(pods, key=lambda pod: pod.value.created_at or job.created_at):
        pods_of_job.setdefault(pod.owner_uid, {})[pod.value.index] = pod.value
    return Observation(
        tuple(
            replace(child.value, pods=_by_index(pods_of_job.get(child.uid, {})))
            for child in jobs
            if child.owner_uid == job.uid and child.value.name == _derived_name(job.ref, child.value)
        )
    )


def _derived_name(ref: JobRef, child: ChildJob) -> str:
    if child.role is Role.PREPARE:
        return names.prepare_job_name(ref.name)
    return names.train_job_name(ref.name, child.attempt)


def _by_index(pods: Mapping[int, Pod]) -> tuple[Pod, ...]:
    return tuple(pods[index] for index in sorted(pods))


def _index_of(pod: Json) -> int:
    """Return a pod's completion index in an Indexed Job."""
    return int((pod["metadata"].get("annotations") or {}).get(_INDEX, 0))


def parse_child(item: Json, pods: tuple[Pod, ...]) -> ChildJob:
    """Parse a child Job; pods from before it was suspended and resumed are left out."""
    metadata, conditions = item["metadata"], _conditions(item)
    started = parse_time(item.get("status", {}).get("startTime"))
    failed = conditions.get("Failed")
    return ChildJob(
        name=metadata["name"],
        uid=metadata["uid"],
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


_ACCOUNT_PREFIX: Final = "system:serviceaccount:"
_POD_NAME: Final = "authentication.kubernetes.io/pod-name"
_POD_UID: Final = "authentication.kubernetes.io/pod-uid"


def parse_pod_identity(review: Json) -> PodIdentity | None:
    """Parse a TokenReview; None for a token without a pod, or for another audience."""
    status = review.get("status", {})
    user = status.get("user", {})
    extra, username = user.get("extra", {}), user.get("username", "")
    if not status.get("authenticated") or names.TOKEN_AUDIENCE not in status.get("audiences", ()):
        return None
    if not username.startswith(_ACCOUNT_PREFIX) or _POD_NAME not in extra or _POD_UID not in extra:
        return None
    namespace = username.removeprefix(_ACCOUNT_PREFIX).partition(":")[0]
    return PodIdentity(namespace, _text(extra[_POD_NAME][0]), _text(extra[_POD_UID][0]))
