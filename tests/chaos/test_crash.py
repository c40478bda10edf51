"""The operator dies at every write: before the API server has it, and before the operator knows that it was taken.

The method is Sieve's (Sun et al., OSDI 2022): a reference run tells which writes there are, and each of them is a
moment to die at; what is left in the end must not depend on it.
"""

import asyncio
from collections.abc import Callable
from typing import Literal

import pytest
from aiohttp import web

from tests.chaos.promises import Dose, promise
from tests.chaos.proxy import Call, Cut
from tests.chaos.stage import Stage, Witness
from tests.chaos.stories import STORIES
from tests.integration.operator_process import Operator

Side = Literal["before", "after"]


class Death(Witness):
    """Kills an operator at one of its writes, and starts it again."""

    def __init__(self, operator: Operator, number: int, side: Side) -> None:
        super().__init__()
        self._operator = operator
        self._number = number
        self._side = side
        self._fatal: Call | None = None
        self._restart: asyncio.Task[Operator] | None = None

    async def before(self, call: Call) -> web.Response | None:
        known = len(self.writes)
        await super().before(call)
        if known < len(self.writes) == self._number:
            self._fatal = call
            await self._die(call, "before")
        return None

    async def after(self, call: Call, status: int) -> None:
        await super().after(call, status)
        await self._die(call, "after")

    async def finish(self) -> None:
        assert self._restart, f"there were only these writes: {self.writes}"
        await self._restart

    async def _die(self, call: Call, side: Side) -> None:
        if call is self._fatal and side == self._side:
            await asyncio.to_thread(self._operator.kill)
            self._restart = asyncio.create_task(asyncio.to_thread(self._operator.start))
            raise Cut


@promise(
    fault="The operator is killed at any of its writes",
    promise="The run ends as if nothing had happened: the same status and children, no Event and no Job twice.",
    how="A proxy numbers the writes of a whole life; for each, SIGKILL before and after the API server has it.",
)
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("title", STORIES)
def test_a_death_at_any_write_changes_nothing(
    title: str, stage: Stage, dose: Dose, outcome: Callable[[str], None]
) -> None:
    witness = Witness()
    reference = stage.play(title, witness)
    moments: list[tuple[int, Side]] = [
        (number, side) for number in range(1, len(witness.writes) + 1) for side in ("before", "after")
    ]
    cases = choose(moments, dose(short=2, full=len(moments)))
    differences: dict[str, list[str]] = {}
    for number, side in cases:
        death = Death(stage.operator, number, side)
        if found := reference.differences(stage.play(title, death)):
            differences[f"{side} {number}: {death.writes[number - 1]}"] = found
    outcome(f"{title}: {len(cases) - len(differences)} of {len(cases)} deaths at {len(witness.writes)} writes")
    assert differences == {}


def choose(moments: list[tuple[int, Side]], most: int) -> list[tuple[int, Side]]:
    """Return some moments, spread evenly."""
    step = len(moments) / most
    return [moments[int((index + 0.5) * step)] for index in range(most)]
