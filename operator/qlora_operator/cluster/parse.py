"""Parses the API server's JSON into the operator's values; no other module knows its field names."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any, Final, Generic, NamedTuple, TypeVar

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.names import Role
from qlora_api.v1alpha1.status import MAX_RETRY_REQUEST
from qlora_operator.cluster.interface import PodIdentity, PodOwner
from qlora_operator.cluster.parse_containers import (
    container_state,
    count_containers,
    parse_exit,
    parse_init,
    parse_waiting,
)
from qlora_operator.cluster.parse_time import bounded_time, parse_time
from qlora_operator.cluster.tolerant import check_types, parse_or_skip
from qlora_operator.models import ENDED_POD_PHASES, ChildJob, JobFailure, Observation, Pod, RawClass, RawJob

Json = Mapping[str, Any]
Child = TypeVar("Child", ChildJob, Pod)

_INDEX: Final = "batch.kubernetes.io/job-completion-index"
"""Annotation of a pod of an Indexed Job."""

MAX_EVENT_MESSAGE: Final = 1024
"""Longest message of an Event (Kubernetes, pkg/apis/core/validation/events.go)."""
JOB_CONTROLLER: Final = "kubernetes.io/job-controller"
"""Value of spec.managedBy for Kubernetes' own controller (Kubernetes API, JobSpec)."""
_FAILING: Final = ("FailureTarget", "Failed")
"""Conditions of a Job whose pods are being terminated, and of one whose pods have terminated."""


def created_at(item: Json) -> datetime:
    """Return when an object was created."""
    return bounded_time(item["metadata"]["creationTimestamp"])


def parse_job(item: Json) -> RawJob:
    """Parse a QLoRAJob; spec and status stay unparsed."""
    metadata = item["metadata"]
    return check_types(
        RawJob(
            ref=JobRef(metadata["namespace"], metadata["name"]),
            uid=metadata["uid"],
            generation=metadata["generation"],
            resource_version=str(int(metadata["resourceVersion"])),
            created_at=created_at(item),
            deleting="deletionTimestamp" in metadata,
            spec=item.get("spec") or {},
            status=item.get("status") or {},
            retry_request=_retry_request(metadata),
        )
    )


def _retry_request(metadata: Json) -> str | None:
    """Return the value of the annotation; its SHA-256 if it is too long for the status."""
    value = (metadata.get("annotations") or {}).get(names.RETRY_ANNOTATION)
    if value is None or len(value) <= MAX_RETRY_REQUEST:
        return value
    return sha256(value.encode(errors="replace")).hexdigest()


def parse_class(item: Json) -> RawClass:
    """Parse a QLoRAClass; its spec stays unparsed."""
    metadata = item["metadata"]
    annotations = metadata.get("annotations") or {}
    return check_types(
        RawClass(
            name=metadata["name"],
            generation=metadata["generation"],
            created_at=created_at(item),
            is_default=annotations.get(names.DEFAULT_CLASS_ANNOTATION) == "true",
            spec=item.get("spec") or {},
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


def pod_labels_of(job: Json) -> Mapping[str, str]:
    """Return the labels that a Job gives to its pods, which nobody can change; the operator gave it the same ones."""
    return job["spec"].get("template", {}).get("metadata", {}).get("labels") or labels_of(job)


def parse_pod_owner(pod: Json, controller: Json | None) -> PodOwner | None:
    """Return the QLoRAJob in a pod's label, and the uid of the one that controls its Job; None without the label."""
    label = labels_of(pod).get(names.JOB_LABEL)
    uid = controller["uid"] if controller and controller["kind"] == names.KIND else None
    return PodOwner(label, uid, created_at(pod)) if label else None


class CachedObject(NamedTuple, Generic[Child]):
    """A Job or a pod at one resourceVersion."""

    uid: str
    owner_uid: str
    """The uid of its controller: the QLoRAJob for a Job, the Job for a pod."""
    version: int
    value: Child


def parse_cached_job(item: Json) -> CachedObject[ChildJob] | None:
    """Parse a batch/v1 Job; None if it has no role label or no controller, so is not one of ours."""
    if names.ROLE_LABEL not in pod_labels_of(item) or not controller_uid(item):
        return None
    return _to_cached_object(item, parse_child(item))


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


def parse_event_message(events: Iterable[Json], reasons: Collection[str], since: datetime) -> str:
    """Return the message of the newest core/v1 Event with such a reason, without what Kubernetes puts before it."""
    read = (parse_or_skip("Event", _parse_event, item) for item in events)
    found = [event for event in read if event is not None and event.reason in reasons and event.last_seen >= since]
    newest = max(found, key=lambda event: event.last_seen, default=None)
    return newest.message.removeprefix("Error creating: ")[:MAX_EVENT_MESSAGE] if newest else ""


class _Event(NamedTuple):
    reason: str
    message: str
    last_seen: datetime


def _parse_event(item: Json) -> _Event:
    return _Event(_text(item.get("reason", "")), _text(item.get("message", "")), _last_seen(item))


def _last_seen(event: Json) -> datetime:
    """Return when an Event occurred last; one that was written with the events.k8s.io API has other fields for it."""
    series = (event.get("series") or {}).get("lastObservedTime")
    return parse_time(series or event.get("lastTimestamp") or event.get("eventTime")) or created_at(event)


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
    pods_of_job: dict[str, list[Pod]] = {}
    for pod in sorted(pods, key=lambda pod: pod.value.created_at or job.created_at):
        pods_of_job.setdefault(pod.owner_uid, []).append(pod.value)
    return Observation(
        tuple(
            _with_pods(child.value, pods_of_job.get(child.uid, []))
            for child in jobs
            if child.owner_uid == job.uid and child.value.name == _derived_name(job.ref, child.value)
        )
    )


def _derived_name(ref: JobRef, child: ChildJob) -> str:
    if child.role is Role.PREPARE:
        return names.prepare_job_name(ref.name, child.attempt)
    return names.train_job_name(ref.name, child.attempt)


def _with_pods(child: ChildJob, pods: Iterable[Pod]) -> ChildJob:
    """Return the Job with its pods by index; those from before it was suspended and resumed are kept apart."""
    current: dict[int, Pod] = {}
    earlier: list[Pod] = []
    replaced: list[Pod] = []
    for pod in pods:
        if not child.suspended and _is_of_earlier_start(pod, child.started_at):
            earlier.append(pod)
        else:
            replaced += [current[pod.index]] if pod.index in current else []
            current[pod.index] = pod
    pods = tuple(current[index] for index in sorted(current))
    return replace(child, pods=pods, earlier_pods=tuple(earlier), replaced_pods=tuple(replaced))


def _is_of_earlier_start(pod: Pod, started: datetime | None) -> bool:
    """Return whether a pod is being deleted because its Job was suspended, and the Job has been resumed since.

    The creation of a pod does not tell: the Job controller creates pods before it writes the time of the resumption.
    """
    if not pod.deleting or started is None or pod.created_at is None:
        return False
    requested = pod.deletion_requested_at
    return pod.created_at < started and (requested is None or requested <= started)


def _index_of(pod: Json) -> int:
    """Return a pod's completion index in an Indexed Job."""
    return int((pod["metadata"].get("annotations") or {}).get(_INDEX, 0))


def parse_child(item: Json) -> ChildJob:
    """Parse a child Job, without its pods."""
    metadata, conditions = item["metadata"], _conditions(item)
    suspension, failed = conditions.get("Suspended", {}), conditions.get("Failed")
    # Between the change of spec.suspend and that of the condition, startTime is that of the earlier start.
    suspended = bool(item["spec"].get("suspend", False) or suspension)
    labels, created_with = labels_of(item), pod_labels_of(item)
    role = Role(created_with[names.ROLE_LABEL])
    return ChildJob(
        name=metadata["name"],
        role=role,
        attempt=int(created_with.get(names.NUMBER_LABELS[role], role is Role.PREPARE)),
        created_at=created_at(item),
        uid=metadata["uid"],
        started_at=None if suspended else parse_time(item.get("status", {}).get("startTime")),
        deadline_seconds=item["spec"].get("activeDeadlineSeconds"),
        image=_image(item),
        pull_secrets=_pull_secrets(item),
        deleting="deletionTimestamp" in metadata,
        suspended=suspended,
        suspended_at=parse_time(suspension.get("lastTransitionTime")),
        queue=labels.get(names.QUEUE_LABEL, ""),
        priority_class=labels.get(names.PRIORITY_CLASS_LABEL, ""),
        watched=labels.get(names.MANAGED_BY_LABEL) == names.FIELD_MANAGER,
        used_class=created_with.get(names.CLASS_LABEL, ""),
        managed_by=_foreign_controller(item),
        complete="Complete" in conditions,
        completed_at=parse_time(conditions.get("Complete", {}).get("lastTransitionTime")),
        failure=_failure(failed) if failed else None,
        failing="FailureTarget" in conditions,
        deadline_exceeded=any(conditions.get(kind, {}).get("reason") == "DeadlineExceeded" for kind in _FAILING),
        completions=item["spec"].get("completions", 1),
        avoided_nodes=_avoided_nodes(item),
        node_terms=tuple(_node_terms(item)),
    )


def _foreign_controller(job: Json) -> str:
    """Return which controller runs a Job, unless it is that of Kubernetes."""
    managed_by = job["spec"].get("managedBy") or JOB_CONTROLLER
    return "" if managed_by == JOB_CONTROLLER else managed_by


def _avoided_nodes(job: Json) -> tuple[str, ...]:
    """Return the nodes that the node affinity of a Job's pods excludes."""
    fields = [
        field
        for term in _node_terms(job)
        for field in term.get("matchFields") or ()
        if field.get("operator") == "NotIn"
    ]
    return tuple(dict.fromkeys(node for field in fields for node in field.get("values") or ()))


def _node_terms(job: Json) -> Sequence[dict[str, Any]]:
    affinity = (job["spec"].get("template", {}).get("spec", {}).get("affinity") or {}).get("nodeAffinity") or {}
    return (affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}).get("nodeSelectorTerms") or ()


def _image(item: Json) -> str | None:
    containers = item["spec"].get("template", {}).get("spec", {}).get("containers", ())
    return next((entry.get("image") for entry in containers if entry.get("name") == names.CONTAINER), None)


def _pull_secrets(item: Json) -> tuple[str, ...]:
    secrets = item["spec"].get("template", {}).get("spec", {}).get("imagePullSecrets") or ()
    return tuple(secret["name"] for secret in secrets if secret.get("name"))


def conditions_of(item: Json, status: str) -> dict[str, Json]:
    """Return the conditions with a status, by type."""
    return {
        condition["type"]: condition
        for condition in item.get("status", {}).get("conditions") or ()
        if condition["status"] == status
    }


def _conditions(item: Json) -> dict[str, Json]:
    return conditions_of(item, "True")


def _failure(condition: Json) -> JobFailure:
    return JobFailure(
        condition.get("reason", ""), condition.get("message", ""), parse_time(condition.get("lastTransitionTime"))
    )


def parse_pod(item: Json) -> Pod:
    """Parse a pod of a child Job."""
    metadata, status = item["metadata"], item.get("status", {})
    conditions = _conditions(item)
    disruption = conditions.get("DisruptionTarget", {})
    state = container_state(status)
    started = state.get("running") or state.get("terminated") or {}
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        index=_index_of(item),
        phase=status.get("phase", "Pending"),
        node=item["spec"].get("nodeName", ""),
        created_at=created_at(item),
        deleting="deletionTimestamp" in metadata,
        deletion_timestamp=parse_time(metadata.get("deletionTimestamp")),
        deletion_requested_at=_deletion_requested_at(metadata),
        scheduled_at=_scheduled_at(item, conditions),
        unschedulable=_unschedulable(status),
        scheduling_gates=tuple(gate["name"] for gate in item["spec"].get("schedulingGates") or ()),
        started_at=parse_time(started.get("startedAt")),
        waiting=parse_waiting(state.get("waiting")),
        init=parse_init(status),
        containers=count_containers(item),
        exit=parse_exit(state.get("terminated")),
        disruption_message=disruption.get("message", ""),
        disruption_reason=disruption.get("reason", ""),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        released_at=_released_at(status, disruption),
    )


def _released_at(status: Json, disruption: Json) -> datetime | None:
    """Return when a pod that has ended did: its last container, or, if none ran, what disrupted it."""
    if status.get("phase") not in ENDED_POD_PHASES:
        return None
    containers = (*(status.get("containerStatuses") or ()), *(status.get("initContainerStatuses") or ()))
    ends = [((container.get("state") or {}).get("terminated") or {}).get("finishedAt") for container in containers]
    return max((end for end in map(parse_time, ends) if end is not None), default=None) or parse_time(
        disruption.get("lastTransitionTime")
    )


def _deletion_requested_at(metadata: Json) -> datetime | None:
    """Return when the deletion of a pod was requested; its deletionTimestamp is the end of the grace period."""
    ends, grace = parse_time(metadata.get("deletionTimestamp")), metadata.get("deletionGracePeriodSeconds")
    return ends - timedelta(seconds=grace) if ends is not None and grace is not None else None


def _scheduled_at(item: Json, conditions: dict[str, Json]) -> datetime | None:
    """Return when the pod was bound to its node; if no scheduler was involved, when it was created."""
    if "PodScheduled" in conditions:
        return parse_time(conditions["PodScheduled"].get("lastTransitionTime"))
    return created_at(item) if item["spec"].get("nodeName") else None


def _unschedulable(status: Json) -> str:
    """Return the scheduler's message if no node fits; it has not tried a pod with scheduling gates."""
    for condition in status.get("conditions") or ():
        unscheduled = condition["type"] == "PodScheduled" and condition["status"] == "False"
        if unscheduled and condition.get("reason") != "SchedulingGated":
            return str(condition.get("message", ""))
    return ""


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
