"""Restarts the operator when its process ends, as a Deployment does."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from tests.integration.operator_process import Operator

POLL_SECONDS: Final = 0.2
"""Seconds between two checks of the process."""


@dataclass
class Supervisor:
    """Watches one operator."""

    operator: Operator
    restarts: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Restart the operator whenever it ends, until stopped."""
        while not self._over.wait(POLL_SECONDS):
            if self.operator.process and self.operator.process.poll() is not None:
                self.restarts += 1
                self.operator.spawn()

    def stop(self) -> None:
        """Stop restarting it."""
        self._over.set()


@contextmanager
def supervised(operator: Operator) -> Iterator[Supervisor]:
    """Keep an operator running during the block."""
    supervisor = Supervisor(operator)
    thread = threading.Thread(target=supervisor.run, name="supervisor")
    thread.start()
    try:
        yield supervisor
    finally:
        supervisor.stop()
        thread.join()
