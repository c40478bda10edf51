"""The measurements: first children, a restart, idle time, and complete runs."""

import asyncio
import contextlib
import json
import re
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from benchmarks.scale.audit import Audit
from benchmarks.scale.resources import Usage, usage_of
from benchmarks.scale.workload import JOBS, PODS, QLORAJOBS, Manifest
from qlora_operator.cluster.http import Api, load_configuration
from tests.cluster.cluster import Cluster
from tests.integration.operator_process import Operator

CLIENTS: Final = 32
"""Objects that are created concurrently."""
PAGE: Final = 500
POLL_SECONDS: Final = 0.25
QUIET_SECONDS: Final = 10
"""Seconds without a write after which all work is done."""
IDLE_SECONDS: Final = 120
"""How long an idle operator is observed."""
TIMEOUT_SECONDS: Final = 1800.0
"""Seconds after which the benchmark gives up."""
LEASE: Final = "leases"
"""Renewed every few seconds by design; counted separately."""


class Contender(Protocol):
    """A controller that creates a Job for every object of its kind."""

    @property
    def pid(self) -> int:
        """Return the PID of the controller."""

    def start(self) -> object:
        """Start the controller, and return when it is ready."""


@dataclass(frozen=True)
class FirstChildren:
    """Creation of one Job for each object, all of which existed before the contender started."""

    seconds: float
    """From the start of its process to the last Job."""
    usage: Usage
    writes: dict[str, int]


@dataclass(frozen=True)
class Restart:
    """A restart of the operator with all runs in progress."""

    seconds: float
    """From the start of its process to the end of its last reconcile."""
    peak_mib: float
    writes: dict[str, int]
    idle_writes: dict[str, int]
    """In the IDLE_SECONDS after it."""


@dataclass(frozen=True)
class CompletedRuns:
    """Runs that were created, prepared, trained and published, with pods that run for one second."""

    seconds: float
    """From the first creation to the last end."""
    usage: Usage
    writes: dict[str, int]
    largest_bytes: int
    """Size of the largest finished QLoRAJob as JSON."""


@contextlib.asynccontextmanager
async def connect(cluster: Cluster) -> AsyncIterator[Api]:
    """Connect to the API server as an administrator."""
    api = Api(await load_configuration(str(cluster.kubeconfig)))
    try:
        yield api
    finally:
        await api.close()


async def create(api: Api, path: str, build: Callable[[int], Manifest], count: int) -> None:
    """Create objects as fast as the API server accepts them."""
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            await api.request("POST", path, build(number))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


async def count(api: Api, path: str) -> int:
    """Count the objects of a list without reading them."""
    answer = await api.request("GET", path, query={"limit": "1"})
    return len(answer["items"]) + int(answer["metadata"].get("remainingItemCount", 0))


async def read_all(api: Api, path: str) -> AsyncIterator[dict[str, Any]]:
    """Read a list in pages."""
    token = ""
    while True:
        page = await api.request("GET", path, query={"limit": str(PAGE)} | ({"continue": token} if token else {}))
        for item in page["items"]:
            yield item
        token = page["metadata"].get("continue", "")
        if not token:
            return


async def wait_for(condition: str, reached: Callable[[], Awaitable[bool]]) -> None:
    """Poll until a condition is met, and give up after TIMEOUT_SECONDS."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not await reached():
        if time.monotonic() > deadline:
            raise SystemExit(f"timed out after {TIMEOUT_SECONDS:.0f} s: {condition}")
        await asyncio.sleep(POLL_SECONDS)
    print(condition, flush=True)


async def measure_first_children(api: Api, contender: Contender, audit: Audit, jobs: int) -> FirstChildren:
    """Start a contender whose objects exist, and wait until each has its Job."""
    before, start = audit.count(), time.monotonic()

    async def all_created() -> bool:
        return await count(api, JOBS) >= jobs

    await asyncio.to_thread(contender.start)
    await wait_for(f"{jobs} Jobs exist", all_created)
    seconds = time.monotonic() - start
    return FirstChildren(seconds, usage_of(contender.pid), audit.writes_since(before))


async def wait_for_quiet(api: Api, audit: Audit) -> None:
    """Wait until every pod is running and nothing more is written."""
    before = audit.count()

    async def all_running() -> bool:
        query = {"fieldSelector": "status.phase!=Running", "limit": "1"}
        waiting = await api.request("GET", PODS, query=query)
        return not waiting["items"] and await count(api, PODS) >= await count(api, JOBS)

    async def quiet() -> bool:
        nonlocal before
        await asyncio.sleep(QUIET_SECONDS)
        writes, before = audit.writes_since(before), audit.count()
        return without_lease(writes) == 0

    await wait_for("every pod is running", all_running)
    await wait_for("nothing more is written", quiet)


async def measure_restart(operator: Operator, audit: Audit, jobs: int) -> Restart:
    """Start an operator with all runs in progress, wait until it has reconciled all, and observe it idle."""
    before, start = audit.count(), time.monotonic()

    async def all_reconciled() -> bool:
        metrics = await asyncio.to_thread(read_metrics, operator)
        return reconcile_count(metrics) >= jobs and metrics.get("qlora_operator_queue_depth") == 0

    await asyncio.to_thread(operator.start)
    await wait_for(f"{jobs} QLoRAJobs were reconciled", all_reconciled)
    seconds = time.monotonic() - start
    writes, before_idle = audit.writes_since(before), audit.count()
    await asyncio.sleep(IDLE_SECONDS)
    return Restart(seconds, usage_of(operator.pid).peak_mib, writes, audit.writes_since(before_idle))


async def measure_completed_runs(
    api: Api, operator: Operator, audit: Audit, build: Callable[[int], Manifest], jobs: int
) -> CompletedRuns:
    """Create runs under a running operator, wait until all have ended, and check that all were published."""
    before, start = audit.count(), time.monotonic()

    async def all_succeeded() -> bool:
        metrics = await asyncio.to_thread(read_metrics, operator)
        return metrics.get('qlora_jobs{phase="Succeeded"}') == jobs

    await create(api, QLORAJOBS, build, jobs)
    await wait_for(f"{jobs} runs have succeeded", all_succeeded)
    seconds = time.monotonic() - start
    finished = [item async for item in read_all(api, QLORAJOBS)]
    reasons = Counter(item["status"]["reason"] for item in finished)
    created = await count(api, JOBS)
    if reasons != {"Published": jobs} or created != 2 * jobs:
        raise SystemExit(f"{jobs} runs ended as {dict(reasons)} with {created} Jobs")
    largest = max(len(json.dumps(item, separators=(",", ":"))) for item in finished)
    return CompletedRuns(seconds, usage_of(operator.pid), audit.writes_since(before), largest)


def read_metrics(operator: Operator) -> dict[str, float]:
    """Read the operator's metrics; empty until it serves them."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{operator.health_port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    found = (re.fullmatch(r"([^#]\S*) (\S+)", line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}


def reconcile_count(metrics: dict[str, float]) -> float:
    """Return the number of finished reconciles."""
    return sum(value for name, value in metrics.items() if name.startswith("qlora_operator_reconcile_total"))


def without_lease(writes: dict[str, int]) -> int:
    """Return the number of writes, without those of the Lease."""
    return sum(number for write, number in writes.items() if LEASE not in write)
