"""Leader election: the rules as a table, and one replica with an in-memory Lease."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count

import pytest
from kubernetes.aio import client

from qlora_operator.cluster.http import Api
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.leader_election.election import LeaderElector, LeadershipLostError
from qlora_operator.leader_election.lease import (
    LEASE_DURATION,
    RELEASED_DURATION,
    RENEW_DEADLINE,
    RETRY_PERIOD,
    Candidate,
    Lease,
)
from tests.make import NOW

DURATION = LEASE_DURATION.total_seconds()
DEADLINE = RENEW_DEADLINE.total_seconds()
EARLIER = NOW - timedelta(hours=1)
MINE, OTHER = "operator-a", "operator-b"
RUNNING = Lease(OTHER, acquired_at=EARLIER, renewed_at=EARLIER, transitions=3, version="7")


class Clock:
    """A clock that goes on only when somebody sleeps, or when an answer takes its time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps.append(seconds)
        assert len(self.sleeps) < 100, "nothing comes of this"


class FakeLeaseLock:
    """An API server with one Lease; `before` sees every call, and may fail it or change what it finds."""

    def __init__(self, clock: Clock, lease: Lease | None = None) -> None:
        self.lease = lease
        self.marks: list[bool] = []
        self.closed = False
        self.calls: list[str] = []
        self.before: Callable[[str], None] = lambda _: None
        self._clock = clock
        self._versions = count(100)

    async def read(self) -> Lease | None:
        self._called("read")
        return self.lease

    async def write(self, lease: Lease) -> Lease:
        self._called("write")
        if lease.version != (self.lease.version if self.lease else ""):
            raise ClusterBusyError("the Lease has changed since it was read")
        self.lease = replace(lease, version=str(next(self._versions)))
        return self.lease

    async def set_leader_label(self, *, is_leader: bool) -> None:
        self._called("mark")
        self.marks.append(is_leader)

    async def close(self) -> None:
        self.closed = True

    def renew_by(self, holder: str) -> None:
        """Somebody else renews."""
        at = NOW + timedelta(seconds=self._clock.now)
        self.lease = replace(self.lease or Lease(), holder=holder, renewed_at=at, version=str(next(self._versions)))

    def _called(self, what: str) -> None:
        self.calls.append(what)
        self.before(what)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_elector(leases: FakeLeaseLock, clock: Clock) -> LeaderElector:
    return LeaderElector(leases, MINE, clock, lambda: datetime.fromtimestamp(clock.now, UTC), clock.sleep)


@pytest.mark.parametrize(
    ("lease", "since_change", "expected"),
    [
        pytest.param(None, 0, 0, id="nobody-led-yet"),
        pytest.param(Lease(MINE), 0, 0, id="mine-from-before-a-restart"),
        pytest.param(replace(RUNNING, holder=""), 0, 0, id="given-back"),
        pytest.param(RUNNING, 0, DURATION, id="somebody-else-s"),
        pytest.param(RUNNING, 5, DURATION - 5, id="somebody-else-s-for-a-while"),
        pytest.param(RUNNING, DURATION, 0, id="left-behind"),
        pytest.param(replace(RUNNING, renewed_at=NOW + timedelta(days=1)), DURATION, 0, id="by-a-clock-ahead"),
        pytest.param(replace(RUNNING, renewed_at=NOW - timedelta(days=1)), 0, DURATION, id="by-a-clock-behind"),
        pytest.param(replace(RUNNING, duration=timedelta(seconds=60)), 50, 10, id="by-its-own-duration"),
    ],
)
def test_lease_seconds_until_free(lease: Lease | None, since_change: float, expected: float) -> None:
    candidate = Candidate(MINE)
    candidate.observe(lease, 100)
    candidate.observe(lease, 100 + since_change)
    assert candidate.seconds_until_free(100 + since_change) == expected


def test_label_change_is_no_lease_renewal() -> None:
    candidate = Candidate(MINE)
    candidate.observe(RUNNING, 100)
    candidate.observe(replace(RUNNING, version="8"), 105)
    assert candidate.seconds_until_free(105) == DURATION - 5
    assert candidate.leader_record(NOW).version == "8"


@pytest.mark.parametrize(
    ("lease", "expected"),
    [
        (None, Lease(MINE, LEASE_DURATION, NOW, NOW, 0)),
        (RUNNING, Lease(MINE, LEASE_DURATION, NOW, NOW, 4)),
        (replace(RUNNING, holder="", duration=RELEASED_DURATION), Lease(MINE, LEASE_DURATION, NOW, NOW, 4)),
        (replace(RUNNING, holder=MINE), Lease(MINE, LEASE_DURATION, EARLIER, NOW, 3)),
    ],
)
def test_leader_record_counts_transitions(lease: Lease | None, expected: Lease) -> None:
    candidate = Candidate(MINE)
    candidate.observe(lease, 100)
    assert candidate.leader_record(NOW) == expected


async def test_first_replica_becomes_leader_at_once(clock: Clock) -> None:
    leases = FakeLeaseLock(clock)
    election = make_elector(leases, clock)
    assert not election.is_leader()
    await election.acquire()
    assert election.is_leader()
    assert leases.lease is not None
    assert (leases.lease.holder, leases.marks, sum(clock.sleeps)) == (MINE, [False, True], 0)


async def test_standby_waits_while_leader_renews(clock: Clock) -> None:
    leases = FakeLeaseLock(clock, RUNNING)
    last = clock.now + 60

    def renew(what: str) -> None:
        if what == "read" and clock.now < last:
            leases.renew_by(OTHER)

    leases.before = renew
    await make_elector(leases, clock).acquire()
    assert last + DURATION - RETRY_PERIOD.total_seconds() <= clock.now <= last + DURATION


async def test_two_candidates_one_acquires(clock: Clock) -> None:
    leases = FakeLeaseLock(clock)
    leases.before = lambda what: leases.renew_by(OTHER) if what == "write" and len(leases.calls) == 3 else None
    await make_elector(leases, clock).acquire()
    assert clock.now >= 1000 + DURATION


async def test_unavailable_api_server_is_waited_for(clock: Clock) -> None:
    leases = FakeLeaseLock(clock)

    def fail(_: str) -> None:
        if clock.now < 1010:
            raise ClusterBusyError("away")

    leases.before = fail
    await make_elector(leases, clock).acquire()
    assert clock.now == 1010


async def test_failing_renewal_raises_leadership_lost(clock: Clock) -> None:
    leases = FakeLeaseLock(clock)
    election = make_elector(leases, clock)
    await election.acquire()

    def fail(_: str) -> None:
        if clock.now >= 1060:
            raise ClusterBusyError("away")

    leases.before = fail
    with pytest.raises(LeadershipLostError):
        await election.renew_until_lost()
    last = 1058
    assert last + DEADLINE <= clock.now < last + DURATION
    assert not election.is_leader()


async def test_one_failed_renewal_keeps_leadership(clock: Clock) -> None:
    leases = FakeLeaseLock(clock)
    election = make_elector(leases, clock)
    await election.acquire()
    leases.before = lambda what: _raise(TimeoutError()) if what == "write" and clock.now == 1004 else None
    leases.calls.clear()
    with pytest.raises(AssertionError, match="nothing comes of this"):
        await election.renew_until_lost()
    assert leases.calls[:5] == ["write", "write", "read", "write", "write"]


async def test_lease_with_other_holder_raises_leadership_lost(clock: Clock) -> None:
    leases = FakeLeaseLock(clock)
    election = make_elector(leases, clock)
    await election.acquire()
    leases.renew_by(OTHER)
    with pytest.raises(LeadershipLostError):
        await election.renew_until_lost()
    assert clock.now == 1000 + RETRY_PERIOD.total_seconds()


async def test_deleted_lease_is_recreated(clock: Clock) -> None:
    leases = FakeLeaseLock(clock)
    election = make_elector(leases, clock)
    await election.acquire()
    leases.lease = None
    with pytest.raises(AssertionError, match="nothing comes of this"):
        await election.renew_until_lost()
    assert leases.lease.holder == MINE


async def test_released_lease_is_free_at_once(clock: Clock) -> None:
    leases = FakeLeaseLock(clock)
    election = make_elector(leases, clock)
    await election.acquire()
    await election.release()
    assert leases.lease is not None
    assert (leases.lease.holder, election.is_leader(), leases.closed) == ("", False, True)
    start = clock.now
    await make_elector(leases, clock).acquire()
    assert clock.now == start


async def test_standby_releases_nothing(clock: Clock) -> None:
    leases = FakeLeaseLock(clock, RUNNING)
    await make_elector(leases, clock).release()
    assert (leases.lease, leases.calls, leases.closed) == (RUNNING, [], True)


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
async def test_standby_refuses_writes(method: str) -> None:
    api = Api(client.Configuration(), may_write=lambda: False)
    with pytest.raises(ClusterBusyError, match="not the leader"):
        await api.request(method, "/api/v1/namespaces/ml/configmaps/any")
    await api.close()
