"""Runs scenarios on a control plane with an operator behind a proxy."""

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from aiohttp import web

from tests.chaos.proxy import Call, Fault, Proxy
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.snapshot import compare, take_snapshot
from tests.cluster.cluster import Cluster
from tests.integration.operator_process import START_PATIENCE, STEP_PATIENCE, Operator, open_job_namespace


class WriteRecorder(Fault):
    """Records what an operator writes to one namespace."""

    def __init__(self) -> None:
        self.namespace = ""
        self.writes: list[str] = []
        self.created: Counter[str] = Counter()
        """How often the API server created each Job."""

    def is_own(self, call: Call) -> bool:
        """Return whether a request belongs to the scenario."""
        return call.namespace == self.namespace

    async def before(self, call: Call) -> web.Response | None:
        if call.is_write and self.is_own(call):
            self.writes.append(describe(call))
        return None

    async def after(self, call: Call, status: int) -> None:
        if self.is_own(call) and call.method == "POST" and call.path.endswith("/jobs") and status == 201:
            self.created[json.loads(call.body)["metadata"]["name"]] += 1


def describe(call: Call) -> str:
    """Describe a write for people."""
    body = json.loads(call.body)
    what = call.path.rpartition("/")[2] if call.method == "POST" else "/".join(call.path.rsplit("/", 3)[1:])
    status = body.get("status", {})
    name = body.get("reason") if body.get("kind") == "Event" else body.get("metadata", {}).get("name")
    return " ".join(filter(None, (call.method, what, name, status.get("phase"), status.get("reason"))))


@dataclass(frozen=True)
class FinalState:
    """The final state of a scenario, without what differs between runs."""

    snapshot: dict[str, Any]
    created: Counter[str]

    def differences(self, other: "FinalState") -> list[str]:
        """Return the lines in which another final state differs."""
        return compare({**self.snapshot, "created": self.created}, {**other.snapshot, "created": other.created})


@dataclass
class ScenarioRunner:
    """Runs scenarios with the fault of the proxy."""

    cluster: Cluster
    proxy: Proxy
    operator: Operator
    patience: float = START_PATIENCE + STEP_PATIENCE
    _number: Any = field(default_factory=count)

    def run(self, title: str, recorder: WriteRecorder) -> FinalState:
        """Run a scenario to its end in a new namespace."""
        with open_job_namespace(
            self.cluster, f"{title}-{next(self._number)}-{self.proxy.port}", self.patience
        ) as job_namespace:
            recorder.namespace = job_namespace.namespace
            self.proxy.fault = recorder
            SCENARIOS[title](job_namespace)
            self.proxy.run(recorder.finish())
            return FinalState(take_snapshot(job_namespace), recorder.created)
