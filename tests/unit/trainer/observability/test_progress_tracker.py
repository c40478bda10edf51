"""How far a run is: what a report says follows from all steps, and costs the same for each."""

import pytest

from qlora_api.names import Phase
from qlora_api.report import StepRecord
from qlora_trainer.observability.progress_tracker import ProgressTracker, time_and_tokens
from tests.unit.trainer.tiny import RecordingSink

STEPS = tuple(
    StepRecord(step=step, loss=3 - step / 10, learning_rate=0.1, grad_norm=1, tokens=100 + step, seconds=step / 4)
    for step in range(1, 8)
)


def reported(resumed: int) -> RecordingSink:
    """A run of ten steps that had done some in an earlier attempt."""
    sink = RecordingSink()
    pace = ProgressTracker(sink, total_steps=10)
    pace.enter_phase(Phase.TRAINING)
    pace.resume(STEPS[:resumed])
    for record in STEPS[resumed:]:
        pace.on_step(record)
    pace.skip_remaining_steps()
    pace.enter_phase(Phase.EVALUATING)
    return sink


@pytest.mark.parametrize("resumed", [0, 3])
def test_progress_counts_steps_of_all_attempts(resumed):
    first, *others, last = reported(resumed).seen
    assert (first.step, first.percent, first.loss, first.remaining_seconds) == (0, 0, None, None)
    for report in others[1:]:
        seconds, tokens = time_and_tokens(STEPS[: report.step])
        assert report.percent == 10 * report.step
        assert report.loss == STEPS[report.step - 1].loss
        assert report.remaining_seconds == round(seconds / report.step * (10 - report.step))
        assert report.tokens_per_second == pytest.approx(tokens / seconds, abs=0.05)
    assert [report.step for report in others[1:]] == list(range(resumed + 1, 8))
    assert (last.phase, last.percent, last.step, last.remaining_seconds) == (Phase.EVALUATING, 100, 7, None)
