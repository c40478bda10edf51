"""Experiment trackers: what they receive, and that none of them can fail or delay a run."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qlora_api.names import SecretRole
from qlora_api.reasons import Reason
from qlora_api.report import StepRecord, ValidationRecord
from qlora_api.runconfig import RunConfig
from qlora_trainer.errors import RunError
from qlora_trainer.observability import trackers as tracking
from qlora_trainer.observability.trackers import TENSORBOARD_FOLDER, BackgroundTracker, copy_event_file, open_trackers
from qlora_trainer.storage.credentials import Credentials, Secrets, load_secrets
from tests.make import make_prepared, make_spec
from tests.unit.trainer.tiny import run_config, serving

STEPS = tuple(
    StepRecord(step=step, loss=4.0 / step, learning_rate=0.1, grad_norm=1.0, tokens=50, seconds=0.5) for step in (1, 2)
)
VALIDATION = ValidationRecord(step=2, loss=2.5, token_accuracy=0.5, seconds=1.0)
SECRETS = Secrets({role: Credentials() for role in SecretRole})


@pytest.fixture(autouse=True)
def patient_close(monkeypatch):
    """Wait for a tracker's start and end for as long as a busy machine may need."""
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 300.0)


def config_with(**tracking_spec) -> RunConfig:
    return run_config(make_spec(tracking=tracking_spec), make_prepared())


def track(config: RunConfig, work: Path, secrets: Secrets = SECRETS) -> list[str]:
    """Log two steps and a validation, and return the log messages."""
    notes: list[str] = []
    trackers = open_trackers(config, secrets, work, notes.append)
    for record in STEPS:
        trackers.log_step(record)
    trackers.log_validation(VALIDATION)
    trackers.close()
    return notes


def events_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_file_is_written_by_default_with_a_fixed_name(tmp_path):
    config, files = config_with(), tmp_path / "files"
    assert track(config, tmp_path) == []
    copy_event_file(tmp_path, config, files)
    assert [path.name for path in (files / TENSORBOARD_FOLDER).iterdir()] == ["events.out.tfevents.qlora"]
    assert events_of(files / TENSORBOARD_FOLDER) == {
        "train/loss": [(1, 4.0), (2, 2.0)],
        "train/grad_norm": [(1, 1.0), (2, 1.0)],
        "train/learning_rate": [(1, 0.1), (2, 0.1)],
        "train/tokens_per_second": [(1, 100.0), (2, 100.0)],
        "eval/loss": [(2, 2.5)],
        "eval/token_accuracy": [(2, 0.5)],
    }


def test_resumed_run_replays_earlier_steps_to_tensorboard(tmp_path):
    config = config_with()
    track(config, tmp_path)  # the earlier attempt, whose file is replaced
    trackers = open_trackers(config, SECRETS, tmp_path, pytest.fail)
    trackers.replay(STEPS[:1], ())
    trackers.log_step(STEPS[1])
    trackers.close()
    copy_event_file(tmp_path, config, tmp_path / "files")
    assert events_of(tmp_path / "files" / TENSORBOARD_FOLDER)["train/loss"] == [(1, 4.0), (2, 2.0)]


def test_without_tensorboard_there_is_no_file(tmp_path):
    config = config_with(tensorboard=False)
    assert track(config, tmp_path) == []
    copy_event_file(tmp_path, config, tmp_path / "files")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def mlflow() -> Iterator[tuple[str, list[tuple[str, str | None, dict]]]]:
    """A fake MLflow server that records requests, and has no run yet."""
    requests: list[tuple[str, str | None, dict]] = []
    answers = {
        "experiments/get-by-name": {"experiment": {"experiment_id": "7", "name": "bots"}},
        "runs/create": {"run": {"info": {"run_id": "r1", "run_uuid": "r1", "status": "RUNNING"}, "data": {}}},
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.partition("/mlflow/")[2].partition("?")[0]
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            requests.append((name, self.headers["Authorization"], body))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answers.get(name, {})).encode())

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with serving(Handler) as address:
        yield address, requests


@pytest.fixture
def clean_environment(monkeypatch):
    """MLflow takes its settings from the environment, so the tracker writes there."""
    for name in ("TRACKING_TOKEN", "HTTP_REQUEST_TIMEOUT", "HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(f"MLFLOW_{name}", "")
        monkeypatch.delenv(f"MLFLOW_{name}")


@pytest.mark.usefixtures("clean_environment")
def test_mlflow_logs_every_step_with_the_token_of_the_secret(mlflow, tmp_path):
    url, requests = mlflow
    secrets = Secrets(SECRETS.by_role | {SecretRole.MLFLOW: Credentials({"MLFLOW_TRACKING_TOKEN": "hush"})})
    config = config_with(tensorboard=False, mlflow={"uri": url, "experiment": "bots"})
    assert track(config, tmp_path, secrets) == []
    assert {authorization for _, authorization, _ in requests} == {"Bearer hush"}
    batches = [body["metrics"] for name, _, body in requests if name == "runs/log-batch"]
    metrics = [(metric["key"], metric["step"], metric["value"]) for batch in batches for metric in batch]
    assert [metric for metric in metrics if metric[0].endswith("/loss")] == [
        ("train/loss", 1, 4.0),
        ("train/loss", 2, 2.0),
        ("eval/loss", 2, 2.5),
    ]
    assert requests[-1][0] == "runs/update"
    assert requests[-1][2]["status"] == "FINISHED"


@pytest.mark.usefixtures("clean_environment")
def test_dead_tracker_is_logged_once_and_ignored(tmp_path):
    config = config_with(mlflow={"uri": "http://127.0.0.1:9", "experiment": "bots"})
    notes = track(config, tmp_path)
    assert len(notes) == 1
    assert notes[0].startswith("MLflow failed and is disabled for this run: ")
    assert events_of(tracking.tensorboard_folder(tmp_path, config))["train/loss"] == [(1, 4.0), (2, 2.0)]


def test_slow_tracker_does_not_block(monkeypatch):
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 0.1)
    released, notes = threading.Event(), []

    def connect():
        released.wait()
        raise TimeoutError

    slow = BackgroundTracker("a tracker", connect, notes.append)
    slow.log({"train/loss": 1.0}, 1)
    slow.finish()
    slow.join()
    assert notes[0].startswith("a tracker did not finish in 0 s")
    released.set()
    slow._thread.join()


def test_wandb_run_id_is_the_digest(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_with(tensorboard=False, wandb={"project": "bots"})
    assert track(config, tmp_path) == []
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (recorded,) = folder.glob("*.wandb")
    assert recorded.name == f"run-{config.prepared.digest}.wandb"
    # wandb's service process writes the file with a delay.
    deadline = time.monotonic() + 60
    while b"train/loss" not in recorded.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"train/loss" in recorded.read_bytes()


def test_missing_tracker_secret_fails_before_training(tmp_path):
    spec = make_spec(output={"secretRef": None}, tracking={"wandb": {"project": "bots", "secretRef": {"name": "key"}}})
    with pytest.raises(RunError, match=r"spec\.tracking\.wandb\.secretRef: Secret 'key'.*WANDB_API_KEY") as caught:
        load_secrets(spec, "ml", tmp_path)
    assert caught.value.reason == Reason.SECRET_NOT_FOUND
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "WANDB_API_KEY").write_text("hush\n")
    secrets = load_secrets(spec, "ml", tmp_path)
    assert secrets.of(SecretRole.WANDB).get("WANDB_API_KEY") == "hush"
    assert secrets.of(SecretRole.OUTPUT).keys == {}
