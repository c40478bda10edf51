"""An operator behind a proxy, on a real control plane."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.chaos.proxy import Proxy, Upstream
from tests.chaos.scenario_runner import ScenarioRunner
from tests.cluster.cluster import Cluster
from tests.integration.operator_process import Operator

RESYNC: Final = 5
"""Resync interval in seconds, instead of ten minutes; it makes up for lost events."""


@pytest.fixture
def proxy(installed: Cluster) -> Iterator[Proxy]:
    """A proxy without a fault yet."""
    proxy = Proxy(Upstream.of(installed)).start()
    yield proxy
    proxy.stop()


def is_watch_expiry(line: str) -> bool:
    """Return whether a log line is about an expired watch, after which the operator restarts."""
    return line.startswith("{") and "'reason': 'Expired', 'code': 410" in line


@pytest.fixture
def operator(installed: Cluster, proxy: Proxy, tmp_path: Path) -> Iterator[Operator]:
    """An operator behind the proxy for all namespaces; not started yet."""
    operator = Operator(installed, tmp_path, server=proxy.server, QLORA_RESYNC_SECONDS=str(RESYNC))
    yield operator
    operator.stop_and_check_log(lambda line: proxy.fault.refuses_watches and is_watch_expiry(line))


@pytest.fixture
def runner(installed: Cluster, proxy: Proxy, operator: Operator) -> ScenarioRunner:
    """A scenario runner with a running operator."""
    return ScenarioRunner(installed, proxy, operator.start())
