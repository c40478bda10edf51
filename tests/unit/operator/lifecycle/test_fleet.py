"""Runs on a fleet with broken nodes, in virtual time: none fails, and broken nodes cost little."""

import pytest

from qlora_api.names import Phase
from tests.fleet.fleet import Fleet, submit_mixed_runs
from tests.fleet.nodes import Fault

LARGEST_LOSS = 0.3
"""Share of all GPU time that twelve broken nodes of forty may take."""


@pytest.mark.parametrize("seed", [1])
async def test_no_run_fails_on_a_fleet_with_nodes_broken_in_six_ways(seed: int) -> None:
    fleet = Fleet(seed=seed)
    submit_mixed_runs(fleet, singles=184, gangs=16)
    await fleet.run_all()
    failed = {run.ref.name: run.cluster.status for run in fleet.runs if run.phase != Phase.SUCCEEDED}
    assert not failed, failed
    assert set(fleet.lost) >= set(Fault), "every way was met"
    lost = sum(seconds for fault, seconds in fleet.lost.items() if fault is not None)
    assert lost < LARGEST_LOSS * fleet.useful, fleet.lost
