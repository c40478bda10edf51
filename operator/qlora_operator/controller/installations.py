"""Which installation each QLoRAJob belongs to, so that two never work on one namespace.

An installation claims QLoRAJobs in their status, which no tenant may write. A claim counts as long as the Lease of its
installation is renewed and says that it watches the namespace (docs/decisions/0030-installations.md).
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NoReturn

from qlora_api.job_ref import JobRef
from qlora_operator.cluster.http import ApiError
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.leader_election.installation_lease import InstallationLease, InstallationReader
from qlora_operator.lifecycle import Claimant

_log = logging.getLogger(__name__)

REFRESH_SECONDS: Final = 10.0
"""Interval at which the Leases of other installations are read, as long as there are any."""
GONE_SECONDS: Final = 300.0
"""An installation whose Lease has not changed for so long is gone; an upgrade that pulls an image takes less."""


@dataclass
class OtherInstallation:
    """What is known of another installation."""

    lease: InstallationLease | None = None
    changed_at: float = 0.0
    """When its Lease was first seen as it is, by this operator's own clock: clocks are never compared."""
    missing: bool = False
    unreadable: str = ""
    """Why its Lease cannot be read; it then counts as there."""

    def serves(self, namespace: str, now: float) -> bool:
        """Return whether its claims in a namespace count."""
        if self.missing or (self.lease is not None and now - self.changed_at > GONE_SECONDS):
            return False
        return self.lease is None or self.lease.watches(namespace)


@dataclass
class _Namespace:
    """The QLoRAJobs of one namespace."""

    claims: dict[JobRef, str] = field(default_factory=dict)
    """Which installation each belongs to, if any."""
    owners: Counter[str] = field(default_factory=Counter)
    """How many belong to each installation."""
    waiting: set[JobRef] = field(default_factory=set)
    """Those that were left to another installation."""
    claimed: bool = False
    """Whether this operator process has tried to claim one; an older CRD does not store it."""

    def set_claim(self, ref: JobRef, claim: str) -> None:
        """Record the claim on a QLoRAJob; empty: none."""
        if before := self.claims.pop(ref, ""):
            self.owners -= Counter([before])
        if claim:
            self.claims[ref] = claim
            self.owners[claim] += 1


class Installations:
    """Claims of all installations, as QLoRAJobs and Leases show them."""

    def __init__(self, own: str, reader: InstallationReader, clock: Callable[[], float]) -> None:
        self.own = own
        """This installation; empty outside a cluster."""
        self._reader = reader
        self._clock = clock
        self._namespaces: dict[str, _Namespace] = {}
        self._others: dict[str, OtherInstallation] = {}

    def observe(self, ref: JobRef, claim: object) -> None:
        """Record which installation a QLoRAJob belongs to, as its status says."""
        claim = claim if isinstance(claim, str) else ""
        if claim or ref.namespace in self._namespaces:
            self._namespace(ref).set_claim(ref, claim)
        if claim not in {"", self.own}:
            self._others.setdefault(claim, OtherInstallation())

    def forget(self, ref: JobRef) -> None:
        """Drop a QLoRAJob that was deleted."""
        if known := self._namespaces.get(ref.namespace):
            known.set_claim(ref, "")
            known.waiting.discard(ref)
            if not known.claims and not known.waiting:
                del self._namespaces[ref.namespace]

    def on_write(self, ref: JobRef, claim: str | None) -> None:
        """Record the claim in a status that was written."""
        self.observe(ref, claim)
        if claim and claim == self.own:
            self._namespace(ref).claimed = True

    def claimant(self, namespace: str) -> Claimant:
        """Return this installation, and what it has to consider in a namespace."""
        former = frozenset(name for name in self._others if not self._serves(name, namespace))
        known = self._namespaces.get(namespace)
        claimed = known is not None and (known.claimed or self.own in known.owners)
        contested = bool(self._serving_others(namespace))
        return Claimant(self.own, former, claims_first=bool(self.own) and (contested or not claimed))

    def find_other(self, ref: JobRef) -> str:
        """Return the installation that a QLoRAJob is left to; one without a claim goes to whoever has the namespace."""
        known = self._namespaces.get(ref.namespace)
        if known is None:
            return ""
        claim = known.claims.get(ref, "")
        if claim not in {"", self.own} and self._serves(claim, ref.namespace):
            return claim
        if self.own in known.owners:
            return ""
        return min(self._serving_others(ref.namespace), default="")

    def leave(self, ref: JobRef) -> bool:
        """Record that a QLoRAJob is left to another installation; return whether it is the first of its namespace."""
        waiting = self._namespace(ref).waiting
        first = not waiting
        waiting.add(ref)
        return first

    def left_namespaces(self) -> Iterator[str]:
        """Yield the namespaces in which QLoRAJobs are left to another installation."""
        return (name for name, known in self._namespaces.items() if known.waiting)

    async def follow(self, release: Callable[[JobRef], None]) -> NoReturn:
        """Release QLoRAJobs whose other installation is gone, or no longer watches their namespace."""
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            for ref in await self.refresh():
                release(ref)

    async def refresh(self) -> list[JobRef]:
        """Read the Leases of the other installations; return the QLoRAJobs that are no longer left to them."""
        claiming = {name for known in self._namespaces.values() for name in known.owners}
        self._others = {name: other for name, other in self._others.items() if name in claiming}
        for name, other in list(self._others.items()):
            await self._read(name, other)
        released: list[JobRef] = []
        for known in self._namespaces.values():
            free = [ref for ref in known.waiting if not self.find_other(ref)]
            known.waiting.difference_update(free)
            released += free
        return released

    async def _read(self, name: str, other: OtherInstallation) -> None:
        try:
            lease = await self._reader.read(name)
        except (ApiError, ClusterBusyError) as error:
            if str(error) != other.unreadable:
                _log.warning("the Lease of installation %s cannot be read, so its QLoRAJobs stay its: %s", name, error)
            other.unreadable = str(error)
            return
        if lease != other.lease:
            other.changed_at = self._clock()
        other.lease, other.missing, other.unreadable = lease, lease is None, ""

    def _serves(self, name: str, namespace: str) -> bool:
        return self._others.setdefault(name, OtherInstallation()).serves(namespace, self._clock())

    def _serving_others(self, namespace: str) -> set[str]:
        known = self._namespaces.get(namespace)
        others = set(known.owners) - {self.own} if known else set()
        return {name for name in others if self._serves(name, namespace)}

    def _namespace(self, ref: JobRef) -> _Namespace:
        return self._namespaces.setdefault(ref.namespace, _Namespace())
