"""The watchdog: what counts as silence, and what is left of a process that gave no sign of life."""

import subprocess
import sys
import threading
import time

import pytest

from qlora_trainer.runtime.liveness import Liveness
from qlora_trainer.watchdog import dump_stacks, watchdog_running


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("resting", "beats", "silence"),
    [
        pytest.param(False, False, 30.0, id="no-sign"),
        pytest.param(False, True, 0.0, id="a-sign"),
        pytest.param(True, False, 0.0, id="waiting-for-one-that-is-watched-itself"),
    ],
)
def test_seconds_silent_counts_since_the_last_tick(resting, beats, silence):
    clock = Clock()
    pulse = Liveness(clock)

    def work() -> float:
        clock.now += 30.0
        if beats:
            pulse.tick()
        return pulse.seconds_silent()

    if not resting:
        assert work() == silence
        return
    with pulse.paused():
        assert work() == silence
    assert pulse.seconds_silent() == 0.0
    clock.now += 2.0
    assert pulse.seconds_silent() == 2.0


def test_trap_40_hung_process_is_ended_once():
    clock, ends, ended = Clock(), [], threading.Event()
    pulse = Liveness(clock)

    def end() -> None:
        ends.append(clock.now)
        ended.set()

    with watchdog_running(pulse, 1.0, end):
        clock.now += 1.5
        assert ended.wait(10)
        clock.now += 1.5
    assert ends == [101.5]


HOLDS_PYTHONS_LOCK = """
import ctypes, time
from qlora_trainer import watchdog
from qlora_trainer.runtime.liveness import Pulse

watchdog._LAST_SECONDS = 0.5

def computes_for_ever():
    ctypes.PyDLL(None).sleep(60)  # unlike CDLL it does not let other threads run

with watchdog.watched(Pulse(), 1.0, lambda: None):
    time.sleep(0.5)  # for the first look
    computes_for_ever()
"""


def test_process_holding_the_gil_is_ended():
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HOLDS_PYTHONS_LOCK], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert time.monotonic() - started < 50
    assert "Timeout" in done.stderr
    assert "in computes_for_ever" in done.stderr


def test_dump_stacks_has_every_thread():
    ready, go_on = threading.Event(), threading.Event()

    def waits_for_ever() -> None:
        ready.set()
        go_on.wait()

    thread = threading.Thread(target=waits_for_ever)
    thread.start()
    ready.wait()
    stacks = dump_stacks()
    go_on.set()
    thread.join()
    assert "waits_for_ever" in stacks
    assert "test_dump_stacks_has_every_thread" in stacks
