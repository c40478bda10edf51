"""What is wrong in one namespace does not reach another, against a real API server."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_api import names
from qlora_operator.cluster.rbac import build_cluster_rules, build_rules
from tests.chaos.promises import promise
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
from tests.integration.operator_process import (
    ACCOUNT,
    NAME,
    PREPARE,
    JobNamespace,
    Operator,
    build_rbac,
    install,
    open_job_namespace,
)

Manifest = dict[str, Any]


@pytest.fixture
def team_a(control_plane: Cluster, request: pytest.FixtureRequest) -> Iterator[JobNamespace]:
    install(control_plane)
    with open_job_namespace(control_plane, f"a-{request.node.name}") as namespace:
        yield namespace


@pytest.fixture
def team_b(control_plane: Cluster, request: pytest.FixtureRequest) -> Iterator[JobNamespace]:
    with open_job_namespace(control_plane, f"b-{request.node.name}") as namespace:
        yield namespace


def make_foreign_job(namespace: str, owner_uid: str, role: str, attempt: str) -> Manifest:
    """Return a Job of somebody else, controlled by a ConfigMap, with the labels of a child."""
    labels = {
        names.MANAGED_BY_LABEL: names.FIELD_MANAGER, names.JOB_LABEL: NAME, names.ROLE_LABEL: role,
        names.ATTEMPT_LABEL: attempt,
    }  # fmt: skip
    pod = {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner_uid, "controller": True}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"generateName": "copy-", "namespace": namespace, "labels": labels, "ownerReferences": [owner]},
        "spec": {"suspend": True, "template": {"metadata": {"labels": labels}, "spec": pod}},
    }


def wait_for_preparation(namespace: JobNamespace) -> None:
    wait_until(f"preparation in {namespace.namespace}", lambda: PREPARE in namespace.jobs())


@promise(
    fault="somebody creates Jobs with the operator's labels and senseless values",
    promise="each is ignored with a warning; the runs of all namespaces go on, also after a restart of the operator",
    how="three Jobs in a namespace beside those of two teams",
)
def test_job_with_labels_of_a_child_stops_nobody(team_a: JobNamespace, team_b: JobNamespace, tmp_path: Path) -> None:
    operator = Operator(team_a.cluster, tmp_path).start()
    try:
        team_b.kubectl("create", "configmap", "owner")
        uid = team_b.metadata("configmaps", "owner")["uid"]
        for role, attempt in (("debug", "1"), ("train", "two"), ("train", "1")):
            team_b.cluster.admin.create(team_b.path("jobs"), make_foreign_job(team_b.namespace, uid, role, attempt))
        team_a.submit()
        wait_for_preparation(team_a)
        operator.terminate()
        operator.start()
        team_b.submit()
        wait_for_preparation(team_b)
        assert "cannot be read, and is ignored" in operator.log.read_text()
    finally:
        operator.stop_and_check_log()


@pytest.fixture
def narrow_rights(control_plane: Cluster, team_a: JobNamespace) -> Iterator[None]:
    """Give the operator its rights in one namespace only."""
    control_plane.kubectl("delete", "clusterrolebinding", ACCOUNT)
    control_plane.apply(*build_rbac("Role", build_rules(), {"name": ACCOUNT, "namespace": team_a.namespace}))
    yield
    install(control_plane)


@promise(
    fault="the operator may not read one of its namespaces, and another one does not exist",
    promise="it stays healthy and serves the others, and that one as soon as it has the rights",
    how="a Role in one namespace only, then in the other",
)
@pytest.mark.usefixtures("narrow_rights")
def test_namespace_without_rights_is_served_once_it_has_them(
    team_a: JobNamespace, team_b: JobNamespace, tmp_path: Path
) -> None:
    operator = Operator(team_a.cluster, tmp_path, f"{team_b.namespace},{team_a.namespace},missing").start()

    def is_served(namespace: str, value: int = 1) -> bool:
        return f'qlora_operator_namespace_served{{namespace="{namespace}"}} {value}.0' in operator.metrics()

    try:
        wait_until("team a served", lambda: is_served(team_a.namespace))
        team_a.submit()
        wait_for_preparation(team_a)
        team_b.submit()
        time.sleep(5)
        assert operator.healthy()
        assert is_served(team_b.namespace, 0)
        assert is_served("missing", 0)
        team_b.cluster.apply(*build_rbac("Role", build_rules(), {"name": ACCOUNT, "namespace": team_b.namespace}))
        wait_until("team b served", lambda: is_served(team_b.namespace), timeout=90)
        wait_for_preparation(team_b)
        assert operator.healthy()
    finally:
        operator.stop()


def test_startup_without_rights_ends_the_process(team_a: JobNamespace, tmp_path: Path) -> None:
    cluster = team_a.cluster
    cluster.kubectl("delete", "clusterrolebinding", ACCOUNT)
    operator = Operator(cluster, tmp_path)
    try:
        operator.spawn()
        assert operator.process
        assert operator.process.wait(timeout=60) == 1
        assert "is not served, will retry" in operator.log.read_text()
    finally:
        operator.stop()
        cluster.apply(*build_rbac("ClusterRole", build_rules() + build_cluster_rules(), {"name": ACCOUNT}))
