"""The example repository of runs, and what GitOps controllers do with a run, on a real API server."""

import json
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from qlora_api.reasons import Reason
from qlora_cli.manifests.loader import parse_manifest
from qlora_cli.manifests.yaml_documents import Document
from qlora_planner.validation import CLUSTER_RULES
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import CommandError, run, wait_until
from tests.cluster.programs.binaries import binary
from tests.integration.operator_process import NAME, PREPARE, JobNamespace, Operator
from tests.make import make_manifest, make_termination_message

RUNS: Final = Path(__file__).parents[2] / "examples/gitops/runs/overlays"
OVERLAYS: Final = {path.name: path for path in RUNS.iterdir()}
ARGO, FLUX = "argocd-controller", "kustomize-controller"
"""Field managers, as the two call themselves."""


def render(overlay: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(run([binary("kubectl"), "kustomize", OVERLAYS[overlay]])))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_example_manifests_are_valid(installed: Cluster, overlay: str) -> None:
    rendered = render(overlay)
    assert rendered
    installed.create_namespace(f"ml-{overlay}")
    for manifest in rendered:
        parse_manifest(Document(overlay, manifest, {}), CLUSTER_RULES)
        assert manifest["metadata"]["namespace"] == f"ml-{overlay}"
        installed.kubectl("create", "--dry-run=server", "--filename=-", stdin=json.dumps(manifest))


def test_environments_differ_only_in_overlays() -> None:
    [staging], [production] = render("staging"), render("production")
    assert staging["spec"]["lora"] == production["spec"]["lora"]
    assert staging["spec"]["output"] != production["spec"]["output"]
    assert (staging["metadata"]["name"], production["metadata"]["name"]) == ("support-bot", "support-bot-v1")


def apply(job_namespace: JobNamespace, manager: str, **change: Any) -> dict[str, Any]:
    """Apply the same file as another manager, without force."""
    manifest = json.dumps(make_manifest(NAME, job_namespace.namespace, **change))
    job_namespace.kubectl("apply", "--server-side", f"--field-manager={manager}", "--filename=-", stdin=manifest)
    return dict(job_namespace.cluster.get("qlorajob", NAME, f"--namespace={job_namespace.namespace}"))


def drift(job_namespace: JobNamespace, manager: str) -> str:
    """What this manager would change; nothing is what a controller calls in sync."""
    manifest = json.dumps(make_manifest(NAME, job_namespace.namespace))
    try:
        return job_namespace.kubectl(
            "diff", "--server-side", f"--field-manager={manager}", "--filename=-", stdin=manifest
        )
    except CommandError as difference:
        return str(difference)


def test_two_field_managers_no_drift_and_no_second_run(job_namespace: JobNamespace, tmp_path: Path) -> None:
    operator = Operator(job_namespace.cluster, tmp_path, job_namespace.namespace).start()
    try:
        first = apply(job_namespace, ARGO)
        job_namespace.wait_for("Preparing")
        jobs = {job["metadata"]["uid"] for job in job_namespace.items("jobs")}
        for manager in (FLUX, ARGO, FLUX):
            again = apply(job_namespace, manager)
            assert again["metadata"]["generation"] == first["metadata"]["generation"] == 1
            assert drift(job_namespace, manager) == ""
        shown = job_namespace.cluster.get(
            "qlorajob", NAME, f"--namespace={job_namespace.namespace}", "--show-managed-fields"
        )
        owners = {entry["manager"] for entry in shown["metadata"]["managedFields"]}
        assert owners >= {ARGO, FLUX}
        job_namespace.end_pod(PREPARE, 1, make_termination_message(Reason.DATASET_INVALID, "spec.dataset.uri: no"))
        job_namespace.wait_for("Failed")
        assert apply(job_namespace, ARGO)["metadata"]["generation"] == 1
        assert drift(job_namespace, ARGO) == drift(job_namespace, FLUX) == ""
        assert {job["metadata"]["uid"] for job in job_namespace.items("jobs")} <= jobs, "no further run"
        assert job_namespace.status()["reason"] == "DatasetInvalid"
    finally:
        operator.stop()


def test_changed_immutable_field_is_rejected_without_drift(job_namespace: JobNamespace) -> None:
    """So that a GitOps controller shows the error where the change was made, and the run goes on."""
    apply(job_namespace, ARGO)
    with pytest.raises(CommandError, match=r"spec\.lora cannot change; create a QLoRAJob with another name"):
        apply(job_namespace, ARGO, lora={"rank": 8})
    assert drift(job_namespace, ARGO) == ""


def test_suspension_by_other_manager_is_kept(job_namespace: JobNamespace) -> None:
    """A file without `suspend` says nothing about it: server-side apply leaves it to whoever set it."""
    apply(job_namespace, ARGO)
    patch = json.dumps({"spec": {"suspend": True}})
    job_namespace.kubectl("patch", "qlorajob", NAME, "--type=merge", "--field-manager=qlora", f"--patch={patch}")
    assert apply(job_namespace, ARGO)["spec"]["suspend"] is True
    wait_until("no drift", lambda: drift(job_namespace, ARGO) == "")
