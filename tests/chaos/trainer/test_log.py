"""The log of a training pod is in the output after the pod is gone."""

import time
from collections.abc import Callable
from itertools import zip_longest

from tests.chaos.promises import promise
from tests.chaos.trainer.lives import TrainerProcess, TrainerRun, TrainerRuns
from tests.cluster.host.commands import wait_until


def has_checkpoint(lines: list[dict[str, object]]) -> bool:
    """Whether a line reports a checkpoint."""
    return any(line.get("checkpoint") for line in lines)


def start_until_first_checkpoint(run: TrainerRun) -> TrainerProcess:
    """Start an attempt, and wait for its first checkpoint."""
    process = run.start()
    process.wait_until(lambda process: has_checkpoint(process.lines))
    return process


@promise(
    fault="a training pod is lost with its node",
    promise="its log is in the output: all of it after a SIGTERM, and up to the last checkpoint after a SIGKILL",
    how="SIGKILL once a checkpoint is complete, SIGTERM, and a normal exit",
)
def test_logs_outlive_their_pods(runs: TrainerRuns, outcome: Callable[[str], None]) -> None:
    run = runs.make()
    killed = start_until_first_checkpoint(run)
    complete = time.monotonic()
    wait_until("the log", lambda: has_checkpoint(run.uploaded_log(1)))
    waited = time.monotonic() - complete
    killed.process.kill()
    killed.wait_for_exit()
    stopped = start_until_first_checkpoint(run)
    stopped.process.terminate()
    assert stopped.wait_for_exit() in {143, 0}  # it may have finished before
    last = run.start()
    assert last.wait_for_exit() == 0
    after_kill = run.uploaded_log(1)
    assert after_kill == killed.lines[: len(after_kill)]
    assert has_checkpoint(after_kill)
    for attempt, process in ((2, stopped), (3, last)):
        pairs = zip_longest(run.uploaded_log(attempt), process.lines)
        assert [pair for pair in pairs if pair[0] != pair[1]][:3] == [], f"attempt {attempt}: uploaded, and logged"
    run.verified_adapter()
    outcome(
        f"{len(after_kill)} of {len(killed.lines)} lines after SIGKILL, uploaded {waited:.1f} s after the checkpoint; "
        f"all {len(stopped.lines)} after SIGTERM and all {len(last.lines)} after a normal exit"
    )
