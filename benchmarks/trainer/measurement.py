"""Measurements of a contender during training, and their JSON format."""

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    seconds: float
    cpu_seconds: float
    """CPU time of all threads: hardly affected by other processes on the machine."""
    useful_tokens: int
    """Tokens of the training rows, without padding."""
    learned_tokens: int
    """Useful tokens that are labels."""


@dataclass(frozen=True)
class Evaluation:
    """The loss on the answers of the held-out rows, between two steps."""

    steps: int
    training_seconds: float
    loss: float


@dataclass
class Measurement:
    """One run of one contender."""

    contender: str
    startup_seconds: float = 0.0
    """From the start of the process to the start of the first step: imports, model, rows."""
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    peak_memory_bytes: int = 0
    """Peak memory reserved by the allocator on a GPU, peak resident set on a CPU."""

    @property
    def training_seconds(self) -> float:
        """Return the seconds of all steps."""
        return sum(step.seconds for step in self.steps)

    def write(self, path: Path) -> None:
        """Write the measurement as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def read(path: Path) -> "Measurement":
        """Read a measurement from JSON."""
        content = json.loads(path.read_text())
        steps = [Step(**step) for step in content.pop("steps")]
        evaluations = [Evaluation(**evaluation) for evaluation in content.pop("evaluations")]
        return Measurement(**content, steps=steps, evaluations=evaluations)


class Stopwatch:
    """Times steps, without the evaluations between them."""

    def __init__(self, contender: str, device: str, every: int) -> None:
        self.measurement = Measurement(contender)
        self.evaluate: Callable[[], float] | None = None
        """Returns the loss on the held-out rows; None if there is nothing to evaluate."""
        self._device = torch.device(device)
        self._every = every
        self._since, self._cpu_since = 0.0, 0.0

    def start(self) -> None:
        """Record the startup time, evaluate, and start timing the first step."""
        self._synchronize()
        self.measurement.startup_seconds = time.time() - psutil.Process().create_time()
        self._evaluate()
        self._resume()

    def end_step(self, rows: Sequence[tuple[int, int]]) -> None:
        """Record a finished step and its rows: useful tokens and labels of each."""
        self._synchronize()
        seconds, cpu_seconds = time.perf_counter() - self._since, time.process_time() - self._cpu_since
        useful, learned = sum(useful for useful, _ in rows), sum(learned for _, learned in rows)
        self.measurement.steps.append(Step(seconds, cpu_seconds, useful, learned))
        self.measurement.peak_memory_bytes = self._peak()
        if len(self.measurement.steps) % self._every == 0:
            self._evaluate()
        self._resume()

    def _resume(self) -> None:
        self._since, self._cpu_since = time.perf_counter(), time.process_time()

    def _evaluate(self) -> None:
        if self.evaluate is not None:
            current = self.measurement
            current.evaluations.append(Evaluation(len(current.steps), current.training_seconds, self.evaluate()))

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_reserved())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
