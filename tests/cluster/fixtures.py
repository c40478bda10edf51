"""Session fixtures: `control_plane` for tests of the API, `cluster` for tests that run pods."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.host.progress import Unavailable


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Cluster]:
    """A control plane and an S3 server; pods are accepted and never run."""
    with cluster_for_tests(node=False) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster with a real node, and an S3 server that its pods reach."""
    with cluster_for_tests(node=True) as cluster:
        yield cluster


@contextmanager
def cluster_for_tests(*, node: bool) -> Iterator[Cluster]:
    """Use the cluster that the environment names, or start one for this session, or skip with the reason."""
    try:
        cluster = named_cluster() or Cluster.start(f"{'node' if node else 'plane'}-{os.getpid()}", node=node)
    except Unavailable as reason:
        pytest.skip(str(reason))
    with cluster:
        yield cluster


def named_cluster() -> Cluster | None:
    """Return the cluster that the environment names, if it names one."""
    if kubeconfig := os.environ.get("QLORA_TEST_KUBECONFIG"):
        return Cluster.existing(Path(kubeconfig))
    if name := os.environ.get("QLORA_TEST_CLUSTER"):
        return Cluster.attach(name)
    return None
