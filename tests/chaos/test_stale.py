"""Late, lost and repeated watch events: Sieve's stale and unobserved states."""

import asyncio
import random
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from typing import Final

import pytest

from tests.chaos.promises import Dose, promise
from tests.chaos.proxy import Event
from tests.chaos.scenario_runner import ScenarioRunner, WriteRecorder

STEPS: Final = 8
"""Longest chain of events that a step of a scenario waits for."""
LOSS: Final = 0.5
"""Share of the events that get lost."""


class Late(WriteRecorder):
    """Every event is delayed."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    async def deliver(self, event: Event) -> AsyncIterator[bytes]:
        await asyncio.sleep(max(event.received_at + self._seconds - time.monotonic(), 0))
        yield event.line


class Lossy(WriteRecorder):
    """Half of the events are dropped; bookmarks are delivered, so that the loss goes unnoticed."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.lost = 0
        self._chance = chance

    async def deliver(self, event: Event) -> AsyncIterator[bytes]:
        if b'"BOOKMARK"' not in event.line and self._chance.random() < LOSS:
            self.lost += 1
        else:
            yield event.line


class Repeating(WriteRecorder):
    """After every event, some that came before it are replayed."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.repeated = 0
        self._chance = chance
        self._seen: dict[str, deque[bytes]] = defaultdict(lambda: deque(maxlen=20))

    async def deliver(self, event: Event) -> AsyncIterator[bytes]:
        yield event.line
        past = self._seen[event.call.path]
        for old in self._chance.sample(list(past), min(len(past), 3)):
            self.repeated += 1
            yield old
        past.append(event.line)


@promise(
    fault="Watch events come 30 seconds late",
    promise="The run ends normally, only later; no Job is created twice.",
    how="The proxy delays every event of every watch (3 seconds in `make test`).",
)
@pytest.mark.timeout(1800)
def test_delayed_watch_events_same_outcome(runner: ScenarioRunner, dose: Dose, outcome: Callable[[str], None]) -> None:
    titles = ["interrupted"] if dose(short=0, full=1) else ["published"]
    seconds = dose(short=3, full=30)
    for title in titles:
        reference = runner.run(title, WriteRecorder())
        runner.patience += STEPS * seconds
        late = runner.run(title, Late(seconds))
        assert reference.differences(late) == []
        outcome(f"{title}: {seconds} s late, {sum(late.created.values())} Jobs as in the reference")


@promise(
    fault="Half of all watch events are lost",
    promise="The run ends normally, with the next resync at the latest; no Job is created twice.",
    how="The proxy drops events at random; resync every 5 seconds instead of 10 minutes.",
)
@pytest.mark.timeout(1800)
def test_dropped_watch_events_same_outcome(runner: ScenarioRunner, dose: Dose, outcome: Callable[[str], None]) -> None:
    reference = runner.run("interrupted", WriteRecorder())
    lost = 0
    for seed in range(dose(short=1, full=10)):
        lossy = Lossy(random.Random(seed))
        assert reference.differences(runner.run("interrupted", lossy)) == []
        lost += lossy.lost
    outcome(f"{lost} events lost in {seed + 1} runs")
    assert lost > 0


@promise(
    fault="Watch events are replayed, old ones after new ones",
    promise="The run ends normally; no Job is created twice, and nothing that has ended starts again.",
    how="After every event the proxy replays up to three of the last twenty of the same watch.",
)
@pytest.mark.timeout(1800)
def test_repeated_watch_events_same_outcome(runner: ScenarioRunner, dose: Dose, outcome: Callable[[str], None]) -> None:
    reference = runner.run("interrupted", WriteRecorder())
    repeated = 0
    for seed in range(dose(short=1, full=10)):
        repeating = Repeating(random.Random(seed))
        assert reference.differences(runner.run("interrupted", repeating)) == []
        repeated += repeating.repeated
    outcome(f"{repeated} events replayed in {seed + 1} runs")
    assert repeated > 0
