"""Runs that report their progress as trainers do, beside many that have finished: what the operator does for them."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from statistics import quantiles
from typing import Any, Final

import aiohttp

from benchmarks.scale.audit import Audit
from benchmarks.scale.resources import usage_of
from benchmarks.scale.trial import (
    CLIENTS,
    create,
    read_all,
    read_metrics,
    reconcile_count,
    wait_for,
    without_lease,
)
from benchmarks.scale.workload import NAMESPACE, PODS, QLORAJOBS, Manifest
from qlora_api import names
from qlora_api.names import Role
from qlora_operator.cluster.http import MERGE_PATCH, Api
from qlora_operator.cluster.interface import ClusterBusyError
from tests.fakes import FakeCluster
from tests.integration.operator_process import Operator
from tests.make import make_manifest
from tests.unit.operator.life import run_to_success

REPORT_SECONDS: Final = 5.0
"""Between two reports of a trainer (qlora_trainer/observability/progress.py)."""
CHECKPOINT_STEPS: Final = 60
"""Reports between two checkpoints: five minutes."""
START: Final = datetime(2026, 3, 1, tzinfo=UTC)
ADDRESSES: Final = 250
"""Loopback addresses in one subnet that runs report from."""
TOKEN_CLIENTS: Final = 4
"""Tokens that are requested concurrently: each is signed."""
CALLS: Final = "qlora_operator_api_requests_total"
ACCOUNTS: Final = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/default/token"


@dataclass(frozen=True)
class Reporting:
    """An operator while runs report, and its restart with them."""

    runs: int
    finished: int
    seconds: float
    """How long it was observed."""
    answers: dict[str, int]
    """Reports by HTTP status."""
    latency_p95: float
    """Seconds from a report to its answer."""
    calls: dict[str, float]
    """Calls to the API server by verb."""
    writes: dict[str, int]
    cpu_seconds: float
    peak_mib: float
    status_age_p95: float
    """Seconds by which the report in a status was older than the last one."""
    restart_seconds: float
    """From the start of the process until each run was reconciled and its reports were taken again."""
    restart_calls: dict[str, float]


async def create_finished(api: Api, count: int) -> None:
    """Create QLoRAJobs that have been published."""
    fake = FakeCluster()
    fake.submit(make_manifest())
    await run_to_success(fake)
    status = fake.status

    def build(number: int) -> Manifest:
        return make_manifest(f"done-{number:05}", NAMESPACE)

    await create(api, QLORAJOBS, build, count)
    numbers = iter(range(count))

    async def write() -> None:
        for number in numbers:
            path = f"{QLORAJOBS}/done-{number:05}/status"
            await api.request("PATCH", path, {"status": status}, content_type=MERGE_PATCH)

    await asyncio.gather(*(write() for _ in range(CLIENTS)))


async def find_tokens(api: Api) -> dict[str, str]:
    """Return a token of each training pod, by the name of its run."""
    pods = [item async for item in read_all(api, f"{PODS}")]
    training = [pod for pod in pods if pod["metadata"]["labels"].get(names.ROLE_LABEL) == Role.TRAIN]
    left, tokens = iter(training), {}

    async def ask() -> None:
        for pod in left:
            bound = {"kind": "Pod", "apiVersion": "v1", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
            spec = {"audiences": [names.TOKEN_AUDIENCE], "boundObjectRef": bound, "expirationSeconds": 3600}
            body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
            answer = await _patiently(api, ACCOUNTS, body)
            tokens[pod["metadata"]["labels"][names.JOB_LABEL]] = answer["status"]["token"]

    await asyncio.gather(*(ask() for _ in range(TOKEN_CLIENTS)))
    return tokens


async def _patiently(api: Api, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Create an object on a machine that is busy."""
    while True:
        try:
            return await api.request("POST", path, body)
        except ClusterBusyError as error:
            print(error, flush=True)


class Reporters:
    """One client per run, each of which reports every few seconds."""

    def __init__(self, port: int, tokens: Mapping[str, str]) -> None:
        self.answers: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.reported: set[str] = set()
        """Runs whose reports were taken since this was cleared."""
        self._port = port
        self._tasks = [
            asyncio.create_task(self._report(run, token, number, number * REPORT_SECONDS / len(tokens)))
            for number, (run, token) in enumerate(tokens.items())
        ]

    def clear(self) -> None:
        """Count anew."""
        self.answers, self.latencies, self.reported = Counter(), [], set()

    async def stop(self) -> None:
        """Stop reporting."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _report(self, run: str, token: str, number: int, delay: float) -> None:
        await asyncio.sleep(delay)
        # As from as many pods: the operator bounds the connections of one address.
        connector = aiohttp.TCPConnector(local_addr=(f"127.0.{1 + number // ADDRESSES}.{1 + number % ADDRESSES}", 0))
        url = f"http://127.0.0.1:{self._port}{names.progress_path(NAMESPACE, run)}"
        headers = {"Authorization": f"Bearer {token}"}
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            for step in range(1, 1_000_000):
                start = time.monotonic()
                try:
                    async with session.post(url, json=build_report(run, step)) as answer:
                        self.answers[str(answer.status)] += 1
                        self.reported |= {run} if answer.status == 200 else set()
                except (OSError, aiohttp.ClientError):
                    self.answers["no answer"] += 1
                self.latencies.append(time.monotonic() - start)
                await asyncio.sleep(max(start + REPORT_SECONDS - time.monotonic(), 0.0))


def build_report(run: str, step: int) -> dict[str, Any]:
    """Return a report as a trainer sends it."""
    values = {
        "phase": "Training", "current_step": str(step), "total_steps": "10000", "loss": f"{2 + 1 / step:.4f}",
        "tokens_per_second": "812.5",
    }  # fmt: skip
    if last := step // CHECKPOINT_STEPS * CHECKPOINT_STEPS:
        uri = f"s3://adapters/team-a/{run}/0123456789abcdef/checkpoints/step-{last}"
        values |= {
            "checkpoint_step": str(last),
            "checkpoint_uri": uri,
            "checkpoint_time": (START + timedelta(seconds=last)).isoformat(),
        }
    metrics = [{"name": name, "value": value} for name, value in values.items()]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "trainerStatus": {
            "progressPercentage": step // 100, "estimatedRemainingSeconds": 50_000 - 5 * step, "metrics": metrics,
            "lastUpdatedTime": now,
        }
    }  # fmt: skip


async def measure_reporting(  # noqa: PLR0913, PLR0917 (what it is measured with)
    api: Api,
    operator: Operator,
    audit: Audit,
    build: Callable[[int], Manifest],
    runs: int,
    finished: int,
    seconds: float,
) -> Reporting:
    """Bring runs to training beside finished ones, let them report, and restart the operator meanwhile."""
    await create_finished(api, finished)
    operator.start()
    await create(api, QLORAJOBS, build, runs)

    async def all_training() -> bool:
        metrics = await asyncio.to_thread(read_metrics, operator)
        return metrics.get('qlora_jobs{phase="Training"}') == runs

    await wait_for(f"{runs} runs train", all_training)
    reporters = Reporters(operator.progress_port, await find_tokens(api))
    try:
        return await _observe(api, operator, audit, reporters, runs, finished, seconds)
    finally:
        await reporters.stop()


async def _observe(  # noqa: PLR0913, PLR0917 (as measure_reporting)
    api: Api, operator: Operator, audit: Audit, reporters: Reporters, runs: int, finished: int, seconds: float
) -> Reporting:
    await asyncio.sleep(2 * REPORT_SECONDS)
    reporters.clear()
    before, writes, usage = await asyncio.to_thread(read_metrics, operator), audit.count(), usage_of(operator.pid)
    start = time.monotonic()
    await asyncio.sleep(seconds)
    observed, after = time.monotonic() - start, await asyncio.to_thread(read_metrics, operator)
    written, used = audit.writes_since(writes), usage_of(operator.pid)
    answers, latency = dict(reporters.answers), quantiles(reporters.latencies, n=20)[-1]
    age = await _status_age(api)
    restart_seconds, calls, peak = await _restart(operator, reporters, runs, runs + finished)
    return Reporting(
        runs, finished, observed, answers, latency, _calls(before, after), written,
        used.cpu_seconds - usage.cpu_seconds, max(used.peak_mib, peak), age, restart_seconds, calls,
    )  # fmt: skip


async def _restart(
    operator: Operator, reporters: Reporters, runs: int, jobs: int
) -> tuple[float, dict[str, float], float]:
    await asyncio.to_thread(operator.terminate)
    reporters.clear()
    start = time.monotonic()
    await asyncio.to_thread(operator.start)
    metrics: dict[str, float] = {}

    async def all_there() -> bool:
        nonlocal metrics
        metrics = await asyncio.to_thread(read_metrics, operator)
        return reconcile_count(metrics) >= jobs and len(reporters.reported) >= runs

    await wait_for("every run was reconciled, and has reported again", all_there)
    return time.monotonic() - start, _calls({}, metrics), usage_of(operator.pid).peak_mib


def _calls(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Count calls to the API server by verb."""
    counts: Counter[str] = Counter()
    for name, value in after.items():
        if name.startswith(CALLS):
            counts[name.partition('verb="')[2].partition('"')[0]] += int(value - before.get(name, 0.0))
    return dict(counts.most_common())


async def _status_age(api: Api) -> float:
    now = datetime.now(UTC)
    reports = [item["status"].get("lastReport") async for item in read_all(api, QLORAJOBS) if "plan" in item["status"]]
    ages = [(now - datetime.fromisoformat(report["updatedAt"])).total_seconds() for report in reports if report]
    return quantiles(ages, n=20)[-1]


def describe_reporting(measured: Reporting, machine: Iterator[str]) -> Iterator[str]:
    """Yield the section of the page."""
    reports = measured.answers.get("200", 0) / measured.seconds
    yield f"## {measured.runs:,} runs that report, beside {measured.finished:,} that have finished"
    yield ""
    yield f"Each training pod reports every {REPORT_SECONDS:.0f} s, with a token of its own; observed for "
    yield f"{measured.seconds:.0f} s, then the operator was restarted while they went on."
    yield ""
    yield "| | measured |"
    yield "|---|---|"
    yield f"| reports taken | {reports:.0f}/s; answers: {_list(measured.answers)} |"
    yield f"| from a report to its answer, 95th percentile | {measured.latency_p95 * 1000:.0f} ms |"
    yield f"| age of the report in a status, 95th percentile | {measured.status_age_p95:.0f} s |"
    calls = sum(measured.calls.values()) / measured.seconds
    yield f"| calls to the API server | {calls:.1f}/s: {_list(measured.calls)} |"
    yield f"| writes | {without_lease(measured.writes) / measured.seconds:.1f}/s: {_list(measured.writes)} |"
    yield f"| CPU time of the operator | {measured.cpu_seconds / measured.seconds:.2f} cores |"
    yield f"| peak resident memory | {measured.peak_mib:.0f} MiB |"
    restart = f"{measured.restart_seconds:.1f} s; calls: {_list(measured.restart_calls)}"
    yield f"| restart, until all are reconciled and have reported again | {restart} |"
    yield ""
    yield from machine


def _list(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{number:.0f} {name}" for name, number in counts.items()) or "none"
