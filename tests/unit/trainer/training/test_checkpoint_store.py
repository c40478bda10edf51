"""Checkpoints: content, resuming bit for bit, and how broken ones are skipped."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import Mock

import boto3
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from moto import mock_aws
from safetensors.torch import load_file

from qlora_api.reasons import Reason
from qlora_api.report import RunReport, StepRecord, ValidationRecord
from qlora_api.runconfig import RunConfig, S3Config
from qlora_api.v1alpha1 import Checkpoint, CheckpointSpec, EarlyStoppingSpec, LoraSpec, QuantizationSpec, TrainingSpec
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RunError, StopRequested
from qlora_trainer.model.base_model import attach_lora, load_base
from qlora_trainer.model.optimizer import OptimizerKind
from qlora_trainer.prepare import prepare
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.storage.credentials import Credentials
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.s3 import S3Store
from qlora_trainer.storage.store import OUTPUT_FIELD
from qlora_trainer.training.async_checkpointer import AsyncCheckpointer
from qlora_trainer.training.checkpoint_store import CheckpointCallbacks, CheckpointStore, RunFingerprint
from qlora_trainer.training.loop import Schedule, TrainingCallbacks, TrainingLoop, make_loop
from qlora_trainer.training.state import History, TrainingState
from tests.unit.trainer.states import FINGERPRINT, STEPS, make_state
from tests.unit.trainer.stopping import NEVER, FreshProcesses
from tests.unit.trainer.tiny import (
    CPU,
    prepare_config,
    run_config,
    write_job,
    write_model,
)
from tests.unit.trainer.tuned import NO_CALLBACKS, SETTINGS, make_test_loop, make_trainable, token_rows

VALIDATION = {"evaluate_every": 2, "keep": "best", "early_stopping": EarlyStoppingSpec(patience=9)}
STARTED = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


def make_nf4_loop(folder: Path, kind: OptimizerKind = OptimizerKind.ADAMW) -> TrainingLoop:
    """A fresh loop as in a new process, with packing and dropout."""
    base = load_base(folder, QuantizationSpec(bits=4), torch.float32, "sdpa", "cpu")
    lora = LoraSpec(rank=4, alpha=8, dropout=0.2, targets=("q_proj", "v_proj"))
    runtime_settings = dataclasses.replace(SETTINGS, optimizer=kind)
    training = TrainingSpec(global_batch_size=8, learning_rate=0.01, warmup_ratio=0.3, weight_decay=0.01, **VALIDATION)
    trainable = attach_lora(base, lora, 1, runtime_settings)
    loop = make_loop(trainable, token_rows(12), Schedule(training, 4, STEPS), runtime_settings, World(CPU))
    return dataclasses.replace(loop, held_out=token_rows(6, seed=1))


def make_checkpoints(
    folder: Path, fingerprint: RunFingerprint = FINGERPRINT, attempt: int = 1, completed: list[Checkpoint] | None = None
) -> tuple[CheckpointStore, list[str]]:
    notes: list[str] = []
    callbacks = CheckpointCallbacks(notes.append, (completed if completed is not None else []).append)
    return CheckpointStore(FileStore(f"file://{folder}", OUTPUT_FIELD), fingerprint, attempt, STARTED, callbacks), notes


def make_checkpointer(
    checkpoints: CheckpointStore, step: int = 0, notes: list[str] | None = None, **spec
) -> AsyncCheckpointer:
    """Saves every step and waits for each checkpoint: these runs would end before the first upload."""

    class Waiting(AsyncCheckpointer):
        def checkpoint(self, state: TrainingState, last: bool) -> None:  # noqa: ARG002 (AsyncCheckpointer's signature)
            super().checkpoint(state, last=True)

    note = (notes if notes is not None else []).append
    return Waiting(checkpoints, CheckpointSpec(**{"steps": 1} | spec), note, step)


def weights_of(loop: TrainingLoop) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in loop.trainable.parameters()]


def make_callbacks(checkpointer: AsyncCheckpointer, **overrides) -> TrainingCallbacks:
    """Callbacks that save checkpoints."""
    return dataclasses.replace(
        NO_CALLBACKS,
        should_checkpoint=checkpointer.should_checkpoint,
        checkpoint=checkpointer.checkpoint,
        **overrides,
    )


def maybe_checkpoint(checkpointer: AsyncCheckpointer, step: int, *, last: bool) -> None:
    """Save a checkpoint if it is due, as the loop does after a step."""
    if checkpointer.should_checkpoint(step, last):
        checkpointer.checkpoint(make_state(step), last)


def train(loop: TrainingLoop, checkpoints: CheckpointStore, stop_after: int = 0, **spec) -> History:
    stop, loaded = StopFlag(), checkpoints.load_latest()

    def request_stop(record: StepRecord) -> None:
        stop.requested = record.step == stop_after

    checkpointer = make_checkpointer(checkpoints, loaded.checkpoint_id.step if loaded else 0, **spec)
    return loop.run(stop, make_callbacks(checkpointer, on_step=request_stop), loaded.state if loaded else None)


def without_seconds(history: History) -> list[StepRecord | ValidationRecord]:
    return [record.model_copy(update={"seconds": 0.0}) for record in (*history.steps, *history.validations)]


@pytest.mark.parametrize("kind", [OptimizerKind.ADAMW, OptimizerKind.ADAMW_8BIT])
def test_trap_30_run_stopped_after_any_step_resumes_bit_for_bit(model_folder, tmp_path, kind):
    uninterrupted = make_nf4_loop(model_folder, kind)
    expected = train(uninterrupted, make_checkpoints(tmp_path / "uninterrupted")[0])
    for step in range(1, STEPS):
        checkpoints, _ = make_checkpoints(tmp_path / f"{step}")
        with pytest.raises(RunError) as caught:
            train(make_nf4_loop(model_folder, kind), checkpoints, stop_after=step, every="1h", steps=None)
        assert (caught.value.reason, caught.value.step) == (Reason.INTERRUPTED, step)
        resumed = make_nf4_loop(model_folder, kind)
        found = train(resumed, make_checkpoints(tmp_path / f"{step}")[0])
        assert without_seconds(found) == without_seconds(expected)
        assert all(torch.equal(*pair) for pair in zip(weights_of(uninterrupted), weights_of(resumed), strict=True))


def test_interrupted_validation_is_repeated_after_resume(model_folder, tmp_path):
    stop, resumed = StopFlag(), make_nf4_loop(model_folder)

    def interrupt() -> None:
        stop.requested = True

    callbacks = make_callbacks(make_checkpointer(make_checkpoints(tmp_path)[0]), on_heartbeat=interrupt)
    with pytest.raises(RunError) as caught:
        make_nf4_loop(model_folder).run(stop, callbacks)
    assert caught.value.step == 2
    history = train(resumed, make_checkpoints(tmp_path)[0])
    assert [validation.step for validation in history.validations] == [2, 4, 5]


@pytest.fixture(scope="module")
def saved(model_folder, tmp_path_factory) -> Path:
    """A folder with the checkpoints of steps 4 and 5."""
    folder = tmp_path_factory.mktemp("saved")
    train(make_nf4_loop(model_folder), make_checkpoints(folder)[0])
    return folder


def step_folders(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.rglob("manifest.json"))


def test_prune_keeps_the_newest_and_delete_all_removes_the_rest(saved, tmp_path):
    assert step_folders(saved) == ["step-000004-a1", "step-000005-a1"]
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    make_checkpoints(tmp_path)[0].delete_all()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_checkpoint_is_due_by_time_by_steps_and_at_the_end(tmp_path):
    def saved_folders(last: bool = False, **spec) -> list[str]:
        folder = tmp_path / json.dumps([spec, last])
        checkpointer = make_checkpointer(make_checkpoints(folder)[0], **spec)
        for step in (1, 2, 3):
            maybe_checkpoint(checkpointer, step, last=last and step == 3)
        return step_folders(folder)

    assert saved_folders(steps=2) == ["step-000002-a1"]
    assert saved_folders(steps=None, every="1h") == []
    assert saved_folders(steps=None, every="1h", last=True) == ["step-000003-a1"]


def test_peak_memory_is_the_maximum_over_attempts(tmp_path):
    """The first attempt needs 9 bytes, the second, which resumes from it, 5."""
    for step, peak in ((1, 9), (2, 5)):
        checkpoints, _ = make_checkpoints(tmp_path)
        checkpoints.load_latest()
        state = dataclasses.replace(make_state(step), peak_memory_bytes=peak)
        checkpoints.save(state, keep=2)
    third, _ = make_checkpoints(tmp_path)
    assert (third.load_latest().state.peak_memory_bytes, third.peak_memory_bytes) == (0, 9)


def test_training_state_has_its_peak_memory():
    captured = []
    loop = make_test_loop(make_trainable(), token_rows(8), steps=1)
    callbacks = dataclasses.replace(
        NO_CALLBACKS, should_checkpoint=lambda *_: True, checkpoint=lambda state, _: captured.append(state)
    )
    loop.run(StopFlag(), callbacks)
    assert captured[-1].peak_memory_bytes > 1 << 26  # torch alone takes more


def test_prune_with_broken_checkpoints_keeps_the_valid_ones(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / FINGERPRINT.digest / "checkpoints/step-000005-a1/adapter.safetensors").write_bytes(b"cut")
    checkpoints, _ = make_checkpoints(tmp_path)
    checkpointer = make_checkpointer(checkpoints, keep=1)
    maybe_checkpoint(checkpointer, 3, last=True)
    assert step_folders(tmp_path) == ["step-000003-a1", "step-000004-a1", "step-000005-a1"]
    maybe_checkpoint(checkpointer, 4, last=True)
    assert step_folders(tmp_path) == ["step-000004-a1", "step-000005-a1"]


class Gated(FileStore):
    """A slow store: an upload blocks until the gate is opened."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"file://{folder}", OUTPUT_FIELD)
        self.opened, self.fault = threading.Event(), None

    def put(self, path: str, source: Path | bytes, *, if_none_match: bool = False) -> bool:
        assert self.opened.wait(30)
        if self.fault is not None:
            raise self.fault
        return super().put(path, source, if_none_match=if_none_match)


@pytest.fixture
def gated(tmp_path) -> Gated:
    return Gated(tmp_path)


def slow_checkpointer(store: Gated, notes: list[str]) -> AsyncCheckpointer:
    checkpoints = CheckpointStore(store, FINGERPRINT, 1, STARTED, CheckpointCallbacks(notes.append, lambda _: None))
    return AsyncCheckpointer(checkpoints, CheckpointSpec(steps=1), notes.append, 0)


def test_async_checkpoint_does_not_block_steps_and_the_last_one_waits(gated, tmp_path):
    checkpointer = slow_checkpointer(gated, [])
    for step in (1, 2, 3):
        maybe_checkpoint(checkpointer, step, last=False)
    assert step_folders(tmp_path) == []
    threading.Timer(0.1, gated.opened.set).start()
    maybe_checkpoint(checkpointer, 4, last=True)
    assert step_folders(tmp_path) == ["step-000001-a1", "step-000004-a1"]


def test_step_under_checkpoint_is_not_saved_twice_at_the_end(gated, tmp_path):
    checkpointer = slow_checkpointer(gated, [])
    maybe_checkpoint(checkpointer, 1, last=False)
    gated.opened.set()
    assert not checkpointer.should_checkpoint(1, last=True)
    assert step_folders(tmp_path) == ["step-000001-a1"]


@pytest.mark.parametrize(
    "fault",
    [RunError(Reason.S3_UNAVAILABLE, "no answer"), MemoryError("no answer")],
    ids=["store-unavailable", "crash"],
)
def test_failed_checkpoint_is_logged_and_retried(gated, tmp_path, fault):
    notes: list[str] = []
    checkpointer = slow_checkpointer(gated, notes)
    gated.fault = fault
    gated.opened.set()
    maybe_checkpoint(checkpointer, 1, last=False)
    checkpointer.close()
    assert notes == ["checkpoint of step 1 failed, will be retried: no answer"]
    gated.fault = None
    assert checkpointer.should_checkpoint(1, last=False)
    maybe_checkpoint(checkpointer, 2, last=True)
    assert step_folders(tmp_path) == ["step-000002-a1"]


def test_history_with_a_step_that_fp16_skipped_is_resumed(tmp_path):
    """JSON has no infinity, so the gradient norm of such a step is null there."""
    state = make_state(2)
    skipped = state.history.steps[0].model_copy(update={"grad_norm": math.inf})
    history = History([skipped, state.history.steps[1]])
    make_checkpoints(tmp_path)[0].save(dataclasses.replace(state, history=history), keep=1)
    assert make_checkpoints(tmp_path)[0].load_latest().state.history.steps == history.steps


def test_trap_39_overlapping_attempts_write_separate_folders(tmp_path):
    first, second = make_checkpoints(tmp_path, attempt=1)[0], make_checkpoints(tmp_path, attempt=2)[0]
    for checkpoints in (first, second, first):
        checkpoints.save(make_state(3), keep=9)
    assert step_folders(tmp_path) == ["step-000003-a1", "step-000003-a2"]
    assert make_checkpoints(tmp_path)[0].load_latest().checkpoint_id.attempt == 2


@pytest.mark.parametrize(
    ("existing", "attempt", "expected"),
    [
        pytest.param([], 1, "step-000009-a1", id="first"),
        pytest.param(["step-000004-a1"], 2, "step-000009-a2", id="next"),
        pytest.param(["step-000004-a1"], 1, "step-000009-a2", id="always-attempt-1"),
        pytest.param(["step-000004-a3"], 5, "step-000009-a5", id="after-attempts-without-checkpoint"),
    ],
)
def test_attempt_writes_a_folder_no_earlier_attempt_used(tmp_path, existing, attempt, expected):
    for name in existing:
        (tmp_path / FINGERPRINT.digest / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / FINGERPRINT.digest / "checkpoints" / name / "record.json").write_text("{}")
    checkpoints, _ = make_checkpoints(tmp_path, attempt=attempt)
    assert checkpoints.load_latest() is None
    checkpoints.save(make_state(9), keep=9)
    assert step_folders(tmp_path) == [expected]


def test_on_complete_is_called_after_save_and_after_load(tmp_path):
    completed: list[Checkpoint] = []
    make_checkpoints(tmp_path, completed=completed)[0].save(make_state(3), keep=2)
    make_checkpoints(tmp_path, completed=completed, attempt=2)[0].load_latest()
    assert completed[0] == completed[1]
    uri = f"file://{tmp_path}/{FINGERPRINT.digest}/checkpoints/step-000003-a1"
    assert (completed[0].step, completed[0].uri, completed[0].verified) == (3, uri, True)


def make_bucket() -> S3Store:
    keys = Credentials({"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"})
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="adapters")
    return S3Store("s3://adapters/team-a/job", OUTPUT_FIELD, keys, S3Config())


def in_bucket(store: S3Store, completed: list[Checkpoint], notes: list[str]) -> CheckpointStore:
    return CheckpointStore(store, FINGERPRINT, 1, STARTED, CheckpointCallbacks(notes.append, completed.append))


def test_checkpoints_in_s3_are_loaded_and_deleted(monkeypatch):
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    completed, notes = [], []
    with mock_aws():
        store = make_bucket()
        checkpoints = in_bucket(store, completed, notes)
        assert checkpoints.load_latest() is None
        for step in (1, 2):
            checkpoints.save(make_state(step), keep=1)
        found = in_bucket(store, completed, notes).load_latest()
        assert (found.checkpoint_id.step, found.state.optimizer["0/note"]) == (2, 3)
        assert {entry.path.rsplit("/", 2)[1] for entry in store.list()} == {"step-000002-a1"}
        checkpoints.delete_all()
        assert store.list() == ()
    # moto returns the digest that it was sent and computes none itself, so nothing is verified.
    assert [(checkpoint.step, checkpoint.verified) for checkpoint in completed] == [(1, False), (2, False), (2, False)]
    assert [note.partition(",")[0] for note in notes] == ["resumed from step 2"]


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda folder: (folder / "adapter.safetensors").write_bytes(b"cut"), id="truncated-file"),
        pytest.param(lambda folder: (folder / "optimizer.safetensors").unlink(), id="missing-file"),
        pytest.param(lambda folder: (folder / "record.json").write_text("{}"), id="changed-file"),
        pytest.param(lambda folder: (folder / "manifest.json").write_text("{"), id="truncated-manifest"),
    ],
)
def test_load_latest_skips_broken_checkpoints(saved, tmp_path, broken: Callable[[Path], object]):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    broken(tmp_path / FINGERPRINT.digest / "checkpoints/step-000005-a1")
    checkpoints, notes = make_checkpoints(tmp_path)
    found = checkpoints.load_latest()
    assert found is not None
    assert found.checkpoint_id.step == found.state.step == 4
    assert "step-000005-a1 skipped: " in notes[0]
    assert notes[1].startswith("resumed from step 4, checkpoint file://")


@pytest.mark.parametrize("method", ["list", "read", "download"])
@pytest.mark.parametrize(
    "error",
    [
        RunError(Reason.S3_UNAVAILABLE, "spec.output.uri: GetObject fails with 503"),
        RunError(Reason.S3_DENIED, "spec.output.uri: GetObject is refused (ExpiredToken)"),
        OSError(errno.ENOSPC, "No space left on device"),
        MemoryError(),
    ],
    ids=["unavailable", "denied", "no-space", "no-memory"],
)
def test_checkpoint_that_cannot_be_read_now_is_not_skipped(saved, monkeypatch, method, error):
    """An intact checkpoint may be there: the next attempt resumes from it, and nothing is trained twice."""
    monkeypatch.setattr(FileStore, method, Mock(side_effect=error))
    checkpoints, notes = make_checkpoints(saved)
    with pytest.raises(type(error)):
        checkpoints.load_latest()
    assert notes == []


@pytest.mark.usefixtures("stop")
@pytest.mark.parametrize("method", ["read", "download"])
def test_sigterm_while_a_checkpoint_is_read_ends_the_run(saved, monkeypatch, method):
    """It skips no checkpoint: the run would train from step 0, and stop after one step."""
    monkeypatch.setattr(FileStore, method, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    checkpoints, notes = make_checkpoints(saved)
    with pytest.raises(StopRequested):
        checkpoints.load_latest()
    assert notes == []


def test_load_latest_resumes_from_checkpoint_of_newer_version(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / FINGERPRINT.digest / "checkpoints/step-000005-a1"
    record = json.loads((folder / "record.json").read_text())
    record["course"]["tomorrow"] = record["steps"][0]["tomorrow"] = record["tomorrow"] = {"a": 1}
    (folder / "record.json").write_text(json.dumps(record))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tomorrow"] = True
    for file in manifest["files"]:
        content = (folder / file["path"]).read_bytes()
        file |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "tomorrow": None}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = make_checkpoints(tmp_path)[0].load_latest()
    assert found is not None
    assert found.state.step == 5


def test_load_latest_logs_and_skips_foreign_folders(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / FINGERPRINT.digest / "checkpoints"
    (folder / "step-000005-a1/manifest.json").unlink()
    (folder / "step-000004-a1").rename(folder / "step-four")
    checkpoints, notes = make_checkpoints(tmp_path)
    assert checkpoints.load_latest() is None
    assert notes == [
        f"checkpoint {FINGERPRINT.digest}/checkpoints/step-000005-a1 skipped: it has no manifest.json, so it is "
        "incomplete",
        f"checkpoint {FINGERPRINT.digest}/checkpoints/step-four skipped: its name is not step-NNNNNN-aN",
    ]


def test_prune_deletes_incomplete_checkpoints_of_earlier_attempts(tmp_path):
    folder = tmp_path / FINGERPRINT.digest / "checkpoints"
    for name in ("step-000002-a1", "step-000009-a1", "step-000002-a3"):
        (folder / name).mkdir(parents=True)
        (folder / name / "record.json").write_text("{}")
    make_checkpoints(tmp_path, attempt=2)[0].save(make_state(3), keep=2)
    left = sorted(path.parent.name for path in folder.glob("*/record.json"))
    assert left == ["step-000002-a3", "step-000003-a2", "step-000009-a1"]


def test_trap_37_checkpoint_with_another_fingerprint_is_refused(saved):
    checkpoints, notes = make_checkpoints(saved, FINGERPRINT.model_copy(update={"total_steps": 9}))
    assert checkpoints.load_latest() is None
    assert "it was saved by a run with other settings: totalSteps was 5 and is 9" in notes[0]


def test_failed_checkpoint_does_not_end_the_run(tmp_path):
    (tmp_path / FINGERPRINT.digest).write_text("a file where the folder should be")
    notes: list[str] = []
    maybe_checkpoint(make_checkpointer(make_checkpoints(tmp_path)[0], notes=notes), 1, last=False)
    assert notes[0].startswith("checkpoint of step 1 failed, will be retried: ")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("job")
    spec = write_job(folder, evaluation={"generations": 0}, training={"evaluateEvery": 2})
    return run_config(spec, prepare(prepare_config(spec), work=folder / "work"), total_steps=STEPS)


def moved(config: RunConfig, folder: Path) -> RunConfig:
    """The same run with a separate output."""
    source = Path(config.prepared.prefix.removeprefix("file://"))
    shutil.copytree(source, folder / "colours" / source.name)
    output = config.spec.output.model_copy(update={"uri": f"file://{folder}"})
    prepared = config.prepared.model_copy(update={"prefix": f"file://{folder}/colours/{source.name}"})
    spec = config.spec.model_copy(update={"output": output})
    return config.model_copy(update={"spec": spec, "prepared": prepared})


def result_folder(config: RunConfig) -> Path:
    return Path(config.prepared.prefix.removeprefix("file://"))


def adapter_of(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(result_folder(config) / "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> RunConfig:
    run = moved(config, tmp_path_factory.mktemp("uninterrupted"))
    FreshProcesses().run_until(run, NEVER, tmp_path_factory.mktemp("work"))
    return run


@settings(max_examples=3, deadline=None, phases=[Phase.generate])
@given(stops=st.sets(st.integers(1, STEPS - 1), min_size=1))
def test_run_stopped_after_any_steps_resumes_in_new_processes(stops, config, uninterrupted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    stopped, processes, before = moved(config, folder / "output"), FreshProcesses(), None
    for step in [*sorted(stops), NEVER]:
        notes = processes.run_until(stopped, step, folder / "work")
        resumed = [note.partition(",")[0] for note in notes if note.startswith("resumed")]
        assert resumed == ([f"resumed from step {before}"] if before else [])
        before = step
    expected, found = adapter_of(uninterrupted), adapter_of(stopped)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    report = RunReport.model_validate_json((result_folder(stopped) / "report/report.json").read_text())
    assert [record.step for record in report.history] == [1, 2, 3, 4, 5]
    assert [record.step for record in report.held_out] == [2, 4]
    assert report.adapter_step == STEPS
    assert step_folders(result_folder(stopped) / "checkpoints") == []
