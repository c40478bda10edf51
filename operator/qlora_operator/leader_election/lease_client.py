"""The Lease and the label of the leader's pod, through the Kubernetes API."""

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any, Final

from qlora_api import names
from qlora_operator.cluster.http import MERGE_PATCH, Api, ConflictError, NotFoundError
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.cluster.parse_time import parse_time
from qlora_operator.leader_election.lease import Lease
from qlora_operator.models import Manifest

_MICRO_TIME: Final = "%Y-%m-%dT%H:%M:%S.%fZ"


class KubeLeaseLock:
    """One Lease, and the label by which the progress Service selects the leader's pod."""

    def __init__(self, api: Api, namespace: str, name: str, pod: str, watched: Collection[str] = ()) -> None:
        self._api = api
        self._watched = ",".join(watched)
        self._namespace = namespace
        self._name = name
        self._pod = pod
        self._collection_path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"

    async def read(self) -> Lease | None:
        """Return the record, or None before the first leader."""
        try:
            return _parse(await self._api.request("GET", f"{self._collection_path}/{self._name}"))
        except NotFoundError:
            return None

    async def write(self, lease: Lease) -> Lease:
        """Create the record, or replace the version that was read; ClusterBusyError if it has changed meanwhile."""
        body = _build(lease, self._namespace, self._name)
        body["metadata"]["annotations"] = {names.WATCHED_NAMESPACES_ANNOTATION: self._watched}
        try:
            if not lease.version:
                return _parse(await self._api.request("POST", self._collection_path, body))
            return _parse(await self._api.request("PUT", f"{self._collection_path}/{self._name}", body))
        except (ConflictError, NotFoundError) as error:
            raise ClusterBusyError(f"the Lease has changed since it was read: {error}") from error

    async def set_leader_label(self, *, is_leader: bool) -> None:
        """Set or remove the leader label on the replica's own pod."""
        body = {"metadata": {"labels": {names.LEADER_LABEL: "true" if is_leader else None}}}
        path = f"/api/v1/namespaces/{self._namespace}/pods/{self._pod}"
        await self._api.request("PATCH", path, body, content_type=MERGE_PATCH)

    async def close(self) -> None:
        """Close the connection."""
        await self._api.close()


def _build(lease: Lease, namespace: str, name: str) -> Manifest:
    version = {"resourceVersion": lease.version} if lease.version else {}
    spec = {
        "holderIdentity": lease.holder,
        "leaseDurationSeconds": int(lease.duration.total_seconds()),
        "acquireTime": _to_micro_time(lease.acquired_at),
        "renewTime": _to_micro_time(lease.renewed_at),
        "leaseTransitions": lease.transitions,
    }
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"namespace": namespace, "name": name, **version},
        "spec": spec,
    }


def _to_micro_time(time: datetime | None) -> str | None:
    return time.strftime(_MICRO_TIME) if time else None


def _parse(item: dict[str, Any]) -> Lease:
    spec = item.get("spec", {})
    return Lease(
        holder=spec.get("holderIdentity") or "",
        duration=timedelta(seconds=spec.get("leaseDurationSeconds") or 0),
        acquired_at=parse_time(spec.get("acquireTime")),
        renewed_at=parse_time(spec.get("renewTime")),
        transitions=spec.get("leaseTransitions") or 0,
        version=item["metadata"]["resourceVersion"],
    )
