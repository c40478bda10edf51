"""Termination message, exit code and progress reports of a pod."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from qlora_api.names import PROGRESS_TOKEN_ENV, PROGRESS_URL_ENV, TERMINATION_MESSAGE_BYTES, Phase
from qlora_api.progress import ProgressReport
from qlora_api.reasons import Reason
from qlora_api.report import TerminationMessage
from qlora_api.runconfig import PrepareConfig
from qlora_api.v1alpha1 import Checkpoint, ManifestRef, Progress
from qlora_operator.progress_server.reports import read_report
from qlora_trainer.__main__ import COMMANDS, main, read_config
from qlora_trainer.errors import RunError, StopRequested, as_run_error, interrupted_error
from qlora_trainer.observability.progress import INTERVAL_SECONDS, Heartbeat, HttpSink, Sinks, to_body
from qlora_trainer.runtime.shutdown import StopFlag, as_exit_error
from qlora_trainer.runtime.termination_message import (
    TerminationMessageWriter,
    failure_message,
    to_json_line,
    write_termination_message,
)
from qlora_trainer.storage.credentials import load_secrets
from tests.unit.trainer.tiny import RecordingSink, make_spec, prepare_config, serving


@pytest.mark.parametrize(
    "message",
    ["short", "x" * 10_000, "ü" * 5_000, "🦙" * 5_000, '"\\\n' * 5_000, "\x00\x1f" * 5_000, "lone \ud800 surrogate"],
    ids=["short", "ascii", "two-bytes", "four-bytes", "escapes", "controls", "surrogate"],
)
def test_termination_message_fits_and_is_valid_json(tmp_path, message):
    path = tmp_path / "termination-log"
    write_termination_message(failure_message(RunError(Reason.DATASET_INVALID, message, step=3)), path)
    content = path.read_bytes()
    assert len(content) <= TERMINATION_MESSAGE_BYTES
    assert b"\n" not in content
    parsed = TerminationMessage.model_validate_json(content)
    assert (parsed.reason, parsed.step) == (Reason.DATASET_INVALID, 3)
    if len(message) > 2000:
        assert len(content) > TERMINATION_MESSAGE_BYTES - 16
        assert parsed.message.endswith("…")


def test_termination_message_outside_a_pod_is_skipped(tmp_path):
    write_termination_message(TerminationMessage(reason=Reason.PUBLISHED), tmp_path / "no" / "such" / "folder")
    assert to_json_line(TerminationMessage(reason=Reason.PUBLISHED)) == '{"reason":"Published","message":""}'


class OutOfMemoryError(RuntimeError):
    """Has the same name as torch's."""


class DistBackendError(RuntimeError):
    """Has the same name as torch's."""


class AcceleratorError(RuntimeError):
    """Has the same name as torch's."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RunError(Reason.S3_DENIED, "no"), Reason.S3_DENIED),
        (OutOfMemoryError("CUDA out of memory"), Reason.CUDA_OUT_OF_MEMORY),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"), Reason.CUDA_OUT_OF_MEMORY),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            Reason.CUDA_OUT_OF_MEMORY,
        ),
        (DistBackendError("NCCL error …: Cuda failure 2 'out of memory'"), Reason.CUDA_OUT_OF_MEMORY),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), Reason.ACCELERATOR_FAILED),
        (AcceleratorError("CUDA error: unspecified launch failure"), Reason.ACCELERATOR_FAILED),
        (DistBackendError("Cuda failure 214 'uncorrectable ECC error encountered'"), Reason.ACCELERATOR_FAILED),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), Reason.ACCELERATOR_FAILED),
        (
            RuntimeError("Unable to determine the device handle for GPU 0000:1B:00.0: GPU is lost."),
            Reason.ACCELERATOR_FAILED,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), Reason.CUDA_OUT_OF_MEMORY),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
            Reason.CUDA_OUT_OF_MEMORY,
        ),
        (DistBackendError("ncclUnhandledCudaError: Cuda failure 'out of memory'"), Reason.CUDA_OUT_OF_MEMORY),
        (RuntimeError("CUDA error: uncorrectable NVLink error detected"), Reason.ACCELERATOR_FAILED),
        (RuntimeError("NVRM: Xid (PCI:0000:1b:00): 79, GPU has fallen off the bus."), Reason.ACCELERATOR_FAILED),
        (DistBackendError("Watchdog caught collective operation timeout"), Reason.COLLECTIVE_TIMEOUT),
        # What the code or the data did wrong would do it again on another GPU.
        (AcceleratorError("CUDA error: device-side assert triggered"), Reason.TRAINER_ERROR),
        (RuntimeError("CUDA error: no kernel image is available for execution"), Reason.TRAINER_ERROR),
        (MemoryError(), Reason.HOST_OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), Reason.HOST_OUT_OF_MEMORY),
        (KeyError("x"), Reason.TRAINER_ERROR),
    ],
)
def test_every_exception_has_a_reason(error, reason):
    assert as_run_error(error).reason == reason


def arguments(command: str, folder: Path) -> list[str]:
    paths = {"config": folder / "config.json", "work": folder / "work", "termination-message": folder / "message.json"}
    return [command, *(f"--{name}={path}" for name, path in paths.items())]


def test_secret_is_in_neither_termination_message_nor_log(tmp_path, monkeypatch, capsys):
    """Even if a library puts it into its exception."""
    mount = tmp_path / "secrets"
    (mount / "output").mkdir(parents=True)
    (mount / "output" / "AWS_SECRET_ACCESS_KEY").write_text("c4n4ry/of+the/output\n")
    spec = make_spec("file:///nowhere", "file:///nowhere.jsonl", "s3://adapters", output={"secretRef": {"name": "s3"}})

    def fail(*_):
        load_secrets(spec, "ml", mount)
        raise RuntimeError("c4n4ry/of+the/output does not open https://u:c4n4ry-of-a-url@s3.example")

    monkeypatch.setitem(COMMANDS, "prepare", fail)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(arguments("prepare", tmp_path)) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (line["level"], line["message"], line["reason"]) == ("error", "the run failed", "TrainerError")
    assert "RuntimeError: [redacted] does not open https://[redacted]@s3.example" in line["exception"]
    message = (tmp_path / "message.json").read_text()
    assert "[redacted] does not open" in message
    assert "c4n4ry" not in message + line["exception"]


def test_failed_prepare_exits_1_with_reason_and_field(tmp_path):
    spec = make_spec("file:///nowhere", "file:///nowhere.jsonl", f"file://{tmp_path / 'output'}")
    (tmp_path / "config.json").write_text(prepare_config(spec).model_dump_json(by_alias=True))
    before = signal.getsignal(signal.SIGTERM)
    try:
        code = main(arguments("prepare", tmp_path))
    finally:
        signal.signal(signal.SIGTERM, before)
    message = TerminationMessage.model_validate_json((tmp_path / "message.json").read_text())
    assert (code, message.reason) == (1, Reason.DATASET_NOT_FOUND)
    assert message.message.startswith("spec.dataset.uri")


def test_config_of_newer_operator_is_read(tmp_path):
    expected = prepare_config(make_spec("hf://a/b", "s3://data/rows.jsonl", "s3://adapters"))
    content = expected.model_dump(mode="json", by_alias=True, exclude_none=True)
    content["tomorrow"] = content["spec"]["tomorrow"] = content["spec"]["training"]["tomorrow"] = {"a": [1]}
    (tmp_path / "prepare.json").write_text(json.dumps(content))
    assert read_config(tmp_path / "prepare.json", PrepareConfig) == expected


def test_unreadable_config_is_a_trainer_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "qlora_trainer", *arguments("train", tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    message = TerminationMessage.model_validate_json((tmp_path / "message.json").read_text())
    assert message.reason == Reason.TRAINER_ERROR
    assert "ValidationError" in json.loads(done.stdout.splitlines()[-1])["exception"]


@pytest.mark.usefixtures("stop")
def test_sigterm_between_steps_stops_immediately():
    with pytest.raises(StopRequested) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    assert as_exit_error(caught.value, stopped=True).reason == Reason.INTERRUPTED


def test_sigterm_within_a_step_only_sets_the_flag(stop):
    with stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested


def test_first_ctrl_c_finishes_the_step_and_second_aborts():
    stop, announced, before = StopFlag(), [], signal.getsignal(signal.SIGINT)
    with stop.handling_keyboard_interrupt(lambda: announced.append("stopping")):
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            assert (stop.requested, announced) == (True, ["stopping"])
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def progress(step: int, phase: Phase = Phase.TRAINING) -> Progress:
    return Progress(
        percent=step,
        step=step,
        total_steps=100,
        remaining_seconds=9,
        loss=1.5,
        tokens_per_second=10.0,
        phase=phase,
        updated_at=datetime(2026, 1, 2, tzinfo=UTC),
    )


def test_progress_body_follows_kubeflow_trainers_protocol():
    assert json.loads(to_body(progress(7)))["trainerStatus"] == {
        "progressPercentage": 7,
        "estimatedRemainingSeconds": 9,
        "metrics": [
            {"name": "current_step", "value": "7"},
            {"name": "total_steps", "value": "100"},
            {"name": "loss", "value": "1.5"},
            {"name": "tokens_per_second", "value": "10.0"},
            {"name": "phase", "value": "Training"},
        ],
        "lastUpdatedTime": "2026-01-02T00:00:00Z",
    }


CHECKPOINT = Checkpoint(
    step=5,
    uri="s3://b/job/d/checkpoints/step-000005-a1",
    time=datetime(2026, 1, 2, tzinfo=UTC),
    verified=True,
    digest="d" * 64,
)


def test_progress_body_has_the_newest_checkpoint():
    body = to_body(progress(7).model_copy(update={"checkpoint": CHECKPOINT}))
    assert json.loads(body)["trainerStatus"]["metrics"][5:] == [
        {"name": "checkpoint_step", "value": "5"},
        {"name": "checkpoint_uri", "value": "s3://b/job/d/checkpoints/step-000005-a1"},
        {"name": "checkpoint_time", "value": "2026-01-02T00:00:00Z"},
        {"name": "checkpoint_verified", "value": "True"},
        {"name": "checkpoint_digest", "value": "d" * 64},
    ]


def test_progress_body_has_the_manifest_of_the_result():
    manifest = ManifestRef(uri="s3://b/job/d/manifest.json", digest="e" * 64)
    body = to_body(progress(7).model_copy(update={"manifest": manifest}))
    report = read_report(ProgressReport.model_validate_json(body), datetime(2026, 1, 2, tzinfo=UTC))
    assert report.manifest == manifest


def test_failure_is_written_once_with_the_newest_checkpoint(tmp_path):
    writer = TerminationMessageWriter(tmp_path / "message.json")
    writer.report(progress(7).model_copy(update={"checkpoint": CHECKPOINT}))
    writer.write_failure(RunError(Reason.HEARTBEAT_LOST, "no heartbeat", step=7))
    writer.write_failure(RunError(Reason.INTERRUPTED, "terminated", step=7))
    message = TerminationMessage.model_validate_json((tmp_path / "message.json").read_text())
    assert message == TerminationMessage(
        reason=Reason.HEARTBEAT_LOST, message="no heartbeat", step=7, checkpoint=CHECKPOINT
    )


@pytest.fixture
def endpoint():
    """A progress endpoint that records the reports."""
    received: list[tuple[str, ProgressReport]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.headers["Authorization"], ProgressReport.model_validate_json(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with serving(Handler) as address:
        yield f"{address}/status", received


def test_progress_posts_are_rate_limited_except_phase_changes(endpoint, tmp_path, monkeypatch):
    url, received = endpoint
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv(PROGRESS_URL_ENV, url)
    monkeypatch.setenv(PROGRESS_TOKEN_ENV, str(tmp_path / "token"))
    sink, other = HttpSink.from_environment(), RecordingSink()
    assert sink is not None
    for step in range(50):
        Sinks([sink, other]).report(progress(step))
    sink.report(progress(50, Phase.PUBLISHING))
    sink.close()
    assert len(other.seen) == 50
    assert len(received) <= 3
    assert {authorization for authorization, _ in received} == {"Bearer secret"}
    assert {"name": "phase", "value": "Publishing"} in [
        metric.model_dump() for metric in received[-1][1].trainer_status.metrics
    ]


def test_new_checkpoint_is_posted_before_the_next_interval(endpoint):
    url, received = endpoint
    sink = HttpSink(url, None)
    sink.report(progress(1))
    started = time.monotonic()
    while len(received) < 1 and time.monotonic() - started < 30:
        time.sleep(0.01)
    sink.report(progress(2).model_copy(update={"checkpoint": CHECKPOINT}))
    while len(received) < 2 and time.monotonic() - started < 30:
        time.sleep(0.01)
    assert time.monotonic() - started < INTERVAL_SECONDS - 1
    sink.close()


def test_heartbeat_repeats_the_last_report_except_between_steps():
    later, sink = datetime(2026, 1, 3, tzinfo=UTC), RecordingSink()
    heartbeat = Heartbeat(sink)
    heartbeat.repeat(later)
    assert sink.seen == []
    loading = progress(0).model_copy(update={"loss": None})
    for latest in (loading, progress(7), progress(100, Phase.EVALUATING)):
        heartbeat.report(latest)
        heartbeat.repeat(later)
    assert [(report.step, report.phase, report.updated_at == later) for report in sink.seen] == [
        (0, Phase.TRAINING, False),
        (0, Phase.TRAINING, True),
        (7, Phase.TRAINING, False),
        (100, Phase.EVALUATING, False),
        (100, Phase.EVALUATING, True),
    ]


def test_heartbeat_runs_in_a_thread():
    repeated = threading.Event()

    class Sink(RecordingSink):
        def report(self, progress: Progress) -> None:
            super().report(progress)
            if len(self.seen) == 3:
                repeated.set()

    with Heartbeat(Sink(), seconds=0.01) as heartbeat:
        heartbeat.report(progress(100, Phase.PUBLISHING))
        assert repeated.wait(timeout=60)


def test_http_sink_without_endpoint_is_none_and_a_dead_endpoint_is_ignored(monkeypatch):
    monkeypatch.delenv(PROGRESS_URL_ENV, raising=False)
    assert HttpSink.from_environment() is None
    sink = HttpSink("http://127.0.0.1:9/status", None)
    sink.report(progress(1))
    sink.close()


@pytest.mark.parametrize(
    ("error", "stopped", "reason"),
    [
        pytest.param(RuntimeError("issues during conversion"), True, Reason.INTERRUPTED, id="wrapped-by-a-library"),
        pytest.param(RuntimeError("issues during conversion"), False, Reason.TRAINER_ERROR, id="no-sigterm"),
        pytest.param(RunError(Reason.S3_DENIED, "no"), True, Reason.S3_DENIED, id="known-cause"),
        pytest.param(interrupted_error(7), True, Reason.INTERRUPTED, id="interrupted-error"),
    ],
)
def test_library_error_after_sigterm_is_interrupted(error: Exception, stopped: bool, reason: Reason) -> None:
    assert as_exit_error(error, stopped=stopped).reason is reason
