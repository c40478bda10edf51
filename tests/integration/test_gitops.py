"""The example repository of runs, and what GitOps controllers do with a run, on a real API server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from qlora_api.reasons import Reason
from qlora_cli.manifests.loader import parse_manifest
from qlora_cli.manifests.yaml_documents import Document
from qlora_planner.validation import CLUSTER_RULES
from tests.cluster.binaries import binary
from tests.cluster.cluster import Cluster
from tests.cluster.commands import CommandError, run, wait_until
from tests.integration.operator_process import NAME, PREPARE, JobNamespace, Operator, install, open_job_namespace
from tests.make import make_manifest, make_termination_message

RUNS: Final = Path(__file__).parents[2] / "examples/gitops/runs/overlays"
OVERLAYS: Final = {path.name: path for path in RUNS.iterdir()}
ARGO, FLUX = "argocd-controller", "kustomize-controller"
"""Field managers, as the two call themselves."""


def render(overlay: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(run([binary("kubectl"), "kustomize", OVERLAYS[overlay]])))


@pytest.fixture(scope="module")
def installed(control_plane: Cluster) -> Cluster:
    install(control_plane)
    return control_plane


@pytest.fixture
def place(installed: Cluster, request: pytest.FixtureRequest) -> Iterator[JobNamespace]:
    with open_job_namespace(installed, request.node.name) as place:
        yield place


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_example_runs_are_valid(installed: Cluster, overlay: str) -> None:
    rendered = render(overlay)
    assert rendered
    installed.create_namespace(f"ml-{overlay}")
    for manifest in rendered:
        parse_manifest(Document(overlay, manifest, {}), CLUSTER_RULES)
        assert manifest["metadata"]["namespace"] == f"ml-{overlay}"
        installed.kubectl("create", "--dry-run=server", "--filename=-", stdin=json.dumps(manifest))


def test_environments_share_a_recipe_and_nothing_else() -> None:
    [staging], [production] = render("staging"), render("production")
    assert staging["spec"]["lora"] == production["spec"]["lora"]
    assert staging["spec"]["output"] != production["spec"]["output"]
    assert (staging["metadata"]["name"], production["metadata"]["name"]) == ("support-bot", "support-bot-v1")


def apply(place: JobNamespace, manager: str, **change: Any) -> dict[str, Any]:
    """Apply the same file as another manager, without force."""
    manifest = json.dumps(make_manifest(NAME, place.namespace, **change))
    place.kubectl("apply", "--server-side", f"--field-manager={manager}", "--filename=-", stdin=manifest)
    return dict(place.cluster.get("qlorajob", NAME, f"--namespace={place.namespace}"))


def drift(place: JobNamespace, manager: str) -> str:
    """What this manager would change; nothing is what a controller calls in sync."""
    manifest = json.dumps(make_manifest(NAME, place.namespace))
    try:
        return place.kubectl("diff", "--server-side", f"--field-manager={manager}", "--filename=-", stdin=manifest)
    except CommandError as difference:
        return str(difference)


def test_two_field_managers_no_drift_and_no_second_run(place: JobNamespace, tmp_path: Path) -> None:
    operator = Operator(place.cluster, tmp_path, place.namespace).start()
    try:
        first = apply(place, ARGO)
        place.wait_for("Preparing")
        jobs = {job["metadata"]["uid"] for job in place.items("jobs")}
        for manager in (FLUX, ARGO, FLUX):
            again = apply(place, manager)
            assert again["metadata"]["generation"] == first["metadata"]["generation"] == 1
            assert drift(place, manager) == ""
        shown = place.cluster.get("qlorajob", NAME, f"--namespace={place.namespace}", "--show-managed-fields")
        owners = {entry["manager"] for entry in shown["metadata"]["managedFields"]}
        assert owners >= {ARGO, FLUX}
        place.end_pod(PREPARE, 1, make_termination_message(Reason.DATASET_INVALID, "spec.dataset.uri: no"))
        place.wait_for("Failed")
        assert apply(place, ARGO)["metadata"]["generation"] == 1
        assert drift(place, ARGO) == drift(place, FLUX) == ""
        assert {job["metadata"]["uid"] for job in place.items("jobs")} <= jobs, "no further run"
        assert place.status()["reason"] == "DatasetInvalid"
    finally:
        operator.stop()


def test_a_changed_recipe_is_refused_before_anything_drifts(place: JobNamespace) -> None:
    """So that a GitOps controller shows the error where the change was made, and the run goes on."""
    apply(place, ARGO)
    with pytest.raises(CommandError, match=r"spec\.lora cannot change; create a QLoRAJob with another name"):
        apply(place, ARGO, lora={"rank": 8})
    assert drift(place, ARGO) == ""


def test_what_one_manager_suspends_another_does_not_resume(place: JobNamespace) -> None:
    """A file without `suspend` says nothing about it: server-side apply leaves it to whoever set it."""
    apply(place, ARGO)
    patch = json.dumps({"spec": {"suspend": True}})
    place.kubectl("patch", "qlorajob", NAME, "--type=merge", "--field-manager=qlora", f"--patch={patch}")
    assert apply(place, ARGO)["spec"]["suspend"] is True
    wait_until("no drift", lambda: drift(place, ARGO) == "", timeout=10)
