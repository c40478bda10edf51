"""Trackers: every metric of a training to TensorBoard, Weights & Biases and MLflow, each from a thread of its own."""

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
from qlora_api.report import StepRecord, ValidationRecord
from qlora_api.runconfig import RunConfig
from qlora_api.v1alpha1 import MlflowSpec, WandbSpec
from qlora_trainer.storage.credentials import Credentials, Secrets

TENSORBOARD_FOLDER: Final = "report/tensorboard"
_EVENT_FILE: Final = "events.out.tfevents.qlora"
"""TensorBoard knows its files by 'tfevents'; its own names have the host's name and the time in them."""
_REQUEST_SECONDS: Final = 10
"""Longest wait for one answer of a tracker."""
_CLOSE_SECONDS: Final = 20.0
"""Longest wait for what is still under way in the end."""
_WAITING: Final = 100_000
"""Metrics of so many steps may wait for a slow tracker; those beyond are left out."""

TrackedMetrics = dict[str, float]


class Tracker(Protocol):
    """A connection to one tracker; whatever it raises ends that tracker and nothing else."""

    def log(self, metrics: TrackedMetrics, step: int) -> None:
        """Report the metrics of a step."""

    def close(self) -> None:
        """Send what is waiting, and end the run there."""


def step_metrics(record: StepRecord) -> TrackedMetrics:
    """Return a step under the usual names."""
    return {
        "train/loss": record.loss,
        "train/grad_norm": record.grad_norm,
        "train/learning_rate": record.learning_rate,
        "train/tokens_per_second": record.tokens / record.seconds if record.seconds else 0.0,
    }


def validation_metrics(record: ValidationRecord) -> TrackedMetrics:
    """Return a look at the held-out rows under the usual names."""
    return {"eval/loss": record.loss, "eval/token_accuracy": record.token_accuracy}


class TensorBoard:
    """TensorBoard's event file."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (only where it is asked for)

        shutil.rmtree(folder, ignore_errors=True)
        self._writer: Any = SummaryWriter(log_dir=str(folder))

    def log(self, metrics: TrackedMetrics, step: int) -> None:
        """Write the metrics of a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is waiting."""
        self._writer.close()


class Wandb:
    """A run in Weights & Biases; a run that goes on after a stop is the same one there."""

    def __init__(self, spec: WandbSpec, credentials: Credentials, config: RunConfig, work: Path) -> None:
        # Its settings come too late for the line that it prints when it takes a key.
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # noqa: PLC0415 (takes seconds, and only where it is asked for)

        given = {"api_key": credentials.get("WANDB_API_KEY"), "base_url": spec.base_url}
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
                **{name: value for name, value in given.items() if value},
            ),
        )

    def log(self, metrics: TrackedMetrics, step: int) -> None:
        """Report the metrics of a step."""
        self._run.log(metrics, step=step)

    def close(self) -> None:
        """Wait for wandb's own process to send the rest."""
        self._run.finish()


class Mlflow:
    """A run in MLflow; a run that goes on after a stop is the same one there."""

    def __init__(self, spec: MlflowSpec, credentials: Credentials, config: RunConfig) -> None:
        # MLflow reads credentials and patience from the environment only.
        os.environ.update(credentials.keys)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(_REQUEST_SECONDS))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        import mlflow  # noqa: PLC0415 (takes seconds, and only where it is asked for)

        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient(tracking_uri=spec.uri)
        found = self._client.get_experiment_by_name(spec.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(spec.experiment)
        digest = config.prepared.digest
        runs = self._client.search_runs([experiment], f"tags.qlora_digest = '{digest}'", max_results=1)
        tags = {"mlflow.runName": config.job, "qlora_digest": digest}
        self._run = (runs[0] if runs else self._client.create_run(experiment, tags=tags)).info.run_id

    def log(self, metrics: TrackedMetrics, step: int) -> None:
        """Report the metrics of a step."""
        now = round(time.time() * 1000)
        values = [self._entities.Metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=values)

    def close(self) -> None:
        """Mark the run there as ended."""
        self._client.set_terminated(self._run)


class BackgroundTracker:
    """Feeds one tracker from a thread, so that it can neither fail nor delay the training."""

    def __init__(self, name: str, connect: Callable[[], Tracker], note: Callable[[str], None]) -> None:
        self._name = name
        self._connect = connect
        self._note = note
        self._waiting: queue.Queue[tuple[TrackedMetrics, int] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, metrics: TrackedMetrics, step: int) -> None:
        """Keep the metrics for the thread."""
        if not self._waiting.full():
            self._waiting.put((metrics, step))

    def finish(self) -> None:
        """Ask the thread to end once it has told everything."""
        if not self._waiting.full():
            self._waiting.put(None)

    def join(self) -> None:
        """Wait for that, for a while."""
        self._thread.join(timeout=_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._note(f"{self._name} has not taken everything in {_CLOSE_SECONDS:.0f} s; the run goes on without it")

    def _work(self) -> None:
        try:
            tracker = self._connect()
            while (entry := self._waiting.get()) is not None:
                tracker.log(*entry)
            tracker.close()
        except Exception as error:
            # Trackers raise what they like, and a training is worth more than its picture.
            self._note(f"{self._name} is given up, and the run goes on without it: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@dataclass(frozen=True)
class Trackers:
    """Everything that a run reports to."""

    tensorboard: BackgroundTracker | None
    others: tuple[BackgroundTracker, ...]

    def replay(self, steps: Sequence[StepRecord], held_out: Sequence[ValidationRecord]) -> None:
        """Give a new event file what an earlier attempt saw; the servers know it already."""
        if self.tensorboard is None:
            return
        for record in steps:
            self.tensorboard.log(step_metrics(record), record.step)
        for look in held_out:
            self.tensorboard.log(validation_metrics(look), look.step)

    def log_step(self, record: StepRecord) -> None:
        """Report a finished step."""
        self._log(step_metrics(record), record.step)

    def log_validation(self, record: ValidationRecord) -> None:
        """Report a look at the held-out rows."""
        self._log(validation_metrics(record), record.step)

    def close(self) -> None:
        """End every tracker, whatever became of the run."""
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
    """Return the trackers that the spec names; they connect in the background."""
    spec = config.spec.tracking
    board = (
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
    return Trackers(board, tuple(others))


def tensorboard_folder(work: Path, config: RunConfig) -> Path:
    """Return where the event file grows: `tensorboard --logdir` shows it while the training goes on."""
    return work / "tensorboard" / config.prepared.digest


def copy_event_file(work: Path, config: RunConfig, files: Path) -> None:
    """Put the event file among the files of the result, if there is one."""
    for events in tensorboard_folder(work, config).glob("*tfevents*"):
        target = files / TENSORBOARD_FOLDER / _EVENT_FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(events, target)
