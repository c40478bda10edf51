"""The operator on a cluster whose controllers act by themselves: woken by changes and by its own timers only."""

import json
from datetime import datetime, timedelta
from typing import Any, Final

from qlora_api import names
from qlora_api.v1alpha1 import Progress
from tests.fake_kubernetes import FakeKubernetes
from tests.fakes import FakeCluster
from tests.make import PREPARED_MESSAGE, REF, make_manifest
from tests.unit.operator.life import PREPARE, TRAIN, reconcile_now

MOST_PASSES: Final = 12
"""Reconciles of one QLoRAJob in a row without time passing: more would be a loop."""


class Simulation:
    """One QLoRAJob from its submission on."""

    def __init__(self, **spec: Any) -> None:
        self.cluster = FakeCluster()
        self.cluster.foreground_deletion = True
        self.kubernetes = FakeKubernetes(self.cluster)
        self.cluster.submit(make_manifest(**spec))
        self.report: Progress | None = None
        self.passes = 0
        self._due: datetime | None = None
        self._seen = ""

    @property
    def status(self) -> dict[str, Any]:
        return self.cluster.status

    @property
    def outcome(self) -> tuple[str, str]:
        return self.status.get("phase", ""), self.status.get("reason", "")

    @property
    def ends(self) -> list[str | None]:
        """How the attempts ended."""
        return [attempt.get("reason") for attempt in self.status.get("attempts", ())]

    @property
    def jobs(self) -> list[str]:
        return [name for kind, name in self.cluster.children if kind == "Job"]

    async def run(self, duration: timedelta, step: timedelta = timedelta(seconds=20)) -> None:
        """Let time pass, and the operator react."""
        end = self.cluster.now + duration
        while self.cluster.now < end:
            self.kubernetes.step(min(step, end - self.cluster.now))
            await self.react()

    async def react(self) -> None:
        """Reconcile while there is a reason to: an event, or a timer that has expired."""
        for _ in range(MOST_PASSES):
            seen = json.dumps([self.cluster.pods, [*map(str, self.cluster.children.items())], self._spec()])
            if seen == self._seen and (self._due is None or self.cluster.now < self._due):
                return
            self._seen = seen
            result = await reconcile_now(self.cluster, self.report)
            self.passes += 1
            delay = result.requeue_after
            assert delay is None or delay >= timedelta(0)
            self._due = self.cluster.now + delay if delay is not None else None
        raise AssertionError(f"reconciled {MOST_PASSES} times at one time: {self.status}")

    def _spec(self) -> Any:
        return self.cluster.job and self.cluster.job["spec"]

    async def prepare(self) -> None:
        """Prepare, until the first training Job is there."""
        await self.run(timedelta(minutes=1))
        self.kubernetes.end_trainer(PREPARE, 0, PREPARED_MESSAGE)
        await self.run(timedelta(minutes=1))
        assert TRAIN in self.jobs, self.status

    def heartbeat(self) -> None:
        """Report as a pod does that trains."""
        self.report = Progress(percent=20, step=50, updated_at=self.cluster.now)
        self._due = self.cluster.now


def train(number: int) -> str:
    """Return the name of a training Job."""
    return names.train_job_name(REF.name, number)
