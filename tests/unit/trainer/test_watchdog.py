"""The watchdog: what counts as silence, and what is left of a process that gave no sign of life."""

import subprocess
import sys
import threading
import time

import pytest

from qlora_trainer.runtime.liveness import Pulse
from qlora_trainer.watchdog import dump_stacks, watched


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
def test_silence_is_the_time_without_a_sign_of_life(resting, beats, silence):
    clock = Clock()
    pulse = Pulse(clock)

    def work() -> float:
        clock.now += 30.0
        if beats:
            pulse.beat()
        return pulse.silence()

    if not resting:
        assert work() == silence
        return
    with pulse.resting():
        assert work() == silence
    assert pulse.silence() == 0.0
    clock.now += 2.0
    assert pulse.silence() == 2.0


def test_trap_40_a_silent_process_is_ended_once():
    clock, ends, ended = Clock(), [], threading.Event()
    pulse = Pulse(clock)

    def end() -> None:
        ends.append(clock.now)
        ended.set()

    with watched(pulse, 1.0, end):
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


def test_a_process_whose_native_code_lets_no_thread_run_is_ended_as_well():
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HOLDS_PYTHONS_LOCK], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert time.monotonic() - started < 50
    assert "Timeout" in done.stderr
    assert "in computes_for_ever" in done.stderr


def test_the_stacks_are_those_of_every_thread():
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
    assert "test_the_stacks_are_those_of_every_thread" in stacks
