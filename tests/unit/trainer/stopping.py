"""Runs that are stopped after a given step, each in a separate process."""

import multiprocessing
from pathlib import Path
from typing import Final

from qlora_api.reasons import Reason
from qlora_api.runconfig import RunConfig
from qlora_trainer import stages
from qlora_trainer.errors import RunError
from qlora_trainer.run import run
from qlora_trainer.runtime.shutdown import StopFlag
from tests.unit.trainer.tiny import RecordingSink

NEVER: Final = 0


class StoppingSink(RecordingSink):
    """Requests a stop after a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.stop = step, StopFlag()

    def report(self, progress) -> None:
        self.stop.requested = self.step != NEVER and progress.step == self.step


def run_until(config: RunConfig, step: int, work: Path) -> list[str]:
    """Run until a step, or to the end, and return the log lines."""
    # The load check starts a process that imports torch each time; test_run.py covers it.
    stages.load_in_fresh_process = lambda *_: None
    sink = StoppingSink(step)
    try:
        run(config, sink, work=work, stop=sink.stop)
    except RunError as error:
        if (error.reason, error.step) != (Reason.INTERRUPTED, step):
            raise
    return sink.notes


class FreshProcesses:
    """Processes that have imported the trainer but run nothing else."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])

    def run_until(self, config: RunConfig, step: int, work: Path) -> list[str]:
        """Call `run_until` in a new process."""
        with self._context.Pool(1, maxtasksperchild=1) as pool:
            return pool.apply(run_until, (config, step, work))
