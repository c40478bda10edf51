"""A pytest plugin: which tests run beside each other, and where the time of a run went.

With `--numprocesses`, tests that share something expensive (a cluster, a server, a run) stay in one process: a lane.
Every other file is a lane of its own. Lanes that mostly wait start first, and the others use the cores meanwhile.
"""

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, Final

import pytest
from xdist.scheduler import LoadScopeScheduling

LANES: Final = {
    "tests/e2e": "node",
    "tests/chaos/test_exit_causes.py": "node",
    "tests/integration/chart": "chart",
    "tests/integration/test_admission_burst.py": "simulated nodes",
    "tests/integration/test_gpu_nodes.py": "simulated nodes",
    "tests/integration/test_kueue.py": "simulated nodes",
    "tests/integration/test_kueue_for_all_jobs.py": "simulated nodes",
    "tests/integration": "control plane",
    "tests/chaos/trainer": "object store",
    "tests/chaos": "operator under faults",
}
"""Folders and files whose tests share a cluster or a server; the first that a file lies under counts."""
FIRST: Final = ("node", "control plane", "object store", "operator under faults", "chart", "simulated nodes")
"""The order in which they begin."""
NAMES_OF_CLUSTERS: Final = ("QLORA_TEST_KUBECONFIG", "QLORA_TEST_CLUSTER")
"""Variables that name a cluster to use; where there is one for all, tests on it follow each other in the first lane."""
ON_NAMED: Final = frozenset({"node", "control plane", "operator under faults"})
LONG: Final = "tests/unit/trainer"
"""Of the other files these begin first: a long one that begins last keeps a single core busy."""
BEGAN: Final = "QLORA_TESTS_BEGAN"
"""The variable in which `make test` says when it began, in seconds since 1970: it builds before it tests."""
STARTED: Final = pytest.StashKey[float]()
SLOWEST: Final = 10
NICENESS: Final = 5
"""Of every lane but the first, which takes longest: it should wait for nobody, and the others have its pauses."""


def lane_of(nodeid: str) -> str:
    """Return the lane of a test, which is its own file where it shares nothing."""
    path = PurePosixPath(nodeid.partition("::")[0])
    lane = next((lane for root, lane in LANES.items() if path.is_relative_to(root)), str(path))
    return "node" if lane in ON_NAMED and any(map(os.environ.get, NAMES_OF_CLUSTERS)) else lane


def order_of(nodeid: str) -> int:
    """Return the place of a test in the order in which lanes begin."""
    lane = lane_of(nodeid)
    return FIRST.index(lane) if lane in FIRST else len(FIRST) + (not lane.startswith(LONG))


class Lanes(LoadScopeScheduling):
    """Hands out lanes, one after the other."""

    def _split_scope(self, nodeid: str) -> str:
        return lane_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Lanes:
    """Schedule lanes in the order of FIRST instead of by their number of tests."""
    config.option.loadscopereorder = False
    return Lanes(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of a lane together; those of one file stay in their order."""
    items.sort(key=lambda item: order_of(item.nodeid))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lower the priority of a test, and of what it starts, below that of the longest lane."""
    if hasattr(item.config, "workerinput") and os.environ.get(BEGAN) and lane_of(item.nodeid) != FIRST[0]:
        os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Record when the tests started."""
    session.config.stash[STARTED] = time.time()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print where the time went, if `make test` asks for it."""
    if BEGAN not in os.environ:
        return
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid] += report.duration
    terminalreporter.section("where the time went")
    started = config.stash[STARTED]
    for line in format_times(seconds, started - float(os.environ[BEGAN]), time.time() - started):
        terminalreporter.write_line(line)


def format_times(tests: Mapping[str, float], building: float, testing: float) -> Iterator[str]:
    """Yield lines with the time of the build, of each lane, and of the slowest tests including their setup."""
    yield f"{building:7.0f} s  before the tests: packages, programs and images"
    yield f"{testing:7.0f} s  the tests, in lanes beside each other:"
    lanes: dict[str, list[float]] = defaultdict(list)
    for nodeid, seconds in tests.items():
        lane = lane_of(nodeid)
        lanes[lane if lane in FIRST else "the others"].append(seconds)
    for lane, times in sorted(lanes.items(), key=lambda each: -sum(each[1])):
        yield f"{sum(times):7.0f} s    {lane}: {len(times)} tests"
    yield f"the {SLOWEST} slowest tests, with what was set up for them:"
    for nodeid, seconds in sorted(tests.items(), key=lambda each: -each[1])[:SLOWEST]:
        yield f"{seconds:7.1f} s    {nodeid}"
