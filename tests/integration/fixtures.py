"""Fixtures of tests with the real operator on the control plane that all of them share."""

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster
from tests.integration.operator_process import JobNamespace, install, open_job_namespace


@pytest.fixture(scope="module")
def installed(control_plane: Cluster) -> Cluster:
    """The CRD and the operator's account."""
    install(control_plane)
    return control_plane


@pytest.fixture
def job_namespace(installed: Cluster, request: pytest.FixtureRequest) -> Iterator[JobNamespace]:
    """A namespace of its own for every test."""
    with open_job_namespace(installed, request.node.name) as job_namespace:
        yield job_namespace
