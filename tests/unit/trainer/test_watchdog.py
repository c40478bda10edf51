"""The watchdog: when it triggers, and what a hung process leaves behind."""

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
    ("paused", "ticks", "silence"),
    [
        pytest.param(False, False, 30.0, id="no-heartbeat"),
        pytest.param(False, True, 0.0, id="heartbeat"),
        pytest.param(True, False, 0.0, id="paused"),
    ],
)
def test_seconds_silent_counts_since_the_last_tick(paused, ticks, silence):
    clock = Clock()
    liveness = Liveness(clock)

    def work() -> float:
        clock.now += 30.0
        if ticks:
            liveness.tick()
        return liveness.seconds_silent()

    if not paused:
        assert work() == silence
        return
    with liveness.paused():
        assert work() == silence
    assert liveness.seconds_silent() == 0.0
    clock.now += 2.0
    assert liveness.seconds_silent() == 2.0


def test_trap_40_hung_process_is_ended_once():
    clock, ends, ended = Clock(), [], threading.Event()
    liveness = Liveness(clock)

    def end() -> None:
        ends.append(clock.now)
        ended.set()

    with watchdog_running(liveness, 1.0, end):
        clock.now += 1.5
        assert ended.wait(10)
        clock.now += 1.5
    assert ends == [101.5]


HOLDS_THE_GIL = """
import ctypes, time
from qlora_trainer import watchdog
from qlora_trainer.runtime.liveness import Liveness

watchdog._LAST_SECONDS = 0.5

def compute_forever():
    ctypes.PyDLL(None).sleep(60)  # unlike CDLL it does not let other threads run

with watchdog.watchdog_running(Liveness(), 1.0, lambda: None):
    time.sleep(0.5)  # for the first poll
    compute_forever()
"""


def test_process_holding_the_gil_is_ended():
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HOLDS_THE_GIL], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert time.monotonic() - started < 50
    assert "Timeout" in done.stderr
    assert "in compute_forever" in done.stderr


def test_dump_stacks_has_every_thread():
    ready, release = threading.Event(), threading.Event()

    def wait_forever() -> None:
        ready.set()
        release.wait()

    thread = threading.Thread(target=wait_forever)
    thread.start()
    ready.wait()
    stacks = dump_stacks()
    release.set()
    thread.join()
    assert "wait_forever" in stacks
    assert "test_dump_stacks_has_every_thread" in stacks
