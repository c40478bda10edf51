"""What the Lease of another installation says: whether it is still renewed, and which namespaces it watches."""

from typing import NamedTuple, Protocol

from qlora_api import names
from qlora_operator.cluster.http import Api, NotFoundError


class InstallationLease(NamedTuple):
    """The Lease of an installation at one moment."""

    version: str
    """The resourceVersion, which changes with each renewal."""
    watched: frozenset[str]
    """The namespaces that it watches; empty: all."""

    def watches(self, namespace: str) -> bool:
        """Return whether the installation watches a namespace."""
        return not self.watched or namespace in self.watched


class InstallationReader(Protocol):
    """Access to the Leases of other installations."""

    async def read(self, installation: str) -> InstallationLease | None:
        """Return its Lease, or None if there is none; ApiError without the right to read it."""


class KubeInstallationReader:
    """Reads them from the API server."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def read(self, installation: str) -> InstallationLease | None:
        """Return its Lease, or None if there is none."""
        namespace, _, name = installation.partition("/")
        path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{name}"
        try:
            metadata = (await self._api.request("GET", path))["metadata"]
        except NotFoundError:
            return None
        watched = (metadata.get("annotations") or {}).get(names.WATCHED_NAMESPACES_ANNOTATION) or ""
        return InstallationLease(metadata["resourceVersion"], frozenset(filter(None, watched.split(","))))
