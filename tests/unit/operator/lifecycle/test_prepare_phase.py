"""What follows a preparation: its facts are in the status before a GPU is requested."""

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QLoRAJobStatus
from qlora_api.v1alpha1.status import OutputStatus
from qlora_operator.lifecycle.prepare_phase import _after_preparation
from qlora_operator.models import Action
from qlora_planner.plan import make_plan
from tests.make import make_job, make_prepared, make_spec


def decide_after_preparation(digest: str) -> tuple[Reason, Action | None]:
    """Decide for a run whose status has the same plan, and the output of some preparation."""
    prepared = make_prepared()
    output = OutputStatus(digest=digest, prefix=prepared.prefix)
    status = QLoRAJobStatus(plan=make_plan(make_spec(), prepared), output=output)
    decision = _after_preparation(make_job(status), prepared, (), 1)
    return decision.reason, decision.action


def test_training_starts_once_the_digest_is_in_the_status() -> None:
    assert decide_after_preparation(make_prepared().digest) == (Reason.SCHEDULING, Action.TRAIN)


def test_new_digest_of_a_second_preparation_is_recorded_before_training() -> None:
    """Otherwise the result of the training would count as one of another run."""
    reason, action = decide_after_preparation("f" * 16)
    assert reason is Reason.PREPARED
    assert action is not Action.TRAIN
