"""An operator behind a proxy, on a real control plane."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.chaos.proxy import Proxy, Upstream
from tests.chaos.stage import ScenarioRunner
from tests.cluster.cluster import Cluster
from tests.integration.operator_process import JobNamespace, Operator, install, open_job_namespace

RESYNC: Final = 5
"""Seconds, instead of ten minutes: what a lost event should have told comes with it."""


@pytest.fixture(scope="session")
def installed(control_plane: Cluster) -> Cluster:
    """The CRD and the operator's account."""
    install(control_plane)
    return control_plane


@pytest.fixture
def place(installed: Cluster, request: pytest.FixtureRequest) -> Iterator[JobNamespace]:
    """A namespace of its own for every test."""
    with open_job_namespace(installed, request.node.name) as place:
        yield place


@pytest.fixture
def proxy(installed: Cluster) -> Iterator[Proxy]:
    """A proxy that does no harm yet."""
    proxy = Proxy(Upstream.of(installed)).start()
    yield proxy
    proxy.stop()


def is_watch_expiry(line: str) -> bool:
    """Whether a line of the log is about a watch that the API server ended for good: a new process makes new ones."""
    return line.startswith("{") and "'reason': 'Expired', 'code': 410" in line


@pytest.fixture
def operator(installed: Cluster, proxy: Proxy, tmp_path: Path) -> Iterator[Operator]:
    """An operator that sees the API server through the proxy; it is not started yet, and serves every namespace."""
    operator = Operator(installed, tmp_path, server=proxy.server, QLORA_RESYNC_SECONDS=str(RESYNC))
    yield operator
    operator.stop_and_check_log(lambda line: proxy.fault.refuses_watches and is_watch_expiry(line))


@pytest.fixture
def stage(installed: Cluster, proxy: Proxy, operator: Operator) -> ScenarioRunner:
    """A stage with the operator on it."""
    return ScenarioRunner(installed, proxy, operator.start())
