"""Leader election: one replica reconciles, and the others stand by for its Lease.

A replica that loses the Lease exits, since nothing guarantees that all of its work has stopped. Reconciles in progress
are safe: names of children are derived, and a status is written only on the resourceVersion that was read.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final, NoReturn, Protocol

from qlora_operator.cluster.http import ApiError
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.leader_election.lease import RENEW_DEADLINE, RETRY_PERIOD, Candidate, Lease

_log = logging.getLogger(__name__)

RETRY_SECONDS: Final = RETRY_PERIOD.total_seconds()
CALL_TIMEOUT_SECONDS: Final = RENEW_DEADLINE.total_seconds() / 2
"""Timeout of one call, so that a lost response leaves time for another call."""
_TRANSIENT_ERRORS: Final = (ClusterBusyError, ApiError, TimeoutError)
"""Errors that a leader retries until the renew deadline; ApiError is one, since a rejected token is replaced."""


class LeaseLock(Protocol):
    """Access to the Lease and to the leader label."""

    async def read(self) -> Lease | None:
        """Return the record, or None before the first leader."""

    async def write(self, lease: Lease) -> Lease:
        """Create or replace the record; ClusterBusyError if another replica wrote first."""

    async def set_leader_label(self, *, is_leader: bool) -> None:
        """Set or remove the label by which the progress Service selects this replica."""

    async def close(self) -> None:
        """Close the connection."""


class LeadershipLostError(Exception):
    """Another replica holds the Lease, or may hold it before it can be renewed."""


class LeaderElector:
    """The part of one replica in the election, as in client-go."""

    def __init__(
        self,
        leases: LeaseLock,
        identity: str,
        clock: Callable[[], float],
        utc_now: Callable[[], datetime],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._lock = leases
        self._candidate = Candidate(identity)
        self._clock = clock
        self._utc_now = utc_now
        self._sleep = sleep
        self._held_until = float("-inf")

    def is_leader(self) -> bool:
        """Return whether this replica certainly holds the Lease; otherwise it must not write."""
        return self._clock() < self._held_until

    async def acquire(self) -> None:
        """Wait until this replica is the leader; ApiError is raised, not retried."""
        await self._retry_until_done(self._stand_by)
        await self._retry_until_done(self._try_acquire)

    async def renew_until_lost(self) -> NoReturn:
        """Renew the Lease until that has failed for RENEW_DEADLINE, then raise LeadershipLostError."""
        while True:
            await self._sleep(RETRY_SECONDS)
            _ = await self._try_once(self._renew) or await self._try_once(self._read_and_renew)
            if not self.is_leader():
                raise LeadershipLostError("the Lease was not renewed in time, or another replica holds it")

    async def release(self) -> None:
        """Release the Lease, so that the next replica need not wait for it to expire, and close the connection."""
        if self.is_leader():
            _ = await self._try_once(self._release_lease) or await self._try_once(self._read_and_release)
        self._held_until = float("-inf")
        await self._lock.close()

    async def _retry_until_done(self, step: Callable[[], Awaitable[float]]) -> None:
        """Repeat a step until it returns 0, its delay in seconds; ClusterBusyError is retried."""
        wait = RETRY_SECONDS
        while wait > 0:
            try:
                wait = await step()
            except ClusterBusyError as error:
                _log.info("%s", error)
                wait = RETRY_SECONDS
            await self._sleep(wait)

    async def _stand_by(self) -> float:
        await self._lock.set_leader_label(is_leader=False)
        _log.info("%s is standing by", self._candidate.identity)
        return 0

    async def _try_acquire(self) -> float:
        """Take the Lease if it is free; return the seconds until the next try, or 0."""
        await self._read_lease()
        if wait := self._candidate.seconds_until_free(self._clock()):
            return min(wait, RETRY_SECONDS)
        await self._renew()
        await self._lock.set_leader_label(is_leader=True)
        _log.info("%s became leader", self._candidate.identity)
        return 0

    async def _read_lease(self) -> None:
        self._candidate.observe(await self._lock.read(), self._clock())

    async def _renew(self) -> None:
        sent = self._clock()
        lease = await self._lock.write(self._candidate.leader_record(self._utc_now()))
        self._candidate.observe(lease, self._clock())
        self._held_until = sent + RENEW_DEADLINE.total_seconds()

    async def _read_and_renew(self) -> None:
        await self._read_lease()
        if self._candidate.seconds_until_free(self._clock()):
            self._held_until = float("-inf")
        else:
            await self._renew()

    async def _release_lease(self) -> None:
        await self._lock.write(self._candidate.released_record(self._utc_now()))

    async def _read_and_release(self) -> None:
        await self._read_lease()
        if self._candidate.is_leader:
            await self._release_lease()

    async def _try_once(self, step: Callable[[], Awaitable[None]]) -> bool:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
                await step()
        except _TRANSIENT_ERRORS as error:
            _log.warning("cannot write the Lease: %r", error)
            return False
        return True


@asynccontextmanager
async def leadership(elector: LeaderElector | None) -> AsyncIterator[None]:
    """Hold the leadership while the block runs; without an elector, do nothing."""
    if elector is None:
        yield
        return
    renewal: asyncio.Task[NoReturn] | None = None
    try:
        await elector.acquire()
        renewal = asyncio.create_task(elector.renew_until_lost(), name="lease")
        renewal.add_done_callback(_end_process)
        yield
    finally:
        if renewal is not None:
            renewal.cancel()
        await elector.release()


def _end_process(task: asyncio.Task[NoReturn]) -> None:
    """Exit at once: an orderly shutdown could outlast the Lease."""
    if not task.cancelled():
        _log.critical("lost leadership, exiting: %r", task.exception())
        os._exit(1)
