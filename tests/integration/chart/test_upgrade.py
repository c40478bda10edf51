"""From the previous chart to this one and away again, with a run under way."""

import json
from typing import Any, Final

import pytest
import yaml

from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
from tests.integration.chart.rendering import BEFORE, CHART, NAMESPACE, RELEASE
from tests.make import make_manifest, merge

JOB: Final = "support-bot"
STATUS: Final = {"observedGeneration": 1, "phase": "Training", "reason": "Training", "progress": "40%"}


def submit_running_job(cluster: Cluster) -> dict[str, Any]:
    """A QLoRAJob as the operator leaves it in the middle of its training."""
    manifest = make_manifest()
    manifest["metadata"] = {"name": JOB, "namespace": "team-a"}
    cluster.apply(manifest)
    patch = json.dumps({"status": STATUS})
    cluster.kubectl(
        "patch", "qlj", JOB, "--namespace=team-a", "--subresource=status", "--type=merge", f"--patch={patch}"
    )
    return job(cluster)


def job(cluster: Cluster) -> dict[str, Any]:
    return dict(cluster.get("qlorajob", JOB, "--namespace=team-a"))


def installed(cluster: Cluster, kind: str, *flags: str) -> set[str]:
    """Names of the release's objects of a kind."""
    items = cluster.get(kind, f"--selector=app.kubernetes.io/instance={RELEASE}", *flags)["items"]
    return {item["metadata"]["name"] for item in items}


@pytest.mark.parametrize("namespaces", [(), ("team-a",)], ids=["cluster-wide", "namespaced"])
def test_upgrade_updates_crd_and_keeps_runs_and_values(plane: Cluster, namespaces: tuple[str, ...]) -> None:
    values = json.dumps({"logLevel": "debug", "watchNamespaces": namespaces})
    release = f"--namespace={NAMESPACE}"
    plane.helm("install", RELEASE, BEFORE, release, f"--set-json={values}")
    wait_until("the CRD", lambda: crd_is_served(plane), 30)
    before = submit_running_job(plane)

    plane.helm("upgrade", RELEASE, CHART, release, "--reset-then-reuse-values")
    crd = plane.get("crd", "qlorajobs.qlora.dev")
    assert crd["metadata"]["labels"]["helm.sh/chart"] == f"qlora-operator-{chart_version()}"
    assert job(plane)["metadata"]["uid"] == before["metadata"]["uid"]
    # Fields that are new get their defaults.
    assert merge(job(plane)["spec"], before["spec"]) == job(plane)["spec"]
    assert job(plane)["status"] == before["status"]
    assert '"QLORA_LOG_LEVEL","value":"debug"' in json.dumps(
        plane.get("deployment", RELEASE, release), separators=(",", ":")
    )
    assert installed(plane, "rolebinding", "--namespace=team-a") == ({f"{RELEASE}-jobs"} if namespaces else set())
    assert (RELEASE in installed(plane, "clusterrolebinding")) is not bool(namespaces)

    plane.helm("uninstall", RELEASE, release)
    assert job(plane)["metadata"]["uid"] == before["metadata"]["uid"]
    plane.kubectl("delete", "qlj", JOB, "--namespace=team-a")


def crd_is_served(cluster: Cluster) -> bool:
    cluster.wait_until_served()
    return bool(cluster.get("crd")["items"])


def chart_version() -> str:
    return str(yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))["version"])
