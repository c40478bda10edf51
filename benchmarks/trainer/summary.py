"""Summarizes measurements; pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Final

from benchmarks.trainer.measurement import Evaluation, Measurement

MIN_GAIN: Final = 0.02
"""Nats per token: below it, rounding explains a difference (the same adapter gave 4.246 and 4.248)."""


@dataclass(frozen=True)
class Figures:
    """One contender over all rounds; each value is the median of the rounds."""

    contender: str
    useful_per_second: float
    learned_per_second: float
    useful_per_cpu_second: float
    startup_seconds: float
    peak_memory_bytes: float
    last_loss: float | None
    last_training_seconds: float


@dataclass(frozen=True)
class Ratio:
    """Ours compared with another contender; each value is the median of the rounds' ratios."""

    other: str
    speed: float
    """Useful tokens per second, ours to theirs."""
    time_to_loss: float | None
    """Training seconds to the final loss of the other one, ours to theirs; None if ours did not reach it."""
    learned: bool
    """Whether the loss of the other one fell by more than MIN_GAIN in every round."""


def summarize(runs: Sequence[Measurement]) -> Figures:
    """Return the medians over the runs of one contender."""
    losses = [run.evaluations[-1].loss for run in runs if run.evaluations]
    return Figures(
        contender=runs[0].contender,
        useful_per_second=median(useful_speed(run) for run in runs),
        learned_per_second=median(learned_speed(run) for run in runs),
        useful_per_cpu_second=median(useful_tokens_per_cpu_second(run) for run in runs),
        startup_seconds=median(run.startup_seconds for run in runs),
        peak_memory_bytes=median(run.peak_memory_bytes for run in runs),
        last_loss=median(losses) if losses else None,
        last_training_seconds=median(run.training_seconds for run in runs),
    )


def useful_speed(run: Measurement) -> float:
    """Return the useful tokens per second of a run."""
    return _ratio([(step.useful_tokens, step.seconds) for step in run.steps])


def learned_speed(run: Measurement) -> float:
    """Return the labels per second of a run."""
    return _ratio([(step.learned_tokens, step.seconds) for step in run.steps])


def useful_tokens_per_cpu_second(run: Measurement) -> float:
    """Return the useful tokens per second of processor time of a run."""
    return _ratio([(step.useful_tokens, step.cpu_seconds) for step in run.steps])


def _ratio(steps: Sequence[tuple[int, float]]) -> float:
    """Return tokens by seconds, without the first step, which warms up."""
    counted = steps[1:] or steps
    return sum(tokens for tokens, _ in counted) / sum(seconds for _, seconds in counted)


def compare(ours: Sequence[Measurement], theirs: Sequence[Measurement]) -> Ratio:
    """Compare ours with another contender round by round: load on the machine affects both."""
    pairs = list(zip(ours, theirs, strict=True))
    times = [time_to_loss(one, other) for one, other in pairs]
    reached = [time for time in times if time is not None]
    return Ratio(
        other=theirs[0].contender,
        speed=median(useful_speed(one) / useful_speed(other) for one, other in pairs),
        time_to_loss=median(reached) if reached and len(reached) == len(times) else None,
        learned=all(gain(other) > MIN_GAIN for other in theirs),
    )


def gain(run: Measurement) -> float:
    """Return by how much the held-out loss fell, in nats per token."""
    evaluations = run.evaluations
    return evaluations[0].loss - evaluations[-1].loss if evaluations else 0.0


def time_to_loss(one: Measurement, other: Measurement) -> float | None:
    """Return the training time to the other's final loss, relative to the other's; None if it was not reached."""
    if not other.evaluations:
        return None
    last = other.evaluations[-1]
    reached = crossing(one.evaluations, last.loss)
    return None if reached is None else reached / last.training_seconds


def crossing(evaluations: Sequence[Evaluation], loss: float) -> float | None:
    """Return when a loss was reached, interpolated between the evaluations before and after."""
    for before, after in pairwise(evaluations):
        if after.loss <= loss < before.loss:
            fraction = (before.loss - loss) / (before.loss - after.loss)
            return before.training_seconds + fraction * (after.training_seconds - before.training_seconds)
    return None
