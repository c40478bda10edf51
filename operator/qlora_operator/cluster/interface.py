"""Interfaces to the cluster and their errors; `KubeCluster` implements them, and so does the fake of the tests."""

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple, Protocol

from qlora_api.accelerators import Accelerator
from qlora_api.job_ref import JobRef
from qlora_operator.models import ChildJob, Classes, Manifest, Observation, RawJob, Workload


class ClusterBusyError(Exception):
    """The API server is unavailable or overloaded, or the object has changed meanwhile; retried with back-off."""


class NameConflictError(Exception):
    """The name of a child is taken by an object that this QLoRAJob does not own; it is never adopted."""

    def __init__(self, message: str, *, being_deleted: bool) -> None:
        super().__init__(message)
        self.being_deleted = being_deleted
        """Whether the object will disappear: it, or the QLoRAJob that owned it, is being deleted."""


class AdmissionDeniedError(Exception):
    """The API server, a quota or an admission policy denied a child; the message is theirs."""

    def __init__(self, message: str, *, permanent: bool) -> None:
        super().__init__(message)
        self.permanent = permanent
        """Whether the child itself is invalid, so that no change of the cluster helps."""


class InvalidStatusError(Exception):
    """The API server refused a status as invalid; the message is its."""


class JobVersion(NamedTuple):
    """One QLoRAJob of a list."""

    ref: JobRef
    resource_version: str
    fully_reconciled: bool
    """Finished, and its latest generation is observed: nothing is left to do."""


class PodIdentity(NamedTuple):
    """The pod that a token is bound to."""

    namespace: str
    name: str
    uid: str


class PodOwner(NamedTuple):
    """What a pod says of the QLoRAJob that it belongs to."""

    job: str
    """Name of the QLoRAJob, from the pod's label."""
    job_uid: str | None
    """uid of the QLoRAJob that controls the pod's Job; None if no QLoRAJob does."""
    pod_created_at: datetime


class Cluster(Protocol):
    """The cluster as reconcile uses it.

    Every method that calls the API server raises ClusterBusyError if the failure is transient, ApiError otherwise.
    """

    async def read_job(self, ref: JobRef) -> RawJob | None:
        """Return a QLoRAJob, or None if it is gone."""

    def children_from_cache(self, job: RawJob) -> Observation:
        """Return its children from the cache: without an API call, and possibly stale."""

    async def list_children(self, job: RawJob) -> Observation:
        """List its children live, matched by uid."""

    async def find_gpu_nodes(self, accelerator: Accelerator) -> tuple[Manifest, ...] | None:
        """Return the nodes whose labels describe such GPUs; None if the operator may not list nodes."""

    async def list_classes(self, age: timedelta) -> Classes:
        """Return the QLoRAClasses from a list that is not old, and younger than a run of this age."""

    async def namespace_labels(self, namespace: str, age: timedelta) -> Mapping[str, str] | None:
        """Return the labels of a namespace, with the same promise; None if the operator may not read it."""

    async def find_event(self, ref: JobRef, uid: str, reasons: Collection[str], since: datetime) -> str:
        """Return the message of the newest Event on a child with such a reason.

        Args:
            ref: The QLoRAJob, in whose namespace the child is.
            uid: The child's uid.
            reasons: Reasons of Events.
            since: Older Events do not count.

        Returns:
            The message; empty without such an Event, or if the operator may not list Events.

        """

    async def find_workload(self, ref: JobRef, uid: str) -> Workload | None:
        """Return what Kueue says of a child Job in a queue; None if the operator may not read that.

        Args:
            ref: The QLoRAJob, in whose namespace the child is.
            uid: The child's uid.

        """

    async def ensure(self, child: Manifest) -> bool:
        """Create a child, or update the ConfigMap if it exists; return whether it was created.

        Raises:
            NameConflictError: The name is taken by an object that this QLoRAJob does not own.
            AdmissionDeniedError: The API server, a quota or an admission policy denied the child.

        """

    async def read_config_map(self, ref: JobRef, name: str) -> Manifest | None:
        """Return a ConfigMap of the QLoRAJob's namespace, whoever made it; None if there is none."""

    async def restore_job(self, job: Manifest, run_created_at: datetime) -> bool:
        """Give a Job the labels and the owner reference again that somebody removed; return whether any were.

        Args:
            job: The manifest that the Job was created with, at least its metadata.
            run_created_at: When its QLoRAJob was created; an older Job is left alone.

        Raises:
            ClusterBusyError: The Job has changed meanwhile.
            AdmissionDeniedError: The API server or an admission policy denied the change.

        """

    async def patch(self, child: Manifest) -> None:
        """Merge some fields into a child that exists.

        Raises:
            ClusterBusyError: The child is gone, or has changed since it was read.
            AdmissionDeniedError: The API server, or an admission policy such as a queue's, denied the change.

        """

    async def delete_job(self, ref: JobRef, child: ChildJob) -> None:
        """Delete a child Job after its pods (foreground); no error if it is gone, or another Job has its name now.

        Raises:
            AdmissionDeniedError: The API server, a policy or a webhook denied the deletion.

        """

    async def delete_configuration(self, job: RawJob) -> None:
        """Delete the ConfigMaps and Services that a QLoRAJob owns; no error if there are none."""

    async def delete_qlorajob(self, job: RawJob) -> None:
        """Delete a QLoRAJob, and with it its children; no error if it is gone.

        Raises:
            ClusterBusyError: It has changed since it was read.

        """

    async def write_status(self, job: RawJob, status: Manifest) -> str:
        """Replace the status, and return the new resourceVersion.

        Raises:
            ClusterBusyError: The QLoRAJob is gone, or has changed since it was read.
            InvalidStatusError: The API server refused the status as invalid.

        """

    async def record_event(self, event: Manifest) -> None:
        """Create a Kubernetes Event; a repeat is a no-op, and a rejection is only logged."""


class TokenReviewer(Protocol):
    """The cluster as the progress endpoint uses it."""

    async def review_token(self, token: str) -> PodIdentity | None:
        """Return the pod that a token is bound to; None if it is invalid, or for another audience."""

    def caches_pod(self, ref: JobRef, uid: str) -> bool:
        """Return whether the cache has a pod of the QLoRAJob with this uid; without an API call, and possibly late."""

    async def owner_of_pod(self, pod: PodIdentity) -> PodOwner | None:
        """Return which QLoRAJob a pod belongs to; None if the pod is gone, its Job is, or it has no such label."""

    async def read_job(self, ref: JobRef) -> RawJob | None:
        """Return a QLoRAJob, or None if it is gone."""
