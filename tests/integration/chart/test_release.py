"""The chart on a real API server: what it takes of what is rendered, whom it lets do what, and what policy refuses."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from qlora_operator.resources import build_train_job
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import CommandError, run, wait_until
from tests.golden.test_children import CPU, INSTALLATION, OWNER, RUN
from tests.integration.chart.rendering import NAMESPACE, RELEASE, helm, render
from tests.integration.chart.test_rendering import MONITORING, POLICY, VALUES
from tests.integration.operator_process import JobNamespace, Operator
from tests.make import make_manifest

BAD_MODEL: Final = {"model": {"uri": "hf://elsewhere/model"}}


@pytest.fixture(scope="module")
def release(plane: Cluster) -> Iterator[Cluster]:
    """The chart with organisation policy for the namespaces labelled so, and with monitors."""
    plane.kubectl("label", "namespace", "team-a", "--overwrite", "policy=yes")
    command = [*helm("upgrade"), "--install", f"--kubeconfig={plane.kubeconfig}", "--values=-"]
    run(command, stdin=json.dumps({"policy": POLICY, "monitoring": VALUES["monitored"]["monitoring"]}))
    plane.wait_until_served()
    # The API server's own plugin notices a new policy a moment later.
    wait_until("the policy", lambda: not accepts(plane, run_of(BAD_MODEL)), 30, 0.3)
    yield plane
    plane.helm("uninstall", RELEASE, f"--namespace={NAMESPACE}")


@pytest.mark.parametrize("name", VALUES)
def test_rendered_manifests_are_accepted(release: Cluster, name: str) -> None:
    items = [set_namespace(manifest) for manifest in render(VALUES[name], apis=MONITORING)]
    release.kubectl(
        "apply", "--server-side", "--dry-run=server", "--validate=strict", "--force-conflicts", "--filename=-",
        stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}),
    )  # fmt: skip


def set_namespace(manifest: dict[str, Any]) -> dict[str, Any]:
    """Say where an object goes, as Helm does when it sends one without a namespace."""
    return {**manifest, "metadata": {"namespace": NAMESPACE, **manifest["metadata"]}}


def test_helm_detects_monitor_crds(release: Cluster) -> None:
    for kind, name in (("servicemonitor", RELEASE), ("podmonitor", f"{RELEASE}-trainer"), ("prometheusrule", RELEASE)):
        assert release.get(kind, name, f"--namespace={NAMESPACE}")["metadata"]["labels"]["helm.sh/chart"]


ACCOUNT: Final = f"--as=system:serviceaccount:{NAMESPACE}:{RELEASE}"
VIEWER: Final = "--as=viewer"
EDITOR: Final = "--as=editor"


@pytest.fixture(scope="module")
def people(release: Cluster) -> Cluster:
    """Somebody with `view` and somebody with `edit`, in one namespace."""
    for role, name in (("view", "viewer"), ("edit", "editor")):
        release.kubectl("create", "rolebinding", name, f"--clusterrole={role}", f"--user={name}", "--namespace=team-a")
    # The controller manager aggregates roles a moment later.
    wait_until("aggregated roles", lambda: allowed(release, EDITOR, "create", "qlorajobs"), 30, 0.3)
    return release


def allowed(cluster: Cluster, who: str, verb: str, resource: str) -> bool:
    kind, _, subresource = resource.partition("/")
    try:
        cluster.kubectl(
            "auth", "can-i", verb, kind, f"--subresource={subresource}", who, "--namespace=team-a", "--quiet"
        )
    except CommandError:
        return False
    return True


@pytest.mark.parametrize(
    ("who", "verb", "resource", "may"),
    [
        (VIEWER, "list", "qlorajobs", True),
        (VIEWER, "create", "qlorajobs", False),
        (EDITOR, "get", "qlorajobs", True),
        (EDITOR, "delete", "qlorajobs", True),
        (EDITOR, "update", "qlorajobs/status", False),
        (ACCOUNT, "update", "qlorajobs/status", True),
        (ACCOUNT, "create", "jobs", True),
        (ACCOUNT, "update", "qlorajobs", False),
        (ACCOUNT, "get", "secrets", False),
        (ACCOUNT, "create", "pods/exec", False),
    ],
)
def test_roles_grant_expected_permissions(people: Cluster, who: str, verb: str, resource: str, may: bool) -> None:
    assert allowed(people, who, verb, resource) is may


def test_policy_expressions_type_check(release: Cluster) -> None:
    def checked() -> list[dict[str, Any]]:
        policies = release.get("validatingadmissionpolicies")["items"]
        return [policy.get("status", {}) for policy in policies]

    wait_until("types to be checked", lambda: all("observedGeneration" in status for status in checked()), 30, 0.3)
    assert [status["typeChecking"] for status in checked()] == [{}] * 3


def run_of(blocks: dict[str, Any], namespace: str = "team-a") -> dict[str, Any]:
    """A QLoRAJob that policy allows, with some fields of some blocks changed."""
    manifest = make_manifest(**{"model": {"uri": "hf://meta-llama/Llama-3.2-3B"}, **blocks})
    manifest["metadata"] = {"name": "policy", "namespace": namespace}
    if "output" not in blocks:
        manifest["spec"]["output"]["uri"] = f"s3://adapters/{namespace}/bots"
    return manifest


def create(cluster: Cluster, manifest: dict[str, Any]) -> None:
    """What the API server would make of a new object; nothing is stored."""
    cluster.kubectl("create", "--dry-run=server", "--filename=-", stdin=json.dumps(manifest))


def accepts(cluster: Cluster, manifest: dict[str, Any]) -> bool:
    try:
        create(cluster, manifest)
    except CommandError:
        return False
    return True


def refusal_of(cluster: Cluster, manifest: dict[str, Any]) -> str:
    with pytest.raises(CommandError) as refusal:
        create(cluster, manifest)
    return str(refusal.value)


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param({}, id="below-a-prefix"),
        pytest.param({"model": {"uri": "s3://models/llama-3.2-3b"}}, id="the-very-uri"),
        pytest.param({"model": {"uri": "s3://models/llama-3.2-3b/4bit"}}, id="below-a-uri"),
        pytest.param({"resources": {"nodes": 2, "gpusPerNode": 4}}, id="the-last-gpu"),
    ],
)
def test_policy_accepts_allowed_runs(release: Cluster, blocks: dict[str, Any]) -> None:
    create(release, run_of(blocks))


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        pytest.param(
            BAD_MODEL,
            "spec.model.uri: hf://elsewhere/model is not allowed: use a model from hf://meta-llama/, "
            "s3://models/llama-3.2-3b, or ask an administrator to add it to policy.models",
            id="model",
        ),
        pytest.param(
            {"model": {"uri": "hf://meta-llama-2/x"}}, "spec.model.uri: hf://meta-llama-2/x", id="like-a-name"
        ),
        pytest.param({"model": {"uri": "s3://models/llama-3.2-3b-x"}}, "spec.model.uri: s3://models", id="like-a-uri"),
        pytest.param(
            {"output": {"uri": "s3://adapters/team-b/bots"}},
            "spec.output.uri: s3://adapters/team-b/bots is not allowed: choose a prefix below "
            "s3://adapters/team-a/, or ask an administrator to add it to policy.outputs",
            id="output-of-another-team",
        ),
        pytest.param({"output": {"uri": "s3://adapters/team-a-x"}}, "spec.output.uri", id="output-like-a-prefix"),
        pytest.param(
            {"resources": {"gpuResource": "nvidia.com/mig-1g.10gb", "gpusPerNode": 1}},
            "spec.resources.gpuResource: nvidia.com/mig-1g.10gb is not allowed: use nvidia.com/gpu, or ask an "
            "administrator to add it to policy.gpuResources",
            id="partition",
        ),
        pytest.param(
            {"resources": {"nodes": 3, "gpusPerNode": 4}},
            "spec.resources: 12 GPUs (nodes x gpusPerNode) exceed the limit of 8 (policy.maxGpusPerJob): request fewer",
            id="gpus",
        ),
    ],
)
def test_policy_refuses_with_field_reason_and_fix(release: Cluster, blocks: dict[str, Any], sentence: str) -> None:
    refusal = refusal_of(release, run_of(blocks))
    assert sentence in refusal
    assert "(Forbidden)" in refusal


def test_policy_refuses_path_traversal(release: Cluster) -> None:
    assert "spec.model.uri" in refusal_of(release, run_of({"model": {"uri": "s3://models/llama-3.2-3b/../secret"}}))


def test_policy_applies_to_selected_namespaces(release: Cluster) -> None:
    create(release, run_of({**BAD_MODEL, "output": {"uri": "s3://anywhere/at-all"}}, namespace="team-b"))


def job_with(image: str) -> dict[str, Any]:
    """A training Job as the operator makes it, with an image."""
    job = build_train_job(OWNER, CPU, RUN, INSTALLATION)
    job["metadata"]["namespace"] = "team-a"
    job["spec"]["template"]["spec"]["containers"][0]["image"] = image
    return job


def pod_with(image: str) -> dict[str, Any]:
    """Its pod, made by hand."""
    template = job_with(image)["spec"]["template"]
    metadata = {"name": "impostor", "namespace": "team-a", **template["metadata"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


FOREIGN_IMAGES: Final = (
    "busybox",
    "qlora-trainer-evil:1",
    "qlora-trainer/evil:1",
    "qlora-trainer:5000/evil:1",
    "docker.io/evil/qlora-trainer:1",
    "evil.example/qlora-trainer",
    "registry.example/mlx/trainer:1",
    "registry.example/ml/../evil:1",
    "registry.example:5000/ml/trainer:1",
    "registry.example@evil.example/ml/trainer:1",
    "registry.example.evil/ml/trainer:1",
    "Registry.example/ml/trainer:1",
)
"""None is `qlora-trainer`, with a tag or a digest, or below `registry.example/ml/`."""


@pytest.mark.parametrize("build", [job_with, pod_with], ids=["job", "pod"])
def test_labeled_pods_need_allowed_image(release: Cluster, build: Any) -> None:
    for image in ("qlora-trainer:0.1.0", "registry.example/ml/trainer@sha256:" + "a" * 64):
        create(release, build(image))
    for image in FOREIGN_IMAGES:
        assert f"image: {image} is not allowed in a pod with the label qlora.dev/job" in refusal_of(
            release, build(image)
        )


def test_image_volume_needs_allowed_image(release: Cluster) -> None:
    for image, allowed in (("registry.example/ml/data:1", True), ("evil.example/code:1", False)):
        pod = pod_with("qlora-trainer:0.1.0")
        pod["spec"]["volumes"].append({"name": "code", "image": {"reference": image}})
        assert accepts(release, pod) is allowed


@pytest.fixture
def operator(release: Cluster, tmp_path: Path) -> Iterator[Operator]:
    """The operator with the rights that the chart gives it, in the place of one of the pods that the chart makes."""
    selector = f"--selector=app.kubernetes.io/instance={RELEASE}"
    [pod, *_] = release.get("pods", f"--namespace={NAMESPACE}", selector)["items"]
    process = Operator(release, tmp_path, POD_NAMESPACE=NAMESPACE, POD_NAME=pod["metadata"]["name"])
    yield process.start()
    process.stop()


def test_chart_rbac_suffices_and_policy_refusal_is_in_status(release: Cluster, operator: Operator) -> None:
    allowed, refused = JobNamespace(release, "team-b"), JobNamespace(release, "team-a")
    for namespace in (allowed, refused):
        namespace.kubectl("create", "--filename=-", stdin=json.dumps(run_of({}, namespace.namespace)))
    allowed.wait_for("Preparing", name="policy")
    status = refused.wait_for("Pending", "PodRejected", name="policy")
    assert "image: trainer:test is not allowed in a pod with the label qlora.dev/job" in status["message"]
    leader = release.get("pods", f"--namespace={NAMESPACE}", "--selector=qlora.dev/leader=true")["items"]
    assert len(leader) == 1
    # RBAC names whom it refuses.
    assert f"system:serviceaccount:{NAMESPACE}" not in operator.log.read_text()
    for namespace in (allowed, refused):
        namespace.kubectl("delete", "qlj", "policy")


def test_policy_ignores_unlabeled_pods(release: Cluster) -> None:
    pod = pod_with("busybox")
    del pod["metadata"]["labels"]
    create(release, pod)


def test_gpu_quota_of_namespace(release: Cluster) -> None:
    quota = release.get("resourcequota", f"{RELEASE}-gpus", "--namespace=team-a")
    assert quota["spec"]["hard"] == {"requests.nvidia.com/gpu": "16"}
