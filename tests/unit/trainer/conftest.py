"""Ignores warnings of libraries about their own code (all others are errors), and provides a stop flag."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from qlora_trainer.runtime.shutdown import StopFlag

THIRD_PARTY_WARNINGS: Final = (
    # peft 0.21 reads transformers' old name of is_activation_checkpointing.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for warning in THIRD_PARTY_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture
def stop() -> Iterator[StopFlag]:
    """A stop flag that SIGTERM sets, without terminating this process."""
    before, flag = signal.getsignal(signal.SIGTERM), StopFlag()
    flag.install_signal_handlers(lambda: None)
    yield flag
    signal.signal(signal.SIGTERM, before)
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.cancel()
