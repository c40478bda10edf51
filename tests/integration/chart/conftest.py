"""A control plane of these tests' own: they install the CRD and policies for the whole cluster."""

import os
from collections.abc import Iterator
from typing import Any, Final

import pytest
import yaml

from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
from tests.cluster.host.progress import Unavailable
from tests.cluster.programs.binaries import fetch_source

NAMESPACES: Final = ("qlora-system", "team-a", "team-b", "monitoring")
MONITORING_GROUP: Final = "monitoring.coreos.com"
MONITORING_CRDS: Final = ("servicemonitors", "podmonitors", "prometheusrules")


@pytest.fixture(scope="session")
def plane() -> Iterator[Cluster]:
    try:
        cluster = Cluster.start(f"chart-{os.getpid()}", s3=False)
    except Unavailable as reason:
        pytest.skip(str(reason))
    with cluster:
        cluster.apply(
            *({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}} for name in NAMESPACES),
            *monitoring_crds(),
        )
        # Helm asks the API server what it serves, and a new kind is served a moment later.
        wait_until("monitors", lambda: len(served_monitors(cluster)) == len(MONITORING_CRDS), 60)
        yield cluster


def served_monitors(cluster: Cluster) -> list[str]:
    """The kinds of the Prometheus operator that the API server serves."""
    return cluster.kubectl(
        "api-resources", f"--api-group={MONITORING_GROUP}", "--output=name", "--cached=false"
    ).split()


def monitoring_crds() -> Iterator[dict[str, Any]]:
    """The Prometheus operator's own, so that monitors and alert rules meet the schemas that they are written for."""
    source = fetch_source("prometheus", "github.com/prometheus-operator/prometheus-operator")
    for plural in MONITORING_CRDS:
        path = source / f"example/prometheus-operator-crd/{MONITORING_GROUP}_{plural}.yaml"
        yield yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
