"""The operator dies at every write: before the API server has it, and before the operator knows that it was taken.

The method is Sieve's (Sun et al., OSDI 2022): a reference run tells which writes there are, and each of them is a
moment to die at; what is left in the end must not depend on it.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Final, Literal

import pytest
from aiohttp import web

from tests.chaos.promises import Dose, promise
from tests.chaos.proxy import Call, ConnectionDropped
from tests.chaos.scenario_runner import ScenarioRunner, WriteRecorder
from tests.chaos.scenarios import SCENARIOS
from tests.integration.operator_process import Operator

Side = Literal["before", "after"]
SIDES: Final[tuple[Side, ...]] = ("before", "after")
REFERENCES: Final = 3
"""Undisturbed runs; what each of them writes must come again: a state that is over soon is not told of in every run."""
PARALLEL_RUNS: Final = 8
"""How often a run is repeated until the write comes again in it."""


@dataclass(frozen=True)
class KillPoint:
    """A write of the reference run, and on which side of it the operator dies."""

    write: str
    count: int
    """The same may be written more than once: the how manieth one it is."""
    side: Side

    def __str__(self) -> str:
        return f"{self.side} {self.write} ({self.count})"


class KillOperator(WriteRecorder):
    """Kills an operator at one of its writes, and starts it again."""

    def __init__(self, operator: Operator, moment: KillPoint) -> None:
        super().__init__()
        self._operator = operator
        self._moment = moment
        self._fatal: Call | None = None
        self._restart: asyncio.Task[Operator] | None = None

    @property
    def killed(self) -> bool:
        """Whether the moment came: a state that is over soon may not be told of in this run."""
        return self._restart is not None

    async def before(self, call: Call) -> web.Response | None:
        known = len(self.writes)
        await super().before(call)
        came = self.writes[known:] == [self._moment.write] and self.writes.count(self._moment.write)
        if came == self._moment.count and self._fatal is None:
            self._fatal = call
            await self._die(call, "before")
        return None

    async def after(self, call: Call, status: int) -> None:
        await super().after(call, status)
        await self._die(call, "after")

    async def finish(self) -> None:
        if self._restart:
            await self._restart

    async def _die(self, call: Call, side: Side) -> None:
        if call is self._fatal and side == self._moment.side:
            await asyncio.to_thread(self._operator.kill)
            self._restart = asyncio.create_task(asyncio.to_thread(self._operator.start))
            raise ConnectionDropped


@promise(
    fault="The operator is killed at any of its API writes",
    promise="The run ends as if nothing had happened: the same status and children, no duplicate Event or Job.",
    how="A proxy numbers all writes of a run; for each, SIGKILL before and after it reaches the API server.",
)
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("title", SCENARIOS)
def test_operator_killed_at_any_write_same_outcome(
    title: str, runner: ScenarioRunner, dose: Dose, outcome: Callable[[str], None]
) -> None:
    recorders = [WriteRecorder() for _ in range(REFERENCES)]
    reference, *others = [runner.run(title, recorder) for recorder in recorders]
    assert [reference.differences(other) for other in others] == [[]] * len(others)
    writes = recorders[0].writes
    steady = reduce(and_, (Counter(recorder.writes) for recorder in recorders))
    moments = [
        KillPoint(write, writes[: number + 1].count(write), side)
        for number, write in enumerate(writes)
        for side in SIDES
    ]
    cases = choose(moments, dose(short=2, full=len(moments)))
    differences: dict[str, list[str]] = {}
    missed: list[KillPoint] = []
    for moment in cases:
        for _ in range(PARALLEL_RUNS):
            death = KillOperator(runner.operator, moment)
            if found := reference.differences(runner.run(title, death)):
                differences[str(moment)] = found
            if death.killed:
                break
        else:
            missed.append(moment)
    died = len(cases) - len(missed)
    never = f", {len(missed)} moments did not recur" if missed else ""
    outcome(f"{title}: {died - len(differences)} of {died} kills at {len(writes)} writes{never}")
    assert differences == {}
    assert [moment for moment in missed if moment.count <= steady[moment.write]] == []


def choose(moments: list[KillPoint], most: int) -> list[KillPoint]:
    """Return some moments, spread evenly."""
    step = len(moments) / most
    return [moments[int((index + 0.5) * step)] for index in range(most)]
