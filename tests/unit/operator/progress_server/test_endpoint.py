"""The progress endpoint over HTTP, with known tokens."""

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.names import Phase
from qlora_api.progress import ProgressReport
from qlora_api.v1alpha1 import Checkpoint, ManifestRef
from qlora_operator.cluster.interface import PodIdentity, PodOwner
from qlora_operator.controller.workqueue import WorkQueue
from qlora_operator.progress_server import PodAuthorizer, ProgressEndpoint, ReportStore
from qlora_operator.progress_server.endpoint import MAX_BODY, REPORT_BURST, REPORT_INTERVAL
from qlora_operator.progress_server.pod_authorizer import TOKEN_CACHE_SECONDS
from qlora_operator.progress_server.reports import LONGEST_STATUS_INTERVAL, STATUS_INTERVAL, STATUS_WRITES, read_report
from tests.fakes import FakeTokenReviewer
from tests.make import NOW, REF, UID, make_token

POD = PodIdentity(REF.namespace, "support-bot-1-0-abcde", "uid-1")
POD_OF_OTHER_NAMESPACE = PodIdentity("other", "support-bot-1-0-abcde", "uid-2")
UNLABELED_POD = PodIdentity(REF.namespace, "stray", "uid-3")
TOKENS = {
    "good": make_token(POD),
    "other": make_token(POD_OF_OTHER_NAMESPACE),
    "stray": make_token(UNLABELED_POD),
    "wrong": make_token(POD, jti="forged"),
}


def make_report(metrics: dict[str, str] | None = None, **status: Any) -> dict[str, Any]:
    named = [{"name": name, "value": value} for name, value in (metrics or {}).items()]
    return {
        "trainerStatus": {"progressPercentage": 42, "metrics": named, "lastUpdatedTime": "2026-03-01T12:00:00Z"}
        | status
    }


class Setup:
    """An endpoint with a clock that tests move."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.notified: list[tuple[JobRef, timedelta]] = []
        self.identities = FakeTokenReviewer(
            {TOKENS["good"]: POD, TOKENS["other"]: POD_OF_OTHER_NAMESPACE, TOKENS["stray"]: UNLABELED_POD},
            {
                POD: PodOwner(REF.name, UID, NOW),
                POD_OF_OTHER_NAMESPACE: PodOwner(REF.name, UID, NOW),
                UNLABELED_POD: PodOwner("gone", None, NOW),
            },
        )
        self.reports = ReportStore()
        gate = PodAuthorizer(self.identities, lambda: self.seconds, self.now)
        endpoint = ProgressEndpoint(gate, self.reports, lambda ref, delay: self.notified.append((ref, delay)), self.now)
        self.client = TestClient(TestServer(endpoint.application()))

    def now(self) -> datetime:
        return NOW + timedelta(seconds=self.seconds)

    async def post(self, token: str = "good", ref: JobRef = REF, body: Any = None) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {TOKENS[token]}"} if token else {}
        data = body if isinstance(body, bytes) else None
        answer = await self.client.post(
            names.progress_path(*ref), headers=headers, data=data, json=None if data else body or make_report()
        )
        return answer.status, (await answer.json()).get("message", "")


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    setup = Setup()
    async with setup.client:
        yield setup


@pytest.mark.parametrize(
    ("token", "ref", "code", "said"),
    [
        pytest.param("", REF, 401, "send the pod's token", id="no-token"),
        pytest.param("wrong", REF, 401, "lacks audience qlora-operator", id="unknown-token"),
        pytest.param("good", JobRef("ml", "another"), 403, "does not belong", id="another-job"),
        pytest.param("other", REF, 403, "does not belong", id="another-namespace"),
        pytest.param("stray", JobRef("ml", "gone"), 404, "there is no QLoRAJob ml/gone", id="no-such-job"),
    ],
)
async def test_unauthorized_report_is_rejected(setup: Setup, token: str, ref: JobRef, code: int, said: str) -> None:
    status, message = await setup.post(token, ref)
    assert status == code
    assert said in message
    assert setup.notified == []


@pytest.mark.parametrize(
    ("token", "cached", "noted"),
    [
        pytest.param("wrong", {POD.uid}, True, id="account-created-anew"),
        pytest.param("wrong", set(), False, id="unknown-pod"),
        pytest.param("stray", {UNLABELED_POD.uid}, False, id="pod-of-another"),
        pytest.param("", {POD.uid}, False, id="no-token"),
    ],
)
async def test_refused_report_that_names_a_pod_of_the_run_is_noted(
    setup: Setup, token: str, cached: set[str], noted: bool
) -> None:
    setup.identities.cached_pods = cached
    for setup.seconds in (1.0, 6.0):  # the second answer is a cached refusal
        await setup.post(token)
    assert setup.reports.refused_at(REF) == (NOW + timedelta(seconds=6) if noted else None)
    assert setup.reports.get(REF) is None
    setup.reports.forget(REF)
    assert setup.reports.refused_at(REF) is None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        pytest.param(b"not json", "Invalid JSON", id="no-json"),
        pytest.param({"trainerStatus": {}}, "trainerStatus.lastUpdatedTime: Field required", id="no-time"),
        pytest.param(make_report(progressPercentage=101), "less than or equal to 100", id="too-much"),
    ],
)
async def test_invalid_report_names_field(setup: Setup, body: Any, said: str) -> None:
    status, message = await setup.post(body=body)
    assert status == 400
    assert said in message


async def test_oversized_body_is_rejected(setup: Setup) -> None:
    answer = await setup.client.post(
        names.progress_path(*REF), headers={"Authorization": f"Bearer {TOKENS['good']}"}, data=b" " * (MAX_BODY + 1)
    )
    assert answer.status == 413


async def test_report_is_stored_and_enqueues_job(setup: Setup) -> None:
    assert await setup.post() == (200, "")
    kept = setup.reports.get(REF)
    assert kept is not None
    assert kept.percent == 42
    assert setup.notified == [(REF, timedelta(0))]


async def test_status_updates_are_rate_limited(setup: Setup) -> None:
    await setup.post()
    setup.seconds = 1.0
    await setup.post()
    assert setup.notified[1] == (REF, STATUS_INTERVAL - timedelta(seconds=1))


def report_from(setup: Setup, runs: int) -> None:
    """Let other runs report."""
    for number in range(runs):
        setup.reports.put(JobRef("ml", f"run-{number}"), read_report(ProgressReport.model_validate(make_report()), NOW))


@pytest.mark.parametrize(("runs", "seconds"), [(50, 5.0), (199, 10.0), (999, 50.0), (9_999, 60.0)])
async def test_many_runs_share_the_writes_of_statuses(setup: Setup, runs: int, seconds: float) -> None:
    report_from(setup, runs)
    await setup.post()
    for setup.seconds in (5.0, 9.9):
        await setup.post()
    delays = [delay.total_seconds() for _, delay in setup.notified]
    expected = [0.0, max(seconds - 5, 0.0), max(seconds - 9.9, 0.1)]
    assert delays == pytest.approx(expected)
    assert seconds <= LONGEST_STATUS_INTERVAL.total_seconds()
    assert seconds == max(STATUS_INTERVAL.total_seconds(), min(60.0, (runs + 1) / STATUS_WRITES))


async def test_new_checkpoint_or_phase_waits_for_no_other_run(setup: Setup) -> None:
    report_from(setup, 999)
    await setup.post()
    setup.seconds = 10.0
    await setup.post()
    assert setup.notified[-1] == (REF, timedelta(seconds=40))
    setup.seconds = 12.0
    await setup.post(body=make_report({"phase": "Evaluating"}))
    assert setup.notified[-1] == (REF, STATUS_INTERVAL)
    setup.seconds = 13.0
    await setup.post(body=make_report({"phase": "Training"}))
    assert setup.notified[-1] == (REF, STATUS_INTERVAL - timedelta(seconds=1)), "no pod can force a write a second"


async def test_token_review_is_cached_for_a_minute(setup: Setup) -> None:
    await setup.post()
    await setup.post()
    assert setup.identities.reviews == 1
    setup.seconds = TOKEN_CACHE_SECONDS + 1
    await setup.post()
    assert setup.identities.reviews == 2


async def test_token_cache_is_per_job(setup: Setup) -> None:
    await setup.post()
    assert (await setup.post(ref=JobRef("ml", "another")))[0] == 403


async def test_reports_of_one_job_are_rate_limited(setup: Setup) -> None:
    answers = [await setup.post() for _ in range(50)]
    assert [status for status, _ in answers] == [200] * REPORT_BURST + [429] * (50 - REPORT_BURST)
    assert answers[-1][1] == "report at most every 1 s"
    setup.seconds = REPORT_INTERVAL.total_seconds()
    assert [(await setup.post())[0] for _ in range(2)] == [200, 429]


async def test_rate_limit_survives_clock_that_is_set_back(setup: Setup) -> None:
    for _ in range(REPORT_BURST + 1):
        await setup.post()
    setup.seconds = -3600.0
    assert (await setup.post())[0] == 200
    assert setup.notified[-1] == (REF, STATUS_INTERVAL)


async def test_posting_without_pause_reconciles_every_few_seconds(setup: Setup) -> None:
    queue: WorkQueue[JobRef] = WorkQueue(never, workers=0)
    for tenth in range(100):
        setup.seconds = tenth / 10
        await setup.post()
    assert len(setup.notified) <= REPORT_BURST + 10
    for ref, delay in setup.notified[1:]:
        queue.add_after(ref, delay)
    assert queue.depth == 0, "every later reconcile waits for the timer of an earlier report"
    assert len(queue._timers) == 1
    await queue.drain(timedelta(0))


async def test_refusal_of_a_busy_server_says_when_to_try_again(setup: Setup) -> None:
    setup.identities.answering.clear()
    first = asyncio.create_task(setup.post())
    await setup.identities.asked.wait()
    headers = {"Authorization": f"Bearer {TOKENS['wrong']}"}
    answer = await setup.client.post(names.progress_path(*REF), headers=headers, json=make_report())
    assert (answer.status, answer.headers["Retry-After"], answer.headers["Connection"]) == (503, "1", "close")
    setup.identities.answering.set()
    assert await first == (200, "")


async def test_report_is_of_the_job_with_the_uid(setup: Setup) -> None:
    await setup.post()
    assert setup.reports.job_uid(REF) == UID
    setup.reports.forget(REF)
    assert (setup.reports.get(REF), setup.reports.job_uid(REF)) == (None, None)


async def never(_: JobRef) -> None:
    """Fail: no worker runs."""
    raise AssertionError


def test_report_metrics_are_parsed() -> None:
    metrics = {
        "current_step": "120", "total_steps": "300", "loss": "2.83", "tokens_per_second": "812.4",
        "phase": "Evaluating",
    }  # fmt: skip
    report = read_report(ProgressReport.model_validate(make_report(metrics, estimatedRemainingSeconds=190)), NOW)
    assert report.model_dump(exclude_none=True) == {
        "percent": 42, "step": 120, "total_steps": 300, "remaining_seconds": 190, "loss": 2.83,
        "tokens_per_second": 812.4, "phase": Phase.EVALUATING, "updated_at": NOW,
    }  # fmt: skip


def test_unparsable_values_are_left_out() -> None:
    metrics = {"current_step": "-1", "loss": "nan", "tokens_per_second": "fast", "phase": "Succeeded"}
    report = read_report(ProgressReport.model_validate(make_report(metrics)), NOW)
    assert report.model_dump(exclude_none=True) == {"percent": 42, "updated_at": NOW}


CHECKPOINT = {
    "checkpoint_step": "100",
    "checkpoint_uri": "s3://adapters/team-a/support-bot/0123456789abcdef/checkpoints/step-000100-a1",
    "checkpoint_time": "2026-03-01T11:59:00Z",
    "checkpoint_verified": "True",
    "checkpoint_digest": "d" * 64,
}


def test_checkpoint_of_report_is_parsed() -> None:
    report = read_report(ProgressReport.model_validate(make_report(CHECKPOINT)), NOW)
    assert report.checkpoint == Checkpoint(
        step=100, uri=CHECKPOINT["checkpoint_uri"], time=NOW - timedelta(minutes=1), verified=True, digest="d" * 64
    )


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"checkpoint_step": "-1"}, id="before-the-first-step"),
        pytest.param({"checkpoint_time": "yesterday"}, id="no-time"),
        pytest.param({"checkpoint_time": "2026-03-01T11:59:00"}, id="a-time-without-a-zone"),
        pytest.param({"checkpoint_verified": "perhaps"}, id="neither-yes-nor-no"),
        pytest.param({"checkpoint_uri": None}, id="nowhere"),
        pytest.param({"checkpoint_digest": "latest"}, id="no-digest"),
    ],
)
def test_unparsable_checkpoint_is_left_out(change: dict[str, str | None]) -> None:
    metrics = {name: value for name, value in (CHECKPOINT | change).items() if value is not None}
    assert read_report(ProgressReport.model_validate(make_report(metrics)), NOW).checkpoint is None


MANIFEST = {
    "manifest_uri": "s3://adapters/team-a/support-bot/0123456789abcdef/manifest.json",
    "manifest_digest": "e" * 64,
}


def test_manifest_of_report_is_parsed() -> None:
    report = read_report(ProgressReport.model_validate(make_report(MANIFEST)), NOW)
    assert report.manifest == ManifestRef(uri=MANIFEST["manifest_uri"], digest="e" * 64)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"manifest_uri": None}, id="nowhere"),
        pytest.param({"manifest_uri": "s3://b/\x1b[2J"}, id="escapes"),
        pytest.param({"manifest_digest": None}, id="no-digest"),
        pytest.param({"manifest_digest": "E" * 64}, id="another-spelling"),
    ],
)
def test_unparsable_manifest_is_left_out(change: dict[str, str | None]) -> None:
    metrics = {name: value for name, value in (MANIFEST | change).items() if value is not None}
    assert read_report(ProgressReport.model_validate(make_report(metrics)), NOW).manifest is None
