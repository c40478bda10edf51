"""An operator with a skewed clock: deadlines count from times that the control plane wrote."""

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Final

import pytest

from qlora_operator.cluster.server_clock import TOLERANCE
from tests.chaos.promises import promise
from tests.chaos.scenario_runner import ScenarioRunner, WriteRecorder

HOUR: Final = timedelta(hours=1)
"""Twice spec.deadlines.startup."""


@promise(
    fault="The operator's clock is an hour ahead, or an hour behind",
    promise="The run ends normally: the API server's clock is authoritative.",
    how="The operator runs with a different system time.",
)
@pytest.mark.parametrize("ahead", [HOUR, -HOUR], ids=["ahead", "behind"])
def test_skewed_operator_clock_changes_no_outcome(
    runner: ScenarioRunner, ahead: timedelta, outcome: Callable[[str], None]
) -> None:
    reference = runner.run("interrupted", WriteRecorder())
    runner.operator.kill()
    runner.operator.command = ("tests.chaos.skewed", str(ahead.total_seconds()))
    runner.operator.start()
    assert reference.differences(runner.run("interrupted", WriteRecorder())) == []
    [skew] = re.findall(r"clock is ([-+]\d+) s off", runner.operator.log.read_text())
    assert float(skew) == pytest.approx(ahead.total_seconds(), abs=TOLERANCE.total_seconds())
    outcome(f"interrupted with {ahead.total_seconds() / 3600:+.0f} h")
