"""A training pod is killed or stopped at random times; the next attempt resumes, and the adapter is identical."""

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
from tests.cluster.services.toxiproxy import Toxiproxy


def start_and_wait(run: TrainerRun, chance: random.Random, seconds: float) -> TrainerProcess:
    """Start an attempt, and return after a random time, or when it has exited."""
    process = run.start()
    process.wait_until(lambda process: bool(process.lines))
    process.process.join(chance.uniform(0, seconds))
    return process


@promise(
    fault="a training pod is killed",
    promise="every run publishes the same adapter as an uninterrupted one, and repeats at most one checkpoint interval "
    "and the steps taken while its checkpoint was being uploaded",
    how="SIGKILL of the training process at random times, publication included",
)
@pytest.mark.timeout(2400)
def test_kills(runs: TrainerRuns, uninterrupted: tuple[str, float], dose: Dose, outcome: Callable[[str], None]) -> None:
    kills, chance, (adapter, seconds) = dose(short=3, full=50), random.Random(1), uninterrupted
    phases: Counter[str] = Counter()
    lost, published = [0], 0
    while sum(phases.values()) < kills:
        run, before = runs.make(), 0
        while True:
            is_last = sum(phases.values()) >= kills
            process = run.start() if is_last else start_and_wait(run, chance, seconds)
            if is_last or not process.process.is_alive():
                assert process.wait_for_exit() == 0, (process.folder / "log").read_text()[-3000:]
                break
            process.process.kill()
            process.wait_for_exit()
            uploaded = run.uploaded_log(run.attempts)
            assert uploaded == process.lines[: len(uploaded)]
            phases[process.phase] += 1
            # A process killed before its first report, or one that found a published result, repeated no steps.
            if process.step:
                lost.append(before - process.resumed)
                before = process.step
        if process.step:
            lost.append(before - process.resumed)
        assert run.verified_adapter() == adapter
        published += 1
    # A checkpoint is uploaded during the next step, so only the one before it may be complete.
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
def test_stops(runs: TrainerRuns, uninterrupted: tuple[str, float], dose: Dose, outcome: Callable[[str], None]) -> None:
    stops, chance, (adapter, seconds) = dose(short=2, full=10), random.Random(2), uninterrupted
    run, before = runs.make(), 0
    durations: list[float] = []
    while len(durations) < stops:
        process = start_and_wait(run, chance, seconds / 2)
        if process.process.is_alive():
            requested = time.monotonic()
            process.process.terminate()
            code, message = process.wait_for_exit(), process.termination_message
            durations.append(time.monotonic() - requested)
            assert message is not None
            assert run.uploaded_log(run.attempts) == process.lines
            # A stop after publication changes nothing.
            assert (code, message.reason) in {(143, Reason.INTERRUPTED), (0, Reason.PUBLISHED)}
            if code:
                assert (message.checkpoint.step if message.checkpoint else 0) == process.step
                assert message.checkpoint is None or message.checkpoint.verified
        if process.step:
            assert process.resumed == before
            before = process.step
        if process.process.exitcode == 0:
            assert run.verified_adapter() == adapter
            run, before = runs.make(), 0
    last = run.start()
    assert last.wait_for_exit() == 0
    assert run.verified_adapter() == adapter
    assert last.resumed == before or not last.step  # it may find a published result
    assert max(durations) < GRACE_SECONDS
    outcome(f"{stops} stops, no step repeated; the longest took {max(durations):.1f} s")


@promise(
    fault="a training pod is asked to stop while S3 is slow",
    promise="it exits within its grace period, with a termination message that names the newest complete checkpoint",
    how="SIGTERM while a checkpoint is uploaded at 1 kB/s (toxiproxy)",
)
def test_a_stop_during_a_slow_upload(
    runs: TrainerRuns, toxic: Toxiproxy, dose: Dose, outcome: Callable[[str], None]
) -> None:
    stop_timeout = float(dose(short=4, full=GRACE_SECONDS - 10))
    run = runs.make()
    process = run.start(stop_timeout, f"http://{toxic.address}")
    process.wait_until(lambda process: any(line.get("checkpoint") for line in process.progress))
    complete = {line["checkpoint"]["step"] for line in process.progress if line.get("checkpoint")}
    toxic.add_toxic("bandwidth", {"rate": 1}, stream="upstream")
    process.wait_until(lambda process: process.step >= min(max(complete) + INTERVAL + 1, STEPS))
    requested = time.monotonic()
    process.process.terminate()
    code, took = process.wait_for_exit(), time.monotonic() - requested
    message = process.termination_message
    assert message is not None
    assert (code, message.reason) == (128 + signal.SIGTERM, Reason.INTERRUPTED)
    assert message.checkpoint is not None
    name = message.checkpoint.uri.rpartition("/")[2]
    assert f"checkpoints/{name}/manifest.json" in run.paths()
    assert took < stop_timeout + 5
    outcome(f"ended after {took:.0f} s; the termination message names {name}, which is complete")
