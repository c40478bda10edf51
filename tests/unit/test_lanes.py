"""Tests that share a cluster stay together, and the run tells where its time went."""

import pytest

from tests.lanes import FIRST, NAMES_OF_CLUSTERS, format_times, lane_of, order_of

QUICKSTART = "tests/e2e/test_quickstart.py::test_it_succeeds"
CAUSES = "tests/chaos/test_exit_causes.py::test_what_keeps_a_run_from_training[no-s3]"
STOPS = "tests/chaos/trainer/test_training.py::test_stops"
DEATHS = "tests/chaos/test_crash.py::test_a_death_at_any_write_changes_nothing[life]"
LIFE = "tests/integration/test_operator_life.py::test_the_whole_life"
CHART = "tests/integration/chart/test_values.py::test_values"
LOSS = "tests/unit/trainer/test_loss.py::test_loss"
LOGS = "tests/unit/test_logs.py::test_logs"


@pytest.fixture(autouse=True)
def no_named_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES_OF_CLUSTERS:
        monkeypatch.delenv(name, raising=False)


def test_those_that_share_a_node_are_in_one_lane() -> None:
    assert lane_of(QUICKSTART) == lane_of(CAUSES) == "node"


@pytest.mark.parametrize("name", ["QLORA_TEST_CLUSTER", "QLORA_TEST_KUBECONFIG"])
def test_on_one_cluster_for_all_they_follow_each_other(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "somewhere")
    assert {lane_of(test) for test in (QUICKSTART, CAUSES, LIFE, DEATHS)} == {"node"}
    assert lane_of(CHART) == "chart"


def test_a_file_that_shares_nothing_is_a_lane_of_its_own() -> None:
    assert lane_of(LOSS) == "tests/unit/trainer/test_loss.py"


def test_lanes_that_wait_begin_before_files_that_compute() -> None:
    mixed = [LOGS, LOSS, CHART, LIFE, DEATHS, STOPS, CAUSES, QUICKSTART]
    assert sorted(mixed, key=order_of) == [CAUSES, QUICKSTART, LIFE, STOPS, DEATHS, CHART, LOSS, LOGS]


def test_every_lane_has_its_place() -> None:
    assert {lane_of(test) for test in (QUICKSTART, CAUSES, STOPS, DEATHS, LIFE, CHART)} <= set(FIRST)


def test_the_times_of_lanes_add_up_and_the_slowest_test_comes_first() -> None:
    lines = list(format_times({QUICKSTART: 100.0, CAUSES: 20.0, LOSS: 2.0, LOGS: 0.5}, building=7, testing=90))
    assert [line.split() for line in lines] == [
        *(["7", "s", "before", "the", "tests:", "packages,", "programs", "and", "images"],),
        *(["90", "s", "the", "tests,", "in", "lanes", "beside", "each", "other:"],),
        *(["120", "s", "node:", "2", "tests"], ["2", "s", "the", "others:", "2", "tests"]),
        *(["the", "10", "slowest", "tests,", "with", "what", "was", "set", "up", "for", "them:"],),
        *(["100.0", "s", QUICKSTART], ["20.0", "s", CAUSES], ["2.0", "s", LOSS], ["0.5", "s", LOGS]),
    ]
