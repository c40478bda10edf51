"""What a training pod said is in the output when the pod is gone."""

import time
from collections.abc import Callable
from itertools import zip_longest

from tests.chaos.promises import promise
from tests.chaos.trainer.lives import TrainerProcess, TrainerRun, TrainerRuns
from tests.cluster.commands import wait_until


def has_checkpoint(lines: list[dict[str, object]]) -> bool:
    """Whether a line tells of a checkpoint."""
    return any(line.get("checkpoint") for line in lines)


def start_and_keep_a_checkpoint(fingerprint: TrainerRun) -> TrainerProcess:
    """Start an attempt, and return when it has a checkpoint."""
    life = fingerprint.start()
    life.wait_until(lambda life: has_checkpoint(life.lines))
    return life


@promise(
    fault="a training pod is lost with its node",
    promise="its log is in the output: all of it after a SIGTERM, and up to the last checkpoint after a SIGKILL",
    how="SIGKILL once a checkpoint is complete, SIGTERM, and a normal exit",
)
def test_logs_outlive_their_pods(courses: TrainerRuns, outcome: Callable[[str], None]) -> None:
    course = courses.make()
    killed = start_and_keep_a_checkpoint(course)
    complete = time.monotonic()
    wait_until("the log", lambda: has_checkpoint(course.kept_log(1)), timeout=30)
    waited = time.monotonic() - complete
    killed.process.kill()
    killed.wait_for_exit()
    stopped = start_and_keep_a_checkpoint(course)
    stopped.process.terminate()
    assert stopped.wait_for_exit() in {143, 0}  # it may have been done already
    last = course.start()
    assert last.wait_for_exit() == 0
    after_kill = course.kept_log(1)
    assert after_kill == killed.lines[: len(after_kill)]
    assert has_checkpoint(after_kill)
    for attempt, life in ((2, stopped), (3, last)):
        pairs = zip_longest(course.kept_log(attempt), life.lines)
        assert [pair for pair in pairs if pair[0] != pair[1]][:3] == [], f"attempt {attempt}: kept, and said"
    course.verified_adapter()
    outcome(
        f"{len(after_kill)} of {len(killed.lines)} lines after SIGKILL, uploaded {waited:.1f} s after the checkpoint; "
        f"all {len(stopped.lines)} after SIGTERM and all {len(last.lines)} after a normal exit"
    )
