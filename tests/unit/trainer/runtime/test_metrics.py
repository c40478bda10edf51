"""Prometheus metrics of a training pod."""

import math
import time
import urllib.error
import urllib.request
from pathlib import Path

import boto3
import pytest
from moto import mock_aws
from prometheus_client.parser import text_string_to_metric_families

from qlora_api import metrics
from qlora_api.report import StepRecord, ValidationRecord
from qlora_api.runconfig import S3Config
from qlora_trainer.runtime.metrics import METER, Meter, serve_metrics
from qlora_trainer.runtime.rank import is_local_main_process
from qlora_trainer.storage.credentials import Credentials
from qlora_trainer.storage.s3 import S3Store
from qlora_trainer.storage.store import OUTPUT_FIELD
from tests.cluster.host.addresses import free_ports


def make_step(step: int) -> StepRecord:
    return StepRecord(step=step, loss=2.5, learning_rate=2e-4, grad_norm=0.75, tokens=900, seconds=1.5)


def read(text: str) -> dict[str, float]:
    """The values of all series without labels."""
    families = text_string_to_metric_families(text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def refuse_notes(text: str) -> None:
    raise AssertionError(text)


def test_scrape_has_the_newest_values():
    (port,), meter = free_ports(1), Meter()
    meter.start(10, 300, lambda: 7e9)
    with serve_metrics(refuse_notes, port, meter):
        for step in (11, 12):
            meter.step(make_step(step))
        meter.validation(ValidationRecord(step=12, loss=2.25, token_accuracy=0.5, seconds=3.0))
        meter.checkpoint(4.0)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{metrics.PATH}", timeout=10) as answer:
            values = read(answer.read().decode())
    assert values == {
        "qlora_trainer_step": 12, "qlora_trainer_planned_steps": 300, "qlora_trainer_loss": 2.5,
        "qlora_trainer_held_out_loss": 2.25, "qlora_trainer_learning_rate": 2e-4, "qlora_trainer_gradient_norm": 0.75,
        "qlora_trainer_tokens_total": 1800, "qlora_trainer_tokens_per_second": 600,
        "qlora_trainer_step_duration_seconds_count": 2, "qlora_trainer_step_duration_seconds_sum": 3.0,
        "qlora_trainer_peak_memory_bytes": 7e9,
        "qlora_trainer_checkpoint_duration_seconds_count": 1, "qlora_trainer_checkpoint_duration_seconds_sum": 4.0,
        "qlora_trainer_upload_duration_seconds_count": 0, "qlora_trainer_upload_duration_seconds_sum": 0,
        "qlora_trainer_uploaded_bytes_total": 0,
    }  # fmt: skip
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}{metrics.PATH}", timeout=1)


def test_unknown_gauges_are_nan():
    values = read(Meter().render().decode())
    assert {name for name, value in values.items() if math.isnan(value)} == {
        "qlora_trainer_loss", "qlora_trainer_held_out_loss", "qlora_trainer_learning_rate",
        "qlora_trainer_gradient_norm", "qlora_trainer_tokens_per_second",
    }  # fmt: skip


def test_port_in_use_is_logged_and_ignored():
    (port,), notes = free_ports(1), []
    with serve_metrics(refuse_notes, port, Meter()), serve_metrics(notes.append, port, Meter()):
        pass
    assert notes[0].startswith(f"metrics are not served: port {port}: ")


def test_exposed_metrics_equal_the_reference():
    exposed = {family.name for family in Meter().registry.collect()}
    assert exposed == {metric.name.removesuffix("_total") for metric in metrics.TRAINER}


def test_a_step_costs_microseconds():
    meter, steps = Meter(), [make_step(number) for number in range(2_000)]
    start = time.process_time()
    for record in steps:
        meter.step(record)
    assert (time.process_time() - start) / len(steps) < 200e-6


@pytest.mark.parametrize(("rank", "first"), [(None, True), ("0", True), ("1", False)])
def test_only_local_rank_0_serves_metrics(monkeypatch, rank, first):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert is_local_main_process() is first


@mock_aws
def test_only_successful_uploads_are_counted(tmp_path: Path):
    keys = Credentials({"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"})
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="adapters")
    (tmp_path / "weights").write_bytes(b"w" * 1000)
    before = read(METER.render().decode())
    store = S3Store("s3://adapters/team-a/job", OUTPUT_FIELD, keys, S3Config())
    store.put("weights", tmp_path / "weights")
    with pytest.raises(FileNotFoundError):
        store.put("nothing", tmp_path / "nothing")
    after = read(METER.render().decode())
    change = {name: after[name] - before[name] for name in after if "upload" in name}
    assert change.pop("qlora_trainer_upload_duration_seconds_sum") > 0
    assert change == {"qlora_trainer_upload_duration_seconds_count": 1, "qlora_trainer_uploaded_bytes_total": 1000}
