"""What is measured: first children, a restart, idleness, and whole lives."""

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
"""Objects that are created at once."""
PAGE: Final = 500
POLL_SECONDS: Final = 0.25
QUIET_SECONDS: Final = 10
"""Without a write, after which what was under way has been told."""
IDLE_SECONDS: Final = 120
"""How long an operator with nothing to do is watched."""
TIMEOUT_SECONDS: Final = 1800.0
"""Seconds after which a contender will never be done."""
LEASE: Final = "leases"
"""Renewed every few seconds by design, whatever there is to do; counted apart."""


class Contender(Protocol):
    """A controller that makes a Job for every object of its kind."""

    @property
    def pid(self) -> int:
        """Its process."""

    def start(self) -> object:
        """Start it, and return when it serves."""


@dataclass(frozen=True)
class FirstChildren:
    """How a contender made one Job for each of its objects, which were all there when it started."""

    seconds: float
    """From the start of its process to the last Job."""
    usage: Usage
    writes: dict[str, int]


@dataclass(frozen=True)
class Restart:
    """How the operator came back to work that was all under way."""

    seconds: float
    """From the start of its process to the end of its last look."""
    peak_mib: float
    writes: dict[str, int]
    idle_writes: dict[str, int]
    """In IDLE_SECONDS after it."""


@dataclass(frozen=True)
class CompletedRuns:
    """How runs were created, prepared, trained and published, with pods that last a second."""

    seconds: float
    """From the first creation to the last end."""
    usage: Usage
    writes: dict[str, int]
    largest_bytes: int
    """The longest finished QLoRAJob, as the API server hands it out."""


@contextlib.asynccontextmanager
async def connect(cluster: Cluster) -> AsyncIterator[Api]:
    """Speak to the API server as its administrator."""
    api = Api(await load_configuration(str(cluster.kubeconfig)))
    try:
        yield api
    finally:
        await api.close()


async def create(api: Api, path: str, build: Callable[[int], Manifest], count: int) -> None:
    """Create objects as fast as the API server takes them."""
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


async def wait_for(what: str, reached: Callable[[], Awaitable[bool]]) -> None:
    """Ask again and again, and give up after a time that nothing takes."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not await reached():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {TIMEOUT_SECONDS:.0f} s: {what}")
        await asyncio.sleep(POLL_SECONDS)
    print(what, flush=True)


async def measure_first_children(api: Api, contender: Contender, audit: Audit, jobs: int) -> FirstChildren:
    """Start a contender whose objects are there, and wait until each has its Job."""
    before, start = audit.count(), time.monotonic()

    async def made() -> bool:
        return await count(api, JOBS) >= jobs

    await asyncio.to_thread(contender.start)
    await wait_for(f"{jobs} Jobs are there", made)
    seconds = time.monotonic() - start
    return FirstChildren(seconds, usage_of(contender.pid), audit.writes_since(before))


async def wait_for_quiet(api: Api, audit: Audit) -> None:
    """Return when every pod runs, and every status says so: when nothing more is written."""
    before = audit.count()

    async def run() -> bool:
        query = {"fieldSelector": "status.phase!=Running", "limit": "1"}
        waiting = await api.request("GET", PODS, query=query)
        return not waiting["items"] and await count(api, PODS) >= await count(api, JOBS)

    async def quiet() -> bool:
        nonlocal before
        await asyncio.sleep(QUIET_SECONDS)
        writes, before = audit.writes_since(before), audit.count()
        return without_lease(writes) == 0

    await wait_for("every pod runs", run)
    await wait_for("nothing more is written", quiet)


async def measure_restart(operator: Operator, audit: Audit, jobs: int) -> Restart:
    """Start an operator where everything is under way, wait until it has looked at all, and then some."""
    before, start = audit.count(), time.monotonic()

    async def looked() -> bool:
        metrics = await asyncio.to_thread(read_metrics, operator)
        return reconcile_count(metrics) >= jobs and metrics.get("qlora_operator_queue_depth") == 0

    await asyncio.to_thread(operator.start)
    await wait_for(f"{jobs} QLoRAJobs were looked at", looked)
    seconds = time.monotonic() - start
    writes, quiet = audit.writes_since(before), audit.count()
    await asyncio.sleep(IDLE_SECONDS)
    return Restart(seconds, usage_of(operator.pid).peak_mib, writes, audit.writes_since(quiet))


async def measure_completed_runs(
    api: Api, operator: Operator, audit: Audit, build: Callable[[int], Manifest], jobs: int
) -> CompletedRuns:
    """Create runs under a running operator, wait until all have ended, and make sure how."""
    before, start = audit.count(), time.monotonic()

    async def ended() -> bool:
        metrics = await asyncio.to_thread(read_metrics, operator)
        return metrics.get('qlora_jobs{phase="Succeeded"}') == jobs

    await create(api, QLORAJOBS, build, jobs)
    await wait_for(f"{jobs} runs have succeeded", ended)
    seconds = time.monotonic() - start
    finished = [item async for item in read_all(api, QLORAJOBS)]
    reasons = Counter(item["status"]["reason"] for item in finished)
    made = await count(api, JOBS)
    if reasons != {"Published": jobs} or made != 2 * jobs:
        raise SystemExit(f"{jobs} runs ended as {dict(reasons)} with {made} Jobs")
    largest = max(len(json.dumps(item, separators=(",", ":"))) for item in finished)
    return CompletedRuns(seconds, usage_of(operator.pid), audit.writes_since(before), largest)


def read_metrics(operator: Operator) -> dict[str, float]:
    """Read the operator's own metrics; none before it serves them."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{operator.health_port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    found = (re.fullmatch(r"([^#]\S*) (\S+)", line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}


def reconcile_count(metrics: dict[str, float]) -> float:
    """Return how many passes have ended."""
    return sum(value for name, value in metrics.items() if name.startswith("qlora_operator_reconcile_total"))


def without_lease(writes: dict[str, int]) -> int:
    """Add up writes, those of the Lease left out."""
    return sum(number for what, number in writes.items() if LEASE not in what)
