"""`make bench-checkpoints`: measures how long training waits for its checkpoints in S3."""

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
from tests.cluster.host.processes import Processes  # noqa: E402
from tests.cluster.services.s3 import start_s3  # noqa: E402

RESULT: Final = Path(__file__).parents[1] / "results" / "checkpoints.json"
STEPS: Final = 30
INTERVALS: Final = (10, 2)
"""Steps between checkpoints. The default, ten minutes, is hundreds of such steps."""


@dataclass
class TimedCheckpointer:
    """A checkpointer that measures the time between the end of a step and the start of the next one."""

    checkpointer: AsyncCheckpointer
    seconds: float = 0.0
    last_seconds: float = 0.0
    """Part of it for the last checkpoint, which is complete before the adapter is evaluated."""
    count: int = 0
    _started_at: float = field(default=0.0, init=False)

    def should_checkpoint(self, step: int, last: bool) -> bool:
        """Ask the checkpointer; the state is captured between a positive answer and `checkpoint`."""
        self._started_at = time.perf_counter()
        is_due = self.checkpointer.should_checkpoint(step, last)
        if not is_due:
            self._add(last)
        return is_due

    def checkpoint(self, state: TrainingState, last: bool) -> None:
        """Write the checkpoint."""
        self.checkpointer.checkpoint(state, last)
        self.count += 1
        self._add(last)

    def _add(self, last: bool) -> None:
        waited = time.perf_counter() - self._started_at
        self.seconds += waited
        self.last_seconds += waited * last


@dataclass(frozen=True)
class Measurement:
    """A training run with a checkpoint every `interval` steps."""

    interval: int
    checkpoints: int
    checkpoint_bytes: int
    training_seconds: float
    waiting_seconds: float
    waiting_at_the_end_seconds: float

    @property
    def waiting_share(self) -> float:
        """Fraction of the wall time of training."""
        return self.waiting_seconds / self.training_seconds


def main() -> None:
    """Measure each interval, and print and write the results."""
    machine, measurements = observe_machine(), []
    model = make_model(DEFAULT_MIRROR, print)
    for interval in INTERVALS:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            measurement = measure(interval, model, Path(folder))
        measurements.append(measurement)
        print(
            f"a checkpoint of {measurement.checkpoint_bytes / 1e6:.1f} MB every {interval} steps: waited "
            f"{measurement.waiting_seconds:.2f} of {measurement.training_seconds:.1f} s, "
            f"{measurement.waiting_share:.2%}; {measurement.waiting_at_the_end_seconds:.2f} s of that at the end"
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
    fingerprint = stages.make_fingerprint(ready.config, ready.data, ready.settings, ready.world)
    checkpoints = CheckpointStore(
        ready.output, fingerprint, 1, datetime.now(UTC), CheckpointCallbacks(print, lambda _: None)
    )
    timed = TimedCheckpointer(AsyncCheckpointer(checkpoints, ready.config.spec.checkpoint, print, 0))
    ready.trainable.wrapped.train()
    callbacks = TrainingCallbacks(
        lambda _: None, lambda _: None, lambda: None, timed.should_checkpoint, timed.checkpoint
    )
    started = time.perf_counter()
    ready.loop.run(StopFlag(), callbacks)
    seconds = time.perf_counter() - started
    entries = ready.output.list(f"{ready.config.prepared.digest}/checkpoints")
    count = sum(entry.path.endswith(f"/{MANIFEST}") for entry in entries)
    size = sum(entry.size for entry in entries) // count
    return Measurement(interval, timed.count, size, seconds, timed.seconds, timed.last_seconds)


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
