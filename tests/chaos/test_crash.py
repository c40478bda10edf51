"""The operator dies at every write: before the API server has it, and before the operator knows that it was taken.

The method is Sieve's (Sun et al., OSDI 2022): a reference run tells which writes there are, and each of them is a
moment to die at; what is left in the end must not depend on it.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from aiohttp import web

from tests.chaos.promises import Dose, promise
from tests.chaos.proxy import Call, Cut, Fault, Proxy
from tests.chaos.snapshot import compare, take_snapshot
from tests.chaos.stories import STORIES
from tests.cluster.cluster import Cluster
from tests.integration.operator_process import Operator, open_place

Side = Literal["before", "after"]


class Death(Fault):
    """Numbers what an operator writes to one namespace, and kills it at one number; 0 lets it live."""

    def __init__(self, operator: Operator, namespace: str, number: int = 0, side: Side = "before") -> None:
        self.writes: list[str] = []
        self.created: Counter[str] = Counter()
        self._operator = operator
        self._namespace = namespace
        self._number = number
        self._side = side
        self._fatal: Call | None = None
        self._restart: asyncio.Task[Operator] | None = None

    async def before(self, call: Call) -> web.Response | None:
        if call.writes and call.namespace == self._namespace:
            self.writes.append(describe(call))
            if len(self.writes) == self._number:
                self._fatal = call
                await self._die(call, "before")
        return None

    async def after(self, call: Call, status: int) -> None:
        if call.method == "POST" and call.path.endswith("/jobs") and status == 201:
            self.created[json.loads(call.body)["metadata"]["name"]] += call.namespace == self._namespace
        await self._die(call, "after")

    async def _die(self, call: Call, side: Side) -> None:
        if call is self._fatal and side == self._side:
            await asyncio.to_thread(self._operator.kill)
            self._restart = asyncio.create_task(asyncio.to_thread(self._operator.start))
            raise Cut

    async def recovered(self) -> bool:
        """Return whether there was a death, once the operator is back from it."""
        return self._restart is not None and bool(await self._restart)


def describe(call: Call) -> str:
    """Name a write as a person would."""
    body = json.loads(call.body)
    what = call.path.rpartition("/")[2] if call.method == "POST" else "/".join(call.path.rsplit("/", 3)[1:])
    status = body.get("status", {})
    name = body.get("reason") if body.get("kind") == "Event" else body.get("metadata", {}).get("name")
    return " ".join(filter(None, (call.method, what, name, status.get("phase"), status.get("reason"))))


@dataclass(frozen=True)
class Stage:
    """Where stories are played, with or without a death."""

    cluster: Cluster
    proxy: Proxy
    operator: Operator

    def play(self, title: str, number: int = 0, side: Side = "before") -> tuple[Death, dict[str, Any]]:
        """Return what was written, and what is left."""
        with open_place(self.cluster, f"{title}-{number}-{side}") as place:
            death = Death(self.operator, place.namespace, number, side)
            self.proxy.fault = death
            STORIES[title](place)
            died = self.proxy.run(death.recovered())
            assert died is bool(number), f"there were only these writes: {death.writes}"
            return death, take_snapshot(place)


@pytest.fixture
def stage(installed: Cluster, proxy: Proxy, operator: Operator) -> Stage:
    return Stage(installed, proxy, operator.start())


@promise(
    fault="The operator is killed at any of its writes",
    promise="The run ends as if nothing had happened: the same status and children, an Event for every step, and no Job twice.",
    how="A proxy numbers the writes of a whole life; for each, SIGKILL before and after the API server has it.",
)
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("title", STORIES)
def test_a_death_at_any_write_changes_nothing(
    title: str, stage: Stage, dose: Dose, outcome: Callable[[str], None]
) -> None:
    reference, expected = stage.play(title)
    moments: list[tuple[int, Side]] = [
        (number, side) for number in range(1, len(reference.writes) + 1) for side in ("before", "after")
    ]
    cases = choose(moments, dose(short=2, full=len(moments)))
    differences: dict[str, list[str]] = {}
    for number, side in cases:
        death, left = stage.play(title, number, side)
        if found := compare(expected | {"created": reference.created}, left | {"created": death.created}):
            differences[f"{side} {number}: {death.writes[number - 1]}"] = found
    outcome(f"{title}: {len(cases) - len(differences)} of {len(cases)} deaths at {len(reference.writes)} writes")
    assert differences == {}


def choose(moments: list[tuple[int, Side]], most: int) -> list[tuple[int, Side]]:
    """Return some moments, spread evenly."""
    step = len(moments) / most
    return [moments[int((index + 0.5) * step)] for index in range(most)]
