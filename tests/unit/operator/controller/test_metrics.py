"""The operator's metrics over whole lives of QLoRAJobs in memory."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Final

import pytest
from aiohttp import ClientSession
from prometheus_client.parser import text_string_to_metric_families

from qlora_api import __version__, metrics
from qlora_api.job_ref import JobRef
from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Progress
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.controller.metrics import Metrics, progress_ratio
from qlora_operator.health_server import serve_health
from qlora_operator.progress_server import ReportStore
from tests.cluster.host.addresses import free_ports
from tests.fakes import FakeCluster
from tests.make import (
    NOW,
    PREPARED_MESSAGE,
    PUBLISHED_MESSAGE,
    REF,
    make_manifest,
    make_prepared,
    make_result,
    make_termination_message,
)
from tests.unit.operator.controller.test_reconcile import gpu_node
from tests.unit.operator.life import PREPARE, TRAIN, reconcile_now

FINISHED: Final = ("qlora_jobs_finished_total", "qlora_job_attempts_ended_total")
JOB: Final = {"namespace": REF.namespace, "name": REF.name}


class Scrape:
    """A leader's metrics, and what they say."""

    def __init__(self) -> None:
        self.reports = ReportStore()
        self.metrics = Metrics(lambda: True)
        self.metrics.jobs.start_leading(self.reports.get)

    def samples(self) -> Iterator[tuple[str, tuple[tuple[str, str], ...], float]]:
        for family in text_string_to_metric_families(self.metrics.render().decode()):
            for sample in family.samples:
                yield sample.name, tuple(sorted(sample.labels.items())), sample.value

    def value(self, name: str, /, **labels: str) -> float | None:
        wanted = tuple(sorted(labels.items()))
        return next((value for known, given, value in self.samples() if (known, given) == (name, wanted)), None)

    async def reconcile_until_stable(self, cluster: FakeCluster) -> None:
        """Pass until nothing is written."""
        while True:
            before = len(cluster.writes)
            cluster.pass_time(timedelta(seconds=1))
            self.metrics.on_reconciled(REF, await reconcile_now(cluster, self.reports.get(REF)))
            if len(cluster.writes) == before:
                return


@pytest.fixture
def scrape() -> Scrape:
    return Scrape()


@pytest.fixture
def cluster() -> FakeCluster:
    fake = FakeCluster()
    fake.submit(make_manifest())
    return fake


def make_report(**change: object) -> Progress:
    known = {"percent": 41, "step": 126, "total_steps": 300, "remaining_seconds": 190, "loss": 2.83}
    return Progress.model_validate({**known, "phase": Phase.TRAINING, "updated_at": NOW} | change)


async def run_to_training(scrape: Scrape, cluster: FakeCluster) -> None:
    await scrape.reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await scrape.reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(minutes=3))
    cluster.start_pod(TRAIN)
    await scrape.reconcile_until_stable(cluster)


async def test_metrics_of_full_run(scrape: Scrape, cluster: FakeCluster) -> None:
    await run_to_training(scrape, cluster)
    assert scrape.value("qlora_jobs", phase="Training") == 1
    assert scrape.value("qlora_job_wait_duration_seconds_count") == 1
    assert 180 < (scrape.value("qlora_job_wait_duration_seconds_sum") or 0) < 200
    assert scrape.value("qlora_jobs_finished_total", phase="Succeeded", reason="Published") is None

    cluster.pass_time(timedelta(minutes=10))
    cluster.end_pod(TRAIN, 0, PUBLISHED_MESSAGE, keep_start=True)
    await scrape.reconcile_until_stable(cluster)
    assert scrape.value("qlora_jobs", phase="Training") == 0
    assert scrape.value("qlora_jobs", phase="Succeeded") == 1
    assert scrape.value("qlora_jobs_finished_total", phase="Succeeded", reason="Published") == 1
    assert scrape.value("qlora_job_attempts_ended_total", reason="Published") == 1
    assert 600 <= (scrape.value("qlora_job_run_duration_seconds_sum", phase="Succeeded") or 0) < 620


async def test_runs_that_ended_before_start_are_not_counted(scrape: Scrape, cluster: FakeCluster) -> None:
    await run_to_training(scrape, cluster)
    cluster.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    await scrape.reconcile_until_stable(cluster)
    next_operator = Scrape()
    await next_operator.reconcile_until_stable(cluster)
    assert next_operator.value("qlora_jobs", phase="Succeeded") == 1
    counted = [sample for sample in next_operator.samples() if sample[0] in FINISHED]
    assert counted == []
    assert next_operator.value("qlora_job_wait_duration_seconds_count") == 0


async def test_running_job_exports_progress(scrape: Scrape, cluster: FakeCluster) -> None:
    await run_to_training(scrape, cluster)
    assert scrape.value("qlora_job_progress_ratio", **JOB) is None
    scrape.reports.put(REF, make_report())
    assert scrape.value("qlora_job_progress_ratio", **JOB) == pytest.approx(0.42)
    assert scrape.value("qlora_job_eta_seconds", **JOB) == 190
    assert scrape.value("qlora_job_loss", **JOB) == 2.83


async def test_job_metrics_disappear_at_end(scrape: Scrape, cluster: FakeCluster) -> None:
    await run_to_training(scrape, cluster)
    scrape.reports.put(REF, make_report())
    cluster.change(suspend=True)
    await scrape.reconcile_until_stable(cluster)
    assert scrape.value("qlora_jobs", phase="Suspended") == 1
    assert [sample for sample in scrape.samples() if dict(sample[1]).get("name")] == []


async def test_job_metrics_disappear_with_job(scrape: Scrape, cluster: FakeCluster) -> None:
    await run_to_training(scrape, cluster)
    scrape.reports.put(REF, make_report())
    scrape.metrics.jobs.set_phase(REF, None)
    assert scrape.value("qlora_jobs", phase="Training") == 0
    assert [sample for sample in scrape.samples() if dict(sample[1]).get("name")] == []


@pytest.mark.parametrize(
    ("report", "ratio"),
    [
        pytest.param(make_report(), 0.42, id="steps"),
        pytest.param(make_report(step=None), 0.41, id="percentage"),
        pytest.param(make_report(total_steps=0), 0.41, id="no-steps"),
        pytest.param(make_report(step=301), 1.0, id="more-than-all"),
    ],
)
def test_progress_ratio(report: Progress, ratio: float) -> None:
    assert progress_ratio(report) == pytest.approx(ratio)


def test_standby_exposes_no_job() -> None:
    waiting = Scrape.__new__(Scrape)
    waiting.metrics = Metrics(lambda: False)
    assert waiting.value("qlora_operator_leader") == 0
    assert waiting.value("qlora_operator_build_info", version=__version__) == 1
    assert [name for name, labels, _ in waiting.samples() if "phase" in dict(labels)] == []


def test_reconciles_are_counted_by_result(scrape: Scrape) -> None:
    with scrape.metrics.time_reconcile():
        pass
    with pytest.raises(ClusterBusyError), scrape.metrics.time_reconcile():
        raise ClusterBusyError("later")
    with pytest.raises(KeyError), scrape.metrics.time_reconcile():
        raise KeyError("a fault")
    for result in ("success", "busy", "error"):
        assert scrape.value("qlora_operator_reconcile_total", result=result) == 1
    assert scrape.value("qlora_operator_reconcile_duration_seconds_count") == 3


def test_api_calls_are_counted_by_status_code(scrape: Scrape) -> None:
    scrape.metrics.on_api_call("GET", 200, 0.01)
    scrape.metrics.on_api_call("GET", None, 30.0)
    assert scrape.value("qlora_operator_api_requests_total", verb="GET", code="200") == 1
    assert scrape.value("qlora_operator_api_requests_total", verb="GET", code="none") == 1
    assert scrape.value("qlora_operator_api_request_duration_seconds_sum", verb="GET") == pytest.approx(30.01)


def test_metrics_match_reference(scrape: Scrape) -> None:
    exposed = {family.name for family in scrape.metrics.registry.collect()}
    assert exposed == {metric.name.removesuffix("_total") for metric in metrics.OPERATOR}


def test_waiting_jobs_export_one_series_per_phase(scrape: Scrape) -> None:
    for number in range(10_000):
        scrape.metrics.jobs.set_phase(JobRef("ml", f"job-{number}"), Phase.QUEUED)
    assert scrape.value("qlora_jobs", phase="Queued") == 10_000
    assert len(scrape.metrics.render()) < 16_384


async def test_metrics_are_served_on_health_port(scrape: Scrape) -> None:
    (port,) = free_ports(1)
    async with serve_health(port, lambda: None, scrape.metrics.render), ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            assert "qlora_operator_leader 1.0" in await answer.text()
        async with session.get(f"http://127.0.0.1:{port}/healthz") as answer:
            assert (answer.status, await answer.text()) == (200, "ok")


# GPU time


async def run_with_gpus(scrape: Scrape) -> FakeCluster:
    cluster = FakeCluster()
    cluster.submit(make_manifest(resources={"gpusPerNode": 2}))
    cluster.nodes = [gpu_node("NVIDIA-A10", 23_028)]
    await run_to_training(scrape, cluster)
    return cluster


def gpu_seconds(scrape: Scrape) -> float:
    return sum(value for name, _, value in scrape.samples() if name == "qlora_gpu_seconds_total")


async def test_gpu_seconds_are_those_of_the_status_across_restarts_and_after_the_end(scrape: Scrape) -> None:
    cluster = await run_with_gpus(scrape)
    cluster.pass_time(timedelta(minutes=10))
    scrape.reports.put(REF, make_report(updated_at=cluster.now))
    await scrape.reconcile_until_stable(cluster)
    before = gpu_seconds(scrape)
    assert before > 0
    successor = Scrape()
    cluster.pass_time(timedelta(minutes=10))
    cluster.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    await successor.reconcile_until_stable(cluster)
    await successor.reconcile_until_stable(cluster)
    assert before + gpu_seconds(successor) == cluster.status["usage"]["held"]
    assert successor.value("qlora_gpu_seconds_total", namespace="ml", part="training")
    assert successor.value("qlora_jobs_finished_total", phase="Succeeded", reason="Published") == 1


async def test_gpu_seconds_of_a_failed_run_are_lost(scrape: Scrape) -> None:
    cluster = await run_with_gpus(scrape)
    cluster.pass_time(timedelta(minutes=10))
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.NON_FINITE_LOSS, "loss is NaN"))
    await scrape.reconcile_until_stable(cluster)
    lost = scrape.value("qlora_gpu_seconds_lost_total", namespace="ml", reason="NonFiniteLoss")
    assert lost == cluster.status["usage"]["held"] > 0


async def test_result_found_again_is_saved_gpu_time(scrape: Scrape) -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest(resources={"gpusPerNode": 2}))
    await scrape.reconcile_until_stable(cluster)
    published = make_result().model_copy(update={"gpu_seconds": 7200})
    message = make_termination_message(Reason.ALREADY_PUBLISHED, prepared=make_prepared(published=published))
    cluster.end_pod(PREPARE, 0, message)
    await scrape.reconcile_until_stable(cluster)
    assert cluster.status["usage"]["saved"] == 7200
    assert scrape.value("qlora_gpu_seconds_saved_total", namespace="ml") == 7200
    assert scrape.value("qlora_jobs_ended_without_gpu_total", namespace="ml", reason="AlreadyPublished") == 1


async def test_gpu_seconds_that_an_older_crd_drops_are_not_counted_again_and_again(scrape: Scrape) -> None:
    cluster = await run_with_gpus(scrape)
    before = gpu_seconds(scrape)
    for _ in range(3):
        cluster.pass_time(timedelta(minutes=10))
        assert cluster.job
        for stored in (cluster.job["status"], *cluster.job["status"]["attempts"]):
            stored.pop("usage", None)
        scrape.reports.put(REF, make_report(updated_at=cluster.now))
        scrape.metrics.on_reconciled(REF, await reconcile_now(cluster, scrape.reports.get(REF)))
    assert cluster.status["usage"]["held"] > 0
    assert gpu_seconds(scrape) == before
