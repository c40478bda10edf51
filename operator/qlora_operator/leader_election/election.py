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
from qlora_operator.leader_election.lease import RENEW_DEADLINE, RETRY, Candidate, Lease

_log = logging.getLogger(__name__)

PERIOD: Final = RETRY.total_seconds()
ANSWER: Final = RENEW_DEADLINE.total_seconds() / 2
"""Longest wait for one attempt, so that a lost answer leaves time for another."""
_PASSING: Final = (ClusterBusyError, ApiError, TimeoutError)
"""What a leader bears until its deadline; a refused token is among it, because a new one follows."""


class Leases(Protocol):
    """What an election asks of a cluster."""

    async def read(self) -> Lease | None:
        """Return the record, or nothing before the first leader."""

    async def write(self, lease: Lease) -> Lease:
        """Create or replace the record; ClusterBusyError when somebody else wrote first."""

    async def mark(self, *, leads: bool) -> None:
        """Have the progress Service lead to this replica, or not."""

    async def close(self) -> None:
        """Hang up."""


class LeadershipLostError(Exception):
    """The Lease is somebody else's, or will be before it can be renewed."""


class Election:
    """One replica's part."""

    def __init__(
        self,
        leases: Leases,
        identity: str,
        clock: Callable[[], float],
        utc_now: Callable[[], datetime],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._leases = leases
        self._candidate = Candidate(identity)
        self._clock = clock
        self._utc_now = utc_now
        self._sleep = sleep
        self._held_until = float("-inf")

    def holds(self) -> bool:
        """Whether nobody else can have the Lease now; without it nothing may be written."""
        return self._clock() < self._held_until

    async def win(self) -> None:
        """Wait, as long as it takes, until this replica leads; a refusal is raised."""
        await self._insist(self._stand_by)
        await self._insist(self._take_over)

    async def keep(self) -> NoReturn:
        """Renew until that fails for too long."""
        while True:
            await self._sleep(PERIOD)
            _ = await self._succeeds(self._renew) or await self._succeeds(self._look_and_renew)
            if not self.holds():
                raise LeadershipLostError("the Lease was not renewed in time, or is somebody else's")

    async def resign(self) -> None:
        """Let the next replica lead at once, and hang up; where the API server is away, it has to wait instead."""
        if self.holds():
            _ = await self._succeeds(self._leave) or await self._succeeds(self._look_and_leave)
        self._held_until = float("-inf")
        await self._leases.close()

    async def _insist(self, step: Callable[[], Awaitable[float]]) -> None:
        """Repeat a step until it has nothing to wait for; time helps where the API server is away."""
        wait = PERIOD
        while wait > 0:
            try:
                wait = await step()
            except ClusterBusyError as error:
                _log.info("%s", error)
                wait = PERIOD
            await self._sleep(wait)

    async def _stand_by(self) -> float:
        await self._leases.mark(leads=False)
        _log.info("%s waits to lead", self._candidate.identity)
        return 0

    async def _take_over(self) -> float:
        """Lead if nobody does, or say when to look again."""
        await self._look()
        if wait := self._candidate.wait(self._clock()):
            return min(wait, PERIOD)
        await self._renew()
        await self._leases.mark(leads=True)
        _log.info("%s leads", self._candidate.identity)
        return 0

    async def _look(self) -> None:
        self._candidate.saw(await self._leases.read(), self._clock())

    async def _renew(self) -> None:
        sent = self._clock()
        lease = await self._leases.write(self._candidate.claim(self._utc_now()))
        self._candidate.saw(lease, self._clock())
        self._held_until = sent + RENEW_DEADLINE.total_seconds()

    async def _look_and_renew(self) -> None:
        await self._look()
        if self._candidate.wait(self._clock()):
            self._held_until = float("-inf")
        else:
            await self._renew()

    async def _leave(self) -> None:
        await self._leases.write(self._candidate.resignation(self._utc_now()))

    async def _look_and_leave(self) -> None:
        await self._look()
        if self._candidate.leads:
            await self._leave()

    async def _succeeds(self, step: Callable[[], Awaitable[None]]) -> bool:
        try:
            async with asyncio.timeout(ANSWER):
                await step()
        except _PASSING as error:
            _log.warning("the Lease could not be written: %r", error)
            return False
        return True


@asynccontextmanager
async def leading(election: Election | None) -> AsyncIterator[None]:
    """Lead from the beginning to the end of the block; without an election there is nobody else."""
    if election is None:
        yield
        return
    keeper: asyncio.Task[NoReturn] | None = None
    try:
        await election.win()
        keeper = asyncio.create_task(election.keep(), name="lease")
        keeper.add_done_callback(_end_process)
        yield
    finally:
        if keeper is not None:
            keeper.cancel()
        await election.resign()


def _end_process(keeper: asyncio.Task[NoReturn]) -> None:
    """Leave at once: an orderly end could take longer than the Lease has left."""
    if not keeper.cancelled():
        _log.critical("leaves, since it no longer leads: %r", keeper.exception())
        os._exit(1)
