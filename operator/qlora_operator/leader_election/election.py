"""Leader election: of several replicas one works, and the others wait for its Lease.

A replica that has lost the Lease ends its process: there is no way back from a leader that half works. What it had
under way is safe all the same: children have derived names, and a status is written on the version that was read.
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
"""Longest wait for one attempt, so that a lost answer leaves time for another."""
_TRANSIENT_ERRORS: Final = (ClusterBusyError, ApiError, TimeoutError)
"""What a leader bears until its deadline; a refused token is among it, because a new one follows."""


class LeaseLock(Protocol):
    """What an election asks of a cluster."""

    async def read(self) -> Lease | None:
        """Return the record, or nothing before the first leader."""

    async def write(self, lease: Lease) -> Lease:
        """Create or replace the record; ClusterBusyError when somebody else wrote first."""

    async def set_leader_label(self, *, is_leader: bool) -> None:
        """Have the progress Service lead to this replica, or not."""

    async def close(self) -> None:
        """Hang up."""


class LeadershipLostError(Exception):
    """The Lease is somebody else's, or will be before it can be renewed."""


class LeaderElector:
    """One replica's part."""

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
        """Whether nobody else can have the Lease now; without it nothing may be written."""
        return self._clock() < self._held_until

    async def acquire(self) -> None:
        """Wait, as long as it takes, until this replica leads; a refusal is raised."""
        await self._retry_until_done(self._stand_by)
        await self._retry_until_done(self._try_acquire)

    async def renew_until_lost(self) -> NoReturn:
        """Renew until that fails for too long."""
        while True:
            await self._sleep(RETRY_SECONDS)
            _ = await self._try_once(self._renew) or await self._try_once(self._read_and_renew)
            if not self.is_leader():
                raise LeadershipLostError("the Lease was not renewed in time, or is somebody else's")

    async def release(self) -> None:
        """Let the next replica lead at once, and hang up; where the API server is away, it has to wait instead."""
        if self.is_leader():
            _ = await self._try_once(self._release_lease) or await self._try_once(self._read_and_release)
        self._held_until = float("-inf")
        await self._lock.close()

    async def _retry_until_done(self, step: Callable[[], Awaitable[float]]) -> None:
        """Repeat a step until it has nothing to wait for; time helps where the API server is away."""
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
        _log.info("%s waits to lead", self._candidate.identity)
        return 0

    async def _try_acquire(self) -> float:
        """Lead if nobody does, or say when to look again."""
        await self._read_lease()
        if wait := self._candidate.seconds_until_free(self._clock()):
            return min(wait, RETRY_SECONDS)
        await self._renew()
        await self._lock.set_leader_label(is_leader=True)
        _log.info("%s leads", self._candidate.identity)
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
            _log.warning("the Lease could not be written: %r", error)
            return False
        return True


@asynccontextmanager
async def leadership(elector: LeaderElector | None) -> AsyncIterator[None]:
    """Lead from the beginning to the end of the block; without an election there is nobody else."""
    if elector is None:
        yield
        return
    keeper: asyncio.Task[NoReturn] | None = None
    try:
        await elector.acquire()
        keeper = asyncio.create_task(elector.renew_until_lost(), name="lease")
        keeper.add_done_callback(_end_process)
        yield
    finally:
        if keeper is not None:
            keeper.cancel()
        await elector.release()


def _end_process(task: asyncio.Task[NoReturn]) -> None:
    """Leave at once: an orderly end could take longer than the Lease has left."""
    if not task.cancelled():
        _log.critical("leaves, since it no longer leads: %r", task.exception())
        os._exit(1)
