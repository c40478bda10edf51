"""Experiment trackers: TensorBoard, Weights & Biases and MLflow, each fed from its own thread."""

import contextlib
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from qlora_api.names import SecretRole
from qlora_api.object_names import ObjectName
from qlora_api.report import StepRecord, ValidationRecord
from qlora_api.runconfig import RunConfig
from qlora_api.v1alpha1 import MlflowSpec, WandbSpec
from qlora_trainer.storage.credentials import Credentials, Secrets

TENSORBOARD_FOLDER: Final = "report/tensorboard"
_EVENT_FILE: Final = "events.out.tfevents.qlora"
"""TensorBoard finds event files by 'tfevents'; its default names contain host and time."""
_REQUEST_SECONDS: Final = 10
"""Timeout of one request to a tracker."""
_CLOSE_SECONDS: Final = 20.0
"""Longest wait for pending metrics at the end of a run."""
_QUEUE_SIZE: Final = 100_000
"""Steps that may be queued for a slow tracker; metrics beyond that are dropped."""

TrackedMetrics = dict[str, float]


class Tracker(Protocol):
    """A connection to one tracker; an exception disables this tracker only."""

    def log(self, metrics: TrackedMetrics, step: int) -> None:
        """Log the metrics of a step."""

    def close(self) -> None:
        """Send pending metrics, and finish the tracker's run."""


def step_metrics(record: StepRecord) -> TrackedMetrics:
    """Return a step's metrics under the usual names."""
    return {
        "train/loss": record.loss,
        "train/grad_norm": record.grad_norm,
        "train/learning_rate": record.learning_rate,
        "train/tokens_per_second": record.tokens / record.seconds if record.seconds else 0.0,
    }


def validation_metrics(record: ValidationRecord) -> TrackedMetrics:
    """Return a validation's metrics under the usual names."""
    return {"eval/loss": record.loss, "eval/token_accuracy": record.token_accuracy}


class TensorBoard:
    """TensorBoard's event file."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (only if the spec has it)

        shutil.rmtree(folder, ignore_errors=True)
        self._writer: Any = SummaryWriter(log_dir=str(folder))

    def log(self, metrics: TrackedMetrics, step: int) -> None:
        """Write the metrics of a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write pending metrics."""
        self._writer.close()


def set_up_wandb(work: Path) -> None:
    """Let wandb read ./wandb/settings, which may name a server, where nobody else writes; its first call does."""
    import wandb  # noqa: PLC0415 (as above)

    with contextlib.chdir(work):
        wandb.setup()


class Wandb:
    """A run in Weights & Biases; a resumed run continues the same W&B run."""

    def __init__(self, spec: WandbSpec, credentials: Credentials, config: RunConfig, work: Path) -> None:
        # wandb prints a line when it gets an API key, before `settings` takes effect.
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # noqa: PLC0415 (takes seconds, and only if the spec has it)

        set_up_wandb(work)
        options = {"api_key": credentials.get("WANDB_API_KEY"), "base_url": spec.base_url}
        self._run = wandb.init(
            project=spec.project,
            entity=spec.entity,
            name=config.job,
            id=config.prepared.digest,
            resume="allow",
            config=config.spec.model_dump(mode="json", by_alias=True),
            settings=wandb.Settings(
                root_dir=str(work),
                init_timeout=_REQUEST_SECONDS,
                console="off",
                silent=True,
                **{name: value for name, value in options.items() if value},
            ),
        )

    def log(self, metrics: TrackedMetrics, step: int) -> None:
        """Log the metrics of a step."""
        self._run.log(metrics, step=step)

    def close(self) -> None:
        """Wait for wandb's service process to send the rest."""
        self._run.finish()


class Mlflow:
    """A run in MLflow; a resumed run continues the same MLflow run."""

    def __init__(self, spec: MlflowSpec, credentials: Credentials, config: RunConfig) -> None:
        # MLflow reads credentials and timeouts from the environment only.
        os.environ.update(credentials.keys)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(_REQUEST_SECONDS))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        import mlflow  # noqa: PLC0415 (takes seconds, and only if the spec has it)

        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient(tracking_uri=spec.uri)
        found = self._client.get_experiment_by_name(spec.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(spec.experiment)
        digest = config.prepared.digest
        runs = self._client.search_runs([experiment], f"tags.qlora_digest = '{digest}'", max_results=1)
        tags = {"mlflow.runName": config.job, "qlora_digest": digest}
        self._run = (runs[0] if runs else self._client.create_run(experiment, tags=tags)).info.run_id

    def log(self, metrics: TrackedMetrics, step: int) -> None:
        """Log the metrics of a step."""
        now = round(time.time() * 1000)
        values = [self._entities.Metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=values)

    def close(self) -> None:
        """Mark the MLflow run as finished."""
        self._client.set_terminated(self._run)


class BackgroundTracker:
    """Feeds one tracker from a thread, so that it can neither fail nor delay training."""

    def __init__(self, name: str, connect: Callable[[], Tracker], note: Callable[[str], None]) -> None:
        self._name = name
        self._connect = connect
        self._note = note
        self._queue: queue.Queue[tuple[TrackedMetrics, int] | None] = queue.Queue(_QUEUE_SIZE)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, metrics: TrackedMetrics, step: int) -> None:
        """Queue the metrics for the thread."""
        if not self._queue.full():
            self._queue.put((metrics, step))

    def finish(self) -> None:
        """Ask the thread to end once the queue is empty."""
        if not self._queue.full():
            self._queue.put(None)

    def join(self) -> None:
        """Wait for the thread to end, in bounded time."""
        self._thread.join(timeout=_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._note(f"{self._name} did not finish in {_CLOSE_SECONDS:.0f} s; the run continues without it")

    def _work(self) -> None:
        try:
            tracker = self._connect()
            while (entry := self._queue.get()) is not None:
                tracker.log(*entry)
            tracker.close()
        except Exception as error:
            # A tracker may raise anything, and must never end a run.
            self._note(f"{self._name} failed and is disabled for this run: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@dataclass(frozen=True)
class Trackers:
    """All trackers of a run."""

    tensorboard: BackgroundTracker | None
    others: tuple[BackgroundTracker, ...]

    def replay(self, steps: Sequence[StepRecord], held_out: Sequence[ValidationRecord]) -> None:
        """Log the records of earlier attempts to the new event file; the servers have them already."""
        if self.tensorboard is None:
            return
        for record in steps:
            self.tensorboard.log(step_metrics(record), record.step)
        for validation in held_out:
            self.tensorboard.log(validation_metrics(validation), validation.step)

    def log_step(self, record: StepRecord) -> None:
        """Log a finished step."""
        self._log(step_metrics(record), record.step)

    def log_validation(self, record: ValidationRecord) -> None:
        """Log a validation."""
        self._log(validation_metrics(record), record.step)

    def close(self) -> None:
        """Close every tracker, also after a failed run."""
        for tracker in self._all():
            tracker.finish()
        for tracker in self._all():
            tracker.join()

    def _log(self, metrics: TrackedMetrics, step: int) -> None:
        for tracker in self._all():
            tracker.log(metrics, step)

    def _all(self) -> tuple[BackgroundTracker, ...]:
        return (*((self.tensorboard,) if self.tensorboard else ()), *self.others)


def open_trackers(config: RunConfig, secrets: Secrets, work: Path, note: Callable[[str], None]) -> Trackers:
    """Return the trackers in the spec; they connect in the background."""
    spec = config.spec.tracking
    tensorboard = (
        BackgroundTracker("TensorBoard", lambda: TensorBoard(tensorboard_folder(work, config)), note)
        if spec.tensorboard
        else None
    )
    others = []
    if (wandb := spec.wandb) is not None:
        key = secrets.of(SecretRole.WANDB)
        others.append(BackgroundTracker("Weights & Biases", lambda: Wandb(wandb, key, config, work), note))
    if (mlflow := spec.mlflow) is not None:
        keys = secrets.of(SecretRole.MLFLOW)
        others.append(BackgroundTracker("MLflow", lambda: Mlflow(mlflow, keys, config), note))
    return Trackers(tensorboard, tuple(others))


def tensorboard_folder(work: Path, config: RunConfig) -> Path:
    """Return the folder of the event file; `tensorboard --logdir` can follow it during training."""
    return ObjectName(config.prepared.digest).below(work / "tensorboard")


def copy_event_file(work: Path, config: RunConfig, files: Path) -> None:
    """Copy the event file into the result, if there is one."""
    for events in tensorboard_folder(work, config).glob("*tfevents*"):
        target = files / TENSORBOARD_FOLDER / _EVENT_FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(events, target)
