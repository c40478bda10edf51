"""`make bench-checkpoints`: the share of a training's time that it waits for its checkpoints in S3."""

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from qlora_trainer.__main__ import configure_libraries
from qlora_trainer.runtime.rank import default_work

configure_libraries(default_work())  # as a pod does, before the libraries are imported

from benchmarks.trainer.machine import observe_machine  # noqa: E402
from benchmarks.trainer.ready import PreparedRun, prepare_run  # noqa: E402
from examples.quickstart.make_data import DATA, HELD_OUT, TRAIN  # noqa: E402
from examples.quickstart.make_model import DEFAULT_MIRROR, make_model  # noqa: E402
from qlora_api.v1alpha1 import QLoRAJobSpec  # noqa: E402
from qlora_trainer import stages  # noqa: E402
from qlora_trainer.runtime.shutdown import StopFlag  # noqa: E402
from qlora_trainer.storage.results import MANIFEST  # noqa: E402
from qlora_trainer.training.async_checkpointer import AsyncCheckpointer  # noqa: E402
from qlora_trainer.training.checkpoint_store import CheckpointCallbacks, CheckpointStore  # noqa: E402
from qlora_trainer.training.loop import TrainingCallbacks  # noqa: E402
from qlora_trainer.training.state import TrainingState  # noqa: E402
from tests.cluster.processes import Processes  # noqa: E402
from tests.cluster.s3 import start_s3  # noqa: E402

RESULT: Final = Path(__file__).parents[1] / "results" / "checkpoints.json"
STEPS: Final = 30
INTERVALS: Final = (10, 2)
"""Steps from one checkpoint to the next. The default, ten minutes, is hundreds of such steps."""


@dataclass
class TimedCheckpointer:
    """A keeper with a stopwatch: what passes between the end of a step and the next step's begin."""

    checkpointer: AsyncCheckpointer
    seconds: float = 0.0
    last_seconds: float = 0.0
    """Of that, for the checkpoint at the end, which is complete before the adapter is examined."""
    count: int = 0
    _asked_at: float = field(default=0.0, init=False)

    def should_checkpoint(self, step: int, last: bool) -> bool:
        """Ask the keeper; the state is captured between its yes and the call of keep."""
        self._asked_at = time.perf_counter()
        wanted = self.checkpointer.should_checkpoint(step, last)
        if not wanted:
            self._add(last)
        return wanted

    def checkpoint(self, state: TrainingState, last: bool) -> None:
        """Let it be kept."""
        self.checkpointer.checkpoint(state, last)
        self.count += 1
        self._add(last)

    def _add(self, last: bool) -> None:
        waited = time.perf_counter() - self._asked_at
        self.seconds += waited
        self.last_seconds += waited * last


@dataclass(frozen=True)
class Measurement:
    """A training with a checkpoint each so many steps."""

    interval: int
    checkpoints: int
    checkpoint_bytes: int
    training_seconds: float
    waiting_seconds: float
    waiting_at_the_end_seconds: float

    @property
    def waiting_share(self) -> float:
        """Part of the training's wall time."""
        return self.waiting_seconds / self.training_seconds


def main() -> None:
    """Measure each interval, print and write it down."""
    machine, measurements = observe_machine(), []
    model = make_model(DEFAULT_MIRROR, print)
    for interval in INTERVALS:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            measurement = measure(interval, model, Path(folder))
        measurements.append(measurement)
        print(
            f"a checkpoint of {measurement.checkpoint_bytes / 1e6:.1f} MB each {interval} steps: waited "
            f"{measurement.waiting_seconds:.2f} of {measurement.training_seconds:.1f} s, "
            f"{measurement.waiting_share:.2%}; {measurement.waiting_at_the_end_seconds:.2f} s of them at the end"
        )
    figures = [asdict(measurement) | {"waiting_share": measurement.waiting_share} for measurement in measurements]
    content = {"machine": asdict(machine), "steps": STEPS, "measurements": figures}
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measure(interval: int, model: Path, work: Path) -> Measurement:
    """Train the quickstart on a real S3 server."""
    processes = Processes(work)
    s3 = start_s3(work, processes, "127.0.0.1")
    try:
        os.environ.update(s3.environment())
        ready = prepare_run(write_spec(interval, model, s3.make_bucket("adapters")), work)
        return train(ready, interval)
    finally:
        processes.stop_all()


def train(ready: PreparedRun, interval: int) -> Measurement:
    """Train with checkpoints."""
    course = stages.make_fingerprint(ready.config, ready.data, ready.settings, ready.world)
    checkpoints = CheckpointStore(
        ready.output, course, 1, datetime.now(UTC), CheckpointCallbacks(print, lambda _: None)
    )
    waiting = TimedCheckpointer(AsyncCheckpointer(checkpoints, ready.config.spec.checkpoint, print, 0))
    ready.trainable.wrapped.train()
    watcher = TrainingCallbacks(
        lambda _: None, lambda _: None, lambda: None, waiting.should_checkpoint, waiting.checkpoint
    )
    started = time.perf_counter()
    ready.loop.run(StopFlag(), watcher)
    seconds = time.perf_counter() - started
    entries = ready.output.list(f"{ready.config.prepared.digest}/checkpoints")
    kept = sum(entry.path.endswith(f"/{MANIFEST}") for entry in entries)
    size = sum(entry.size for entry in entries) // kept
    return Measurement(interval, waiting.count, size, seconds, waiting.seconds, waiting.last_seconds)


def write_spec(interval: int, model: Path, bucket: str) -> QLoRAJobSpec:
    """Return the quickstart's settings, with checkpoints by steps."""
    return QLoRAJobSpec.model_validate(
        {
            "model": {"uri": model.as_uri()},
            "dataset": {"uri": (DATA / TRAIN).as_uri(), "evaluation": {"uri": (DATA / HELD_OUT).as_uri()}},
            "lora": {"rank": 16, "alpha": 32, "targets": ["all-linear"]},
            "training": {"maxSteps": STEPS, "globalBatchSize": 8, "learningRate": 2e-4},
            "checkpoint": {"steps": interval},
            "resources": {"gpusPerNode": 0},
            "output": {"uri": f"s3://{bucket}/team-a"},
        }
    )


if __name__ == "__main__":
    main()
