"""An operator whose clock is off: deadlines count from times that others wrote."""

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Final

import pytest

from qlora_operator.cluster.server_clock import TOLERANCE
from tests.chaos.promises import promise
from tests.chaos.stage import ScenarioRunner, WriteRecorder

HOUR: Final = timedelta(hours=1)
"""Twice spec.deadlines.startup."""


@promise(
    fault="The operator's clock is an hour ahead, or an hour behind",
    promise="The run ends normally: the API server's clock is authoritative.",
    how="The operator runs with a different system time.",
)
@pytest.mark.parametrize("ahead", [HOUR, -HOUR], ids=["ahead", "behind"])
def test_skewed_operator_clock_changes_no_outcome(
    stage: ScenarioRunner, ahead: timedelta, outcome: Callable[[str], None]
) -> None:
    reference = stage.run("interrupted", WriteRecorder())
    stage.operator.kill()
    stage.operator.command = ("tests.chaos.skewed", str(ahead.total_seconds()))
    stage.operator.start()
    assert reference.differences(stage.run("interrupted", WriteRecorder())) == []
    [told] = re.findall(r"clock is ([-+]\d+) s off", stage.operator.log.read_text())
    assert float(told) == pytest.approx(ahead.total_seconds(), abs=TOLERANCE.total_seconds())
    outcome(f"interrupted with {ahead.total_seconds() / 3600:+.0f} h")
