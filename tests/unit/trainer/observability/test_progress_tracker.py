"""Progress reports over the steps of all attempts."""

import pytest

from qlora_api.names import Phase
from qlora_api.report import StepRecord
from qlora_trainer.observability.progress_tracker import ProgressTracker, time_and_tokens
from tests.unit.trainer.tiny import RecordingSink

STEPS = tuple(
    StepRecord(step=step, loss=3 - step / 10, learning_rate=0.1, grad_norm=1, tokens=100 + step, seconds=step / 4)
    for step in range(1, 8)
)


def run_with_resume(resumed: int) -> RecordingSink:
    """A run of ten steps, some of them done in an earlier attempt."""
    sink = RecordingSink()
    tracker = ProgressTracker(sink, total_steps=10)
    tracker.enter_phase(Phase.TRAINING)
    tracker.resume(STEPS[:resumed])
    for record in STEPS[resumed:]:
        tracker.on_step(record)
    tracker.skip_remaining_steps()
    tracker.enter_phase(Phase.EVALUATING)
    return sink


@pytest.mark.parametrize("resumed", [0, 3])
def test_progress_counts_steps_of_all_attempts(resumed):
    first, *others, last = run_with_resume(resumed).seen
    assert (first.step, first.percent, first.loss, first.remaining_seconds) == (0, 0, None, None)
    for report in others[1:]:
        seconds, tokens = time_and_tokens(STEPS[: report.step])
        assert report.percent == 10 * report.step
        assert report.loss == STEPS[report.step - 1].loss
        assert report.remaining_seconds == round(seconds / report.step * (10 - report.step))
        assert report.tokens_per_second == pytest.approx(tokens / seconds, abs=0.05)
    assert [report.step for report in others[1:]] == list(range(resumed + 1, 8))
    assert (last.phase, last.percent, last.step, last.remaining_seconds) == (Phase.EVALUATING, 100, 7, None)
