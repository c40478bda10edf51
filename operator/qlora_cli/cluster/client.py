"""What the command line needs of a cluster, and how that can fail; knows no client."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias

from qlora_api.job_ref import JobRef

KubeObject: TypeAlias = Mapping[str, Any]
"""An object of Kubernetes, as JSON."""


class ClusterError(Exception):
    """The cluster cannot or will not do it; the message is a sentence, and says what to do."""


class NotFoundError(ClusterError):
    """There is no such object."""


class AlreadyExistsError(ClusterError):
    """There is such an object already."""


class UnreachableError(ClusterError):
    """The API server does not answer now; it may later."""


class ClusterClient(Protocol):
    """A Kubernetes with QLoRAJobs, seen with the rights of the user."""

    def get(self, ref: JobRef) -> KubeObject:
        """Return a QLoRAJob, or raise NotFoundError."""

    def list_jobs(self, namespace: str, selector: str = "") -> list[KubeObject]:
        """Return the QLoRAJobs of a namespace, or of all namespaces where it is empty."""

    def create(self, manifest: KubeObject, *, dry_run: bool = False) -> KubeObject:
        """Create a QLoRAJob, or raise AlreadyExistsError; a dry run has the API server check it, and no more."""

    def patch(self, ref: JobRef, change: KubeObject) -> KubeObject:
        """Merge a change into a QLoRAJob."""

    def delete(self, ref: JobRef, uid: str) -> None:
        """Begin to delete this very QLoRAJob, and its children before it."""

    def events(self, namespace: str) -> list[KubeObject]:
        """Return the Events of a namespace, as core/v1 has them."""

    def pods(self, ref: JobRef) -> list[KubeObject]:
        """Return the pods that belong to a QLoRAJob."""

    def log(self, namespace: str, pod: str, query: Mapping[str, str]) -> Iterator[str]:
        """Yield the lines that a pod has written; with follow=true also those that it will write."""
