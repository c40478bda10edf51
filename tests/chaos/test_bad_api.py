"""Faults of the API server: unavailable, slow, overloaded, conflicting, expiring or silent watches; same outcomes."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Final

import pytest
from aiohttp import web

from tests.chaos.promises import Dose, promise
from tests.chaos.proxy import Call, ConnectionDropped, Event
from tests.chaos.scenario_runner import ScenarioRunner, WriteRecorder
from tests.chaos.supervision import supervised
from tests.integration.operator_process import Operator, write_kubeconfig

GONE: Final = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired", "code": 410}


class RecordedFault(WriteRecorder):
    """Counts the faults that it injected."""

    def __init__(self) -> None:
        super().__init__()
        self.harm = 0


class Unreachable(RecordedFault):
    """After the first write, requests and watches are dropped for a while."""

    def __init__(self, seconds: int) -> None:
        super().__init__()
        self._seconds = seconds
        self._until = 0.0

    async def before(self, call: Call) -> web.Response | None:
        await super().before(call)
        if self.writes and not self._until:
            self._until = time.monotonic() + self._seconds
        if time.monotonic() < self._until:
            self.harm += 1
            raise ConnectionDropped
        return None

    async def deliver(self, event: Event) -> AsyncIterator[bytes]:
        if time.monotonic() < self._until:
            raise ConnectionDropped
        yield event.line


class Slow(RecordedFault):
    """Every response is delayed."""

    def __init__(self, seconds: int) -> None:
        super().__init__()
        self._seconds = seconds

    async def before(self, call: Call) -> web.Response | None:
        await super().before(call)
        if not call.is_watch:
            self.harm += 1
            await asyncio.sleep(self._seconds)
        return None


class Overloaded(RecordedFault):
    """Every write is rejected a number of times with Retry-After."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.too_early = 0
        self._times = times
        self._refused: Counter[str] = Counter()
        self._last: dict[str, float] = {}

    async def before(self, call: Call) -> web.Response | None:
        await super().before(call)
        if not (call.is_write and self.is_own(call)):
            return None
        self.too_early += time.monotonic() - self._last.get(call.path, 0.0) < 1.0
        if self._refused[call.path] >= self._times:
            self._refused[call.path] = 0
            self._last.pop(call.path, None)
            return None
        self.harm += 1
        self._refused[call.path] += 1
        self._last[call.path] = time.monotonic()
        return web.json_response({"reason": "TooManyRequests"}, status=429, headers={"Retry-After": "1"})


class Contested(RecordedFault):
    """The first attempt of every write gets a conflict."""

    def __init__(self, _: int) -> None:
        super().__init__()
        self._met: set[tuple[str, str, str]] = set()

    async def before(self, call: Call) -> web.Response | None:
        await super().before(call)
        if not (call.is_write and self.is_own(call)):
            return None
        name = json.loads(call.body)["metadata"]["name"] if call.method == "POST" else ""
        key = (call.method, call.path, name)
        if key in self._met:
            if call.method != "POST":  # the next one to this path is another write
                self._met.discard(key)
            return None
        self.harm += 1
        self._met.add(key)
        return web.json_response({"reason": "Conflict", "message": "the object has been modified"}, status=409)


class Forgetful(RecordedFault):
    """Watches end with 410 after a few events, in the stream or on connect."""

    refuses_watches = True

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._asked: Counter[str] = Counter()
        self._delivered: Counter[str] = Counter()

    async def before(self, call: Call) -> web.Response | None:
        await super().before(call)
        self._asked[call.path] += call.is_watch
        if call.is_watch and self._asked[call.path] % 3 == 2:
            self.harm += 1
            return web.json_response(GONE, status=410)
        return None

    async def deliver(self, event: Event) -> AsyncIterator[bytes]:
        self._delivered[event.call.path] += 1
        if self._delivered[event.call.path] % self._limit:
            yield event.line
        else:
            self.harm += 1
            yield json.dumps({"type": "ERROR", "object": GONE}).encode() + b"\n"
            raise ConnectionDropped


class Silent(RecordedFault):
    """Watches stay open, and deliver nothing for a while."""

    def __init__(self, seconds: int) -> None:
        super().__init__()
        self._until = time.monotonic() + seconds

    async def deliver(self, event: Event) -> AsyncIterator[bytes]:
        if time.monotonic() >= self._until:
            yield event.line
        else:
            self.harm += 1


CASES = [
    pytest.param(
        Unreachable, (5, 60), id="away",
        marks=promise(
            fault="The API server is down for a minute",
            promise="Nothing is lost: the operator continues when it is back, and the run ends normally.",
            how="The proxy cuts every request and every watch (for 5 seconds in `make test`).",
        ),
    ),
    pytest.param(
        Slow, (1, 3), id="slow",
        marks=promise(
            fault="The API server takes 3 seconds for every response",
            promise="The run takes longer, and ends normally.",
            how="The proxy delays every response (by 1 second in `make test`).",
        ),
    ),
    pytest.param(
        Overloaded, (1, 2), id="overloaded",
        marks=promise(
            fault="The API server rejects writes with 429 and Retry-After",
            promise="The operator honors Retry-After, and the run ends normally.",
            how="The proxy rejects each write twice (once in `make test`).",
        ),
    ),
    pytest.param(
        Contested, (1, 1), id="contested",
        marks=promise(
            fault="Every write gets a conflict (409)",
            promise="The operator reads again and retries; no Job is created twice.",
            how="The proxy answers 409 to the first attempt of each write.",
        ),
    ),
    pytest.param(
        Forgetful, (3, 3), id="forgetful",
        marks=promise(
            fault="Watches end with 410 Gone, in the stream or on connect",
            promise="The operator lists again, after a restart if necessary; the run ends normally.",
            how="The proxy ends every watch after 3 events, and rejects every third one.",
        ),
    ),
    pytest.param(
        Silent, (10, 90), id="silent",
        marks=promise(
            fault="Watches stay open and deliver nothing",
            promise="The resync finds what they missed, and the run ends normally.",
            how="The proxy swallows every event for 90 seconds (10 in `make test`), with a resync every 5 seconds.",
        ),
    ),
]  # fmt: skip


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("fault", "doses"), CASES)
def test_api_server_fault_leaves_runs_complete(
    fault: Callable[[int], RecordedFault],
    doses: tuple[int, int],
    runner: ScenarioRunner,
    dose: Dose,
    outcome: Callable[[str], None],
) -> None:
    title = ["refused", "interrupted"][dose(short=0, full=1)]
    reference = runner.run(title, WriteRecorder())
    start = time.monotonic()
    recorder = fault(dose(short=doses[0], full=doses[1]))
    with supervised(runner.operator) as supervisor:
        assert reference.differences(runner.run(title, recorder)) == []
    seconds = time.monotonic() - start
    assert recorder.harm > 0
    if isinstance(recorder, Overloaded):
        assert recorder.too_early == 0
    outcome(
        f"{title} in {seconds:.0f} s, {recorder.harm} faults injected, {supervisor.restarts} restarts of the operator"
    )


class Expired(WriteRecorder):
    """The token of the start is rejected from some write on."""

    def __init__(self, operator: Operator, number: int) -> None:
        super().__init__()
        self.refused = 0
        self._operator = operator
        self._number = number
        self._old = ""

    async def before(self, call: Call) -> web.Response | None:
        await super().before(call)
        if len(self.writes) >= self._number and not self._old:
            self._old = call.token
            write_kubeconfig(self._operator.cluster, self._operator.kubeconfig, self._operator.server)
        if call.token != self._old:
            return None
        self.refused += 1
        return web.json_response({"reason": "Unauthorized"}, status=401)


@promise(
    fault="The operator's token expires during a run",
    promise="The operator reads the new one, after a restart if necessary; the run ends normally.",
    how="The proxy rejects the old token with 401 from the sixth write on; the file has a new one.",
)
def test_expired_token_same_outcome(runner: ScenarioRunner, outcome: Callable[[str], None]) -> None:
    reference = runner.run("published", WriteRecorder())
    expired = Expired(runner.operator, 6)
    with supervised(runner.operator) as supervisor:
        assert reference.differences(runner.run("published", expired)) == []
    assert expired.refused > 0
    outcome(f"{expired.refused} requests rejected, {supervisor.restarts} restarts of the operator")
