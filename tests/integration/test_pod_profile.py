"""The Jobs of an installation that sets all it may, on a real API server: the pods that its Job controller creates."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import pytest
import yaml

from qlora_api.pod_profile import DEFAULT_PROFILE, PodProfile
from qlora_operator.models import AttemptInputs
from qlora_operator.resources import build_prepare_job, build_train_job
from qlora_planner import make_plan
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
from tests.integration.chart.rendering import ROOT, render
from tests.make import INSTALLATION, OWNER, make_prepared, make_spec

EXAMPLES: Final = sorted((ROOT / "examples/pods").glob("*.yaml"))
EVERYTHING: Final[dict[str, Any]] = {
    "labels": {"cost-center": "42"},
    "annotations": {"sidecar.istio.io/inject": "false"},
    "nodeSelector": {"pool": "ml"},
    "tolerations": [{"key": "dedicated", "operator": "Equal", "value": "ml", "effect": "NoSchedule"}],
    "priorityClassName": "training",
    "runtimeClassName": "nvidia",
    "schedulerName": "volcano",
    "imagePullSecrets": [{"name": "registry"}],
    "hostAliases": [{"ip": "10.0.0.5", "hostnames": ["s3.example"]}],
    "dnsPolicy": "None",
    "dnsConfig": {"nameservers": ["10.0.0.2"], "options": [{"name": "ndots", "value": "2"}]},
    "env": [
        {"name": "NCCL_IB_HCA", "value": "mlx5"},
        {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
    ],
    "volumes": [
        {"name": "models", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
        {"name": "certificates", "projected": {"sources": [{"configMap": {"name": "certificates"}}]}},
    ],
    "volumeMounts": [
        {"name": "models", "mountPath": "/models"},
        {"name": "certificates", "mountPath": "/certificates"},
    ],
    "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
    "proxy": {"http": "http://proxy:3128", "https": "http://proxy:3128"},
    "caBundle": {"configMap": "company-ca"},
}
CLASSES: Final = (
    {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "nvidia"}, "handler": "nvidia"},
    {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {"name": "training"},
        "value": 1000,
    },
)


def jobs_of(profile: PodProfile, **resources: Any) -> list[dict[str, Any]]:
    """The prepare Job and the training Job of such a run."""
    spec = make_spec(resources=resources, training={"globalBatchSize": 64})
    run = AttemptInputs(1, make_plan(spec, make_prepared()), make_prepared())
    installation = replace(INSTALLATION, pods=profile)
    jobs = [build_prepare_job(OWNER, spec, installation), build_train_job(OWNER, spec, run, installation)]
    for job in jobs:  # its QLoRAJob is not in this cluster, and the garbage collector would delete the Job
        del job["metadata"]["ownerReferences"]
    return jobs


def pods_of(cluster: Cluster, namespace: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the Job controller creates from Jobs that the API server takes without an unknown field."""
    cluster.apply(*CLASSES)
    cluster.create_namespace(namespace)
    expected = 0
    for job in jobs:
        job["metadata"]["namespace"] = namespace
        expected += job["spec"]["completions"]
        cluster.kubectl("create", "--validate=strict", "-f", "-", stdin=yaml.safe_dump(job))

    def listed() -> list[dict[str, Any]]:
        return list(json.loads(cluster.kubectl("get", "pods", "-n", namespace, "-o", "json"))["items"])

    wait_until(f"{expected} pods", lambda: len(listed()) == expected, 60)
    return listed()


def is_within(part: Any, whole: Any) -> bool:
    """Whether every leaf of a value is in another, which may have more keys and entries."""
    if isinstance(part, Mapping):
        return all(key in whole and is_within(value, whole[key]) for key, value in part.items())
    if isinstance(part, list):
        return all(any(is_within(entry, other) for other in whole) for entry in part)
    return bool(part == whole)


@pytest.mark.parametrize("nodes", [1, 2])
def test_api_server_keeps_every_setting_in_the_pods_of_runs(control_plane: Cluster, nodes: int) -> None:
    profile = PodProfile.model_validate(EVERYTHING)
    pods = pods_of(control_plane, f"pods-{nodes}", jobs_of(profile, nodes=nodes, gpusPerNode=1))
    assert [pod["metadata"]["labels"]["qlora.dev/role"] for pod in pods].count("train") == nodes
    for pod in pods:
        in_metadata = {"labels", "annotations"}
        in_container = {"env", "volumeMounts"}
        in_pod = EVERYTHING.keys() - in_metadata - in_container - {"proxy", "caBundle"}
        assert is_within({field: EVERYTHING[field] for field in in_metadata}, pod["metadata"])
        assert is_within({field: EVERYTHING[field] for field in in_container}, pod["spec"]["containers"][0])
        assert is_within({field: EVERYTHING[field] for field in in_pod}, pod["spec"])
        assert pod["spec"]["priority"] == 1000
        assert "runAsGroup" not in pod["spec"]["securityContext"]


def test_pods_without_user_are_admitted_by_the_restricted_standard(control_plane: Cluster) -> None:
    context = DEFAULT_PROFILE.security_context.model_copy(
        update={"run_as_user": None, "run_as_group": None, "fs_group": None}
    )
    profile = DEFAULT_PROFILE.model_copy(update={"security_context": context})
    for pod in pods_of(control_plane, "pods-openshift", jobs_of(profile, gpusPerNode=1)):
        assert pod["spec"]["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_operator_reads_what_the_chart_renders_of_an_example(example: Any) -> None:
    values = yaml.safe_load(example.read_text(encoding="utf-8"))
    [deployment] = [manifest for manifest in render(values) if manifest["kind"] == "Deployment"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    [text] = [variable["value"] for variable in container["env"] if variable["name"] == "QLORA_PODS"]
    profile = PodProfile.model_validate_json(text)
    assert profile != DEFAULT_PROFILE
    assert profile.security_context.run_as_user == (None if example.stem == "openshift" else 65532)
