"""The interface between the commands and a cluster, and its errors; independent of any Kubernetes client."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias

from qlora_api.job_ref import JobRef

KubeObject: TypeAlias = Mapping[str, Any]
"""A Kubernetes object, as JSON."""


class ClusterError(Exception):
    """A request failed; the message has the cause and the fix."""


class NotFoundError(ClusterError):
    """The object does not exist."""


class AlreadyExistsError(ClusterError):
    """An object with this name already exists."""


class UnreachableError(ClusterError):
    """The API server does not respond, or asks to retry later."""


class ClusterClient(Protocol):
    """A cluster with QLoRAJobs, with the user's permissions."""

    def get(self, ref: JobRef) -> KubeObject:
        """Return a QLoRAJob.

        Raises:
            NotFoundError: It does not exist.

        """

    def list_jobs(self, namespace: str, selector: str = "") -> list[KubeObject]:
        """Return the QLoRAJobs of a namespace, or of all namespaces if it is empty."""

    def create(self, manifest: KubeObject, *, dry_run: bool = False) -> KubeObject:
        """Create a QLoRAJob; with dry_run the API server only validates it.

        Raises:
            AlreadyExistsError: A QLoRAJob with this name exists.

        """

    def patch(self, ref: JobRef, change: KubeObject) -> KubeObject:
        """Apply a JSON merge patch to a QLoRAJob."""

    def delete(self, ref: JobRef, uid: str) -> None:
        """Start to delete a QLoRAJob if it still has this uid; its children are deleted first (foreground)."""

    def events(self, namespace: str) -> list[KubeObject]:
        """Return the Events (core/v1) of a namespace."""

    def pods(self, ref: JobRef) -> list[KubeObject]:
        """Return the pods of a QLoRAJob."""

    def log(self, namespace: str, pod: str, query: Mapping[str, str]) -> Iterator[str]:
        """Yield the lines of a pod's log; with follow=true in the query also new ones, until the container exits."""
