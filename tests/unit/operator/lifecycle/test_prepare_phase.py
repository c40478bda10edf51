"""What follows a preparation: its facts are in the status before a GPU is requested."""

from datetime import datetime, timedelta

import pytest

from qlora_api.names import Phase, Role
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Preparation, QLoRAJobStatus
from qlora_api.v1alpha1.status import OutputStatus
from qlora_operator.lifecycle.prepare_phase import _start_training, follow_preparation
from qlora_operator.lifecycle.prepare_retries import FIRST_PAUSE, current_preparation
from qlora_operator.models import Action, ChildJob, Decision
from qlora_planner.plan import make_plan
from tests.make import NOW, make_child, make_job, make_observation, make_pod, make_prepared, make_spec


def decide_after_preparation(digest: str) -> tuple[Reason, Action | None]:
    """Decide for a run whose status has the same plan, and the output of some preparation."""
    prepared = make_prepared()
    output = OutputStatus(digest=digest, prefix=prepared.prefix)
    plan = make_plan(make_spec(), prepared)
    decision = _start_training(make_job(QLoRAJobStatus(plan=plan, output=output)), prepared, plan, 1)
    return decision.reason, decision.action


def test_training_starts_once_the_digest_is_in_the_status() -> None:
    assert decide_after_preparation(make_prepared().digest) == (Reason.SCHEDULING, Action.TRAIN)


def test_new_digest_of_a_second_preparation_is_recorded_before_training() -> None:
    """Otherwise the result of the training would count as one of another run."""
    reason, action = decide_after_preparation("f" * 16)
    assert reason is Reason.PREPARED
    assert action is not Action.TRAIN


def follow(preparation: Preparation | None, prepare: ChildJob, now: datetime) -> Decision:
    job = make_job(QLoRAJobStatus(preparation=preparation))
    return follow_preparation(job, make_observation(prepare), 1, now)


def test_end_of_back_off_is_recorded_once_for_a_pod_that_never_ended() -> None:
    """A pod that was evicted before it ran has no end; the pause must not begin anew with each look."""
    evicted = make_child(Role.PREPARE, pod=make_pod(phase="Failed", reason="Evicted", started_at=None))
    first = follow(None, evicted, NOW)
    assert (first.reason, first.requeue_at) == (Reason.EVICTED, NOW + FIRST_PAUSE)
    assert first.preparation is not None
    for seconds in (1, 7, 14):
        assert follow(first.preparation, evicted, NOW + timedelta(seconds=seconds)).requeue_at == first.requeue_at
    after = follow(first.preparation, evicted, NOW + FIRST_PAUSE)
    assert after.preparation == first.preparation.model_copy(update={"number": 2, "retry_at": None})
    assert after.action is Action.NONE, "the number is recorded before its Job is created"
    assert follow(after.preparation, evicted, NOW + FIRST_PAUSE).action is Action.PREPARE


def test_preparation_that_exceeds_its_own_disk_limit_is_not_repeated() -> None:
    message = "Pod ephemeral local storage usage exceeds the total limit of containers 64Mi. "
    evicted = make_child(Role.PREPARE, pod=make_pod(phase="Failed", reason="Evicted", message=message))
    assert follow(None, evicted, NOW).phase is Phase.FAILED


@pytest.mark.parametrize(
    ("status", "jobs", "number"),
    [
        pytest.param(None, [], 1, id="new"),
        pytest.param(None, [1], 1, id="recorded-by-an-earlier-version"),
        pytest.param(None, [1, 3], 3, id="wiped-status"),
        pytest.param(2, [3], 3, id="status-from-a-backup"),
        pytest.param(4, [3], 4, id="not-created-yet"),
    ],
)
def test_current_preparation_is_recorded_or_newest(status: int | None, jobs: list[int], number: int) -> None:
    recorded = QLoRAJobStatus(preparation=None if status is None else Preparation(number=status))
    children = make_observation(*(make_child(Role.PREPARE, job) for job in jobs))
    assert current_preparation(recorded, children) == Preparation(number=number)
