"""What the rest of the operator asks of a cluster, and what may go wrong; kube answers, tests have a fake."""

from collections.abc import Collection
from typing import NamedTuple, Protocol

from qlora_api.job_ref import JobRef
from qlora_operator.models import Manifest, Observation, RawJob


class ClusterBusyError(Exception):
    """Time will help: the API server is away, overloaded, or somebody else wrote first."""


class NameConflictError(Exception):
    """A child's name belongs to something else, which is never adopted."""

    def __init__(self, message: str, *, being_deleted: bool) -> None:
        super().__init__(message)
        self.being_deleted = being_deleted
        """Whether it will be gone by itself: it is being deleted, or its owner was."""


class AdmissionDeniedError(Exception):
    """The API server, a quota or an admission policy does not take a child; the message is its sentence."""

    def __init__(self, message: str, *, permanent: bool) -> None:
        super().__init__(message)
        self.permanent = permanent
        """Whether the child itself is wrong, so that no change of the cluster helps."""


class JobVersion(NamedTuple):
    """One line of a listing."""

    ref: JobRef
    resource_version: str
    fully_reconciled: bool
    """Finished, and the newest generation was seen: nothing is left to do."""


class PodIdentity(NamedTuple):
    """The pod that a token speaks for."""

    namespace: str
    name: str
    uid: str


class Cluster(Protocol):
    """What reconcile needs."""

    async def read_job(self, ref: JobRef) -> RawJob | None:
        """Return a QLoRAJob, or nothing when it is gone."""

    def children_from_cache(self, job: RawJob) -> Observation:
        """Return what the watches have told of its children: free of cost, and perhaps late."""

    async def list_children(self, job: RawJob) -> Observation:
        """Look at the children that belong to exactly this QLoRAJob."""

    async def find_gpu_nodes(self) -> tuple[Manifest, ...]:
        """Return the nodes that say what GPUs they have; none where the operator may not look."""

    async def ensure(self, child: Manifest) -> bool:
        """Create a child, or bring a ConfigMap of ours up to date, and say whether it was created.

        Raises NameTakenError or RefusedError when it cannot be.
        """

    async def patch(self, child: Manifest) -> None:
        """Change some fields of a child that exists."""

    async def delete_job(self, ref: JobRef, name: str) -> None:
        """Delete a child Job after its pods; no error when it is gone."""

    async def write_status(self, job: RawJob, status: Manifest) -> str:
        """Replace the status if nobody else wrote since it was read, and return the new version."""

    async def record_event(self, event: Manifest) -> None:
        """Create a Kubernetes Event; a repeat is a no-op."""


class Lister(Protocol):
    """What the resync needs."""

    async def list_jobs(self, namespaces: Collection[str]) -> list[JobVersion]:
        """Return every QLoRAJob of some namespaces, or of all when none is given."""

    async def relist(self, namespaces: Collection[str]) -> set[JobRef]:
        """List all children, and return whose were not as the watches had told."""


class TokenReviewer(Protocol):
    """What the progress endpoint needs."""

    async def review_token(self, token: str) -> PodIdentity | None:
        """Return the pod that a token of our audience is bound to."""

    async def job_of_pod(self, pod: PodIdentity) -> str | None:
        """Return the QLoRAJob that a running pod is labelled with."""

    async def read_job(self, ref: JobRef) -> RawJob | None:
        """Return a QLoRAJob, or nothing when it is gone."""
