"""The metrics of a real operator, by the linter of Prometheus and over the life of a QLoRAJob."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qlora_api.report import StepRecord
from qlora_trainer.runtime.metrics import Meter
from tests.cluster.host.commands import wait_until
from tests.cluster.programs.binaries import binary
from tests.integration.operator_process import NAME, TRAIN, JobNamespace, Operator
from tests.integration.test_operator_progress import KUBEFLOW
from tests.make import PUBLISHED_MESSAGE


def lint(text: str) -> str:
    """Return what `promtool check metrics` finds."""
    command = [binary("promtool"), "check", "metrics"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode in {0, 3}, done.stderr
    return done.stdout + done.stderr


def value(operator: Operator, name: str, **labels: str) -> float | None:
    """Return the value of one series now."""
    for family in text_string_to_metric_families(operator.metrics()):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return None


@pytest.fixture
def operator(job_namespace: JobNamespace, tmp_path: Path) -> Iterator[Operator]:
    operator = Operator(job_namespace.cluster, tmp_path, job_namespace.namespace).start()
    yield operator
    operator.stop()


def test_linter_detects_violations() -> None:
    assert 'counter metrics should have "_total" suffix' in lint(
        "# HELP passes Passes.\n# TYPE passes counter\npasses 1\n"
    )


def test_trainer_metrics_pass_linter() -> None:
    meter = Meter()
    meter.step(StepRecord(step=1, loss=2.5, learning_rate=2e-4, grad_norm=0.75, tokens=900, seconds=1.5))
    assert lint(meter.render().decode()) == ""


def loss_series(operator: Operator) -> list[str]:
    """Return the lines of the one metric that only a running QLoRAJob has."""
    return [line for line in operator.metrics().splitlines() if line.startswith("qlora_job_loss{")]


def test_metrics_of_run_end_to_end(operator: Operator, job_namespace: JobNamespace) -> None:
    job_namespace.run_to_training()
    assert value(operator, "qlora_jobs", phase="Training") == 1
    assert (
        operator.post(job_namespace.namespace, NAME, job_namespace.token(job_namespace.pod_of(TRAIN)), KUBEFLOW)[0]
        == 200
    )
    assert loss_series(operator) == [f'qlora_job_loss{{name="{NAME}",namespace="{job_namespace.namespace}"}} 2.8312']
    assert lint(operator.metrics()) == ""
    assert (value(operator, "qlora_operator_api_requests_total", verb="PUT", code="200") or 0) >= 4

    job_namespace.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    job_namespace.wait_for("Succeeded")
    wait_until("the job's series to end", lambda: not loss_series(operator))
    assert value(operator, "qlora_jobs_finished_total", phase="Succeeded", reason="Published") == 1
    assert value(operator, "qlora_job_wait_duration_seconds_count") == 1
    assert lint(operator.metrics()) == ""

    lines = [json.loads(line) for line in operator.log.read_text().splitlines()]
    assert all(set(line) >= {"time", "level", "logger", "message"} for line in lines)
    of_job = [line for line in lines if (line.get("namespace"), line.get("job")) == (job_namespace.namespace, NAME)]
    assert [line["reason"] for line in of_job if "reason" in line][-1] == "Published"
