"""A control plane of these tests' own: they install the CRD and policies for the whole cluster."""

import os
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.progress import Unavailable

NAMESPACES = ("qlora-system", "team-a", "team-b", "elsewhere")


@pytest.fixture(scope="session")
def plane() -> Iterator[Cluster]:
    try:
        cluster = Cluster.start(f"chart-{os.getpid()}", s3=False)
    except Unavailable as reason:
        pytest.skip(str(reason))
    with cluster:
        cluster.apply(
            *({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}} for name in NAMESPACES),
        )
        yield cluster
