"""A training pod is killed or asked to stop at any moment; the next attempt goes on, and the adapter is the same."""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable

import pytest

from qlora_api.names import GRACE_SECONDS
from qlora_api.reasons import Reason
from tests.chaos.promises import Dose, promise
from tests.chaos.trainer.lives import INTERVAL, STEPS, TrainerProcess, TrainerRun, TrainerRuns
from tests.cluster.toxiproxy import Toxiproxy

STOP_SECONDS = 15
"""Longest time from SIGTERM to the end, with a model whose step takes less than a second."""


def start_and_wait(fingerprint: TrainerRun, chance: random.Random, seconds: float) -> TrainerProcess:
    """Start an attempt, and return at a random moment of it, or when it is over."""
    life = fingerprint.start()
    life.wait_until(lambda life: bool(life.lines))
    life.process.join(chance.uniform(0, seconds))
    return life


@promise(
    fault="a training pod is killed",
    promise="every run publishes the same adapter as an uninterrupted one, and repeats at most one checkpoint interval "
    "and the steps taken while its checkpoint was being uploaded",
    how="SIGKILL of the training process at random times, publication included",
)
@pytest.mark.timeout(2400)
def test_kills(
    courses: TrainerRuns, undisturbed: tuple[str, float], dose: Dose, outcome: Callable[[str], None]
) -> None:
    kills, chance, (adapter, seconds) = dose(short=3, full=50), random.Random(1), undisturbed
    phases: Counter[str] = Counter()
    lost, published = [0], 0
    while sum(phases.values()) < kills:
        course, before = courses.make(), 0
        while True:
            spared = sum(phases.values()) >= kills
            life = course.start() if spared else start_and_wait(course, chance, seconds)
            if spared or not life.process.is_alive():
                assert life.wait_for_exit() == 0, (life.folder / "log").read_text()[-3000:]
                break
            life.process.kill()
            life.wait_for_exit()
            kept = course.kept_log(course.attempts)
            assert kept == life.lines[: len(kept)]
            phases[life.phase] += 1
            # One that was killed before its first report, or that found the result published, repeated nothing.
            if life.step:
                lost.append(before - life.resumed)
                before = life.step
        if life.step:
            lost.append(before - life.resumed)
        assert course.verified_adapter() == adapter
        published += 1
    # A checkpoint is uploaded beside the next step, so that the one before it may be what is left.
    assert max(lost) <= INTERVAL + 1
    outcome(
        f"{sum(phases.values())} kills ({', '.join(f'{count} while {phase}' for phase, count in phases.items())}), "
        f"{published} of {published} runs published, bit for bit the same adapter; at most {max(lost)} steps repeated, "
        f"with a checkpoint every {INTERVAL}"
    )


@promise(
    fault="a training pod is asked to stop",
    promise="at most the current step is lost",
    how="SIGTERM to the training process at random times",
)
def test_stops(
    courses: TrainerRuns, undisturbed: tuple[str, float], dose: Dose, outcome: Callable[[str], None]
) -> None:
    stops, chance, (adapter, seconds) = dose(short=2, full=10), random.Random(2), undisturbed
    course, before = courses.make(), 0
    durations: list[float] = []
    while len(durations) < stops:
        life = start_and_wait(course, chance, seconds / 2)
        if life.process.is_alive():
            asked = time.monotonic()
            life.process.terminate()
            code, word = life.wait_for_exit(), life.termination_message
            durations.append(time.monotonic() - asked)
            assert word is not None
            assert course.kept_log(course.attempts) == life.lines
            # A stop that comes when the result is published already changes nothing.
            assert (code, word.reason) in {(143, Reason.INTERRUPTED), (0, Reason.PUBLISHED)}
            if code:
                assert (word.checkpoint.step if word.checkpoint else 0) == life.step
                assert word.checkpoint is None or word.checkpoint.verified
        if life.step:
            assert life.resumed == before
            before = life.step
        if life.process.exitcode == 0:
            assert course.verified_adapter() == adapter
            course, before = courses.make(), 0
    last = course.start()
    assert last.wait_for_exit() == 0
    assert course.verified_adapter() == adapter
    assert last.resumed == before or not last.step  # it may find the result published
    assert max(durations) < STOP_SECONDS
    outcome(f"{stops} stops, no step repeated; the longest took {max(durations):.1f} s")


@promise(
    fault="a training pod is asked to stop while S3 is slow",
    promise="it exits within its grace period, with a termination message that names the newest complete checkpoint",
    how="SIGTERM while a checkpoint is uploaded at 1 kB/s (toxiproxy)",
)
def test_a_stop_during_a_slow_upload(
    courses: TrainerRuns, toxic: Toxiproxy, dose: Dose, outcome: Callable[[str], None]
) -> None:
    overdue = float(dose(short=4, full=GRACE_SECONDS - 10))
    course = courses.make()
    life = course.start(overdue, f"http://{toxic.address}")
    life.wait_until(lambda life: any(line.get("checkpoint") for line in life.progress))
    complete = {line["checkpoint"]["step"] for line in life.progress if line.get("checkpoint")}
    toxic.add_toxic("bandwidth", {"rate": 1}, stream="upstream")
    life.wait_until(lambda life: life.step >= min(max(complete) + INTERVAL + 1, STEPS))
    asked = time.monotonic()
    life.process.terminate()
    code, took = life.wait_for_exit(), time.monotonic() - asked
    word = life.termination_message
    assert word is not None
    assert (code, word.reason) == (128 + signal.SIGTERM, Reason.INTERRUPTED)
    assert word.checkpoint is not None
    name = word.checkpoint.uri.rpartition("/")[2]
    assert f"checkpoints/{name}/manifest.json" in course.paths()
    assert took < overdue + 5
    outcome(f"ended after {took:.0f} s; the termination message names {name}, which is complete")
