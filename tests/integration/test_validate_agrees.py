"""`qlora validate` and the API server say the same of a manifest, for each rule that the CRD has in CEL."""

import json
from collections.abc import Iterator
from typing import Any, Final

import pytest

from qlora_api import crd
from qlora_cli.cluster.client import ClusterError
from qlora_cli.cluster.kube_client import KubeClient, connect
from qlora_cli.manifests.loader import ManifestError, parse_manifest
from qlora_cli.manifests.overrides import Override, override_manifest
from qlora_cli.manifests.yaml_documents import parse_documents
from qlora_planner.validation import CLUSTER_RULES
from tests.cluster.cluster import Cluster
from tests.integration.operator_process import install
from tests.make import make_manifest

Change = dict[str, Any]
INVISIBLE: Final = "\u200b"
INVALID_URIS: Final = (
    "s3://bucket/a/../b",
    "s3://B/a",
    "s3://10.0.0.1/a",
    "file:///a",
    "organization/name",
    f"s3://bucket/a{INVISIBLE}b",
)
BAD_URLS: Final = (
    "https://user@host/",
    "http://169.254.169.254/",
    "http://localhost:5000/",
    f"https://host/{INVISIBLE}",
)
SOURCES: Final = "spec.dataset.sources"
URI_FIELDS: Final = ("model.uri", "dataset.uri", "dataset.evaluation.uri", "output.uri")

LONG: Final = "a" * 64
NODE: Final = "spec.resources"
PODS_REFUSED: Final[tuple[Change, ...]] = (
    {f"{NODE}.nodeSelector": {LONG: "x"}},
    {f"{NODE}.nodeSelector": {f"example.com/{LONG}": "x"}},
    {f"{NODE}.nodeSelector": {f"{'a.' * 127}a/zone": "x"}},
    {f"{NODE}.nodeSelector": {"a..b/zone": "x"}},
    {f"{NODE}.nodeSelector": {"Example.com/zone": "x"}},
    {f"{NODE}.nodeSelector": {"a b": "x"}},
    {f"{NODE}.nodeSelector": {"": "x"}},
    {f"{NODE}.nodeSelector": {"zone": LONG}},
    {f"{NODE}.tolerations": [{"key": "gpu", "operator": "Exists", "value": "true"}]},
    {f"{NODE}.tolerations": [{"operator": "Exists", "value": "true"}]},
    {f"{NODE}.tolerations": [{"key": "spot", "operator": "Exists", "tolerationSeconds": 60}]},
    {
        f"{NODE}.tolerations": [
            {"key": "spot", "operator": "Exists", "effect": "NoSchedule", "tolerationSeconds": 60},
        ]
    },
    {f"{NODE}.tolerations": [{"value": "x"}]},
    {f"{NODE}.tolerations": [{}]},
    {f"{NODE}.tolerations": [{"effect": "NoExecute", "operator": "Equal"}]},
    {f"{NODE}.tolerations": [{"key": LONG, "operator": "Exists"}]},
    {f"{NODE}.tolerations": [{"key": "a.-b/c", "operator": "Exists"}]},
    {f"{NODE}.tolerations": [{"key": f"{'a' * 254}/c", "operator": "Exists"}]},
    *({f"{NODE}.memory": memory} for memory in ("512m", "16", "0", "0Gi", "1Mi", "0.1Mi", "64000000000m", "2000Ti")),
    *({f"{NODE}.cpu": cpu} for cpu in ("0", "0m", "0.00", "2Gi", "4k")),
    *({"spec.output.secretRef.name": name} for name in ("a..b", "a.-b", "-a", "A", "a_b", "a" * 254)),
    *({"spec.output.serviceAccountName": name} for name in ("a..b", "a.-b", "a-.b")),
    *({"spec.queue.name": name} for name in ("a..b", "a.-b", LONG)),
    *({"spec.queue": {"name": "a", "priorityClass": name}} for name in ("a..b", "-a")),
    *({"spec.model.uri": f"pvc://{name}/model"} for name in ("a..b", "a-.b", "a" * 254)),
)
"""What the API server would refuse, or never make sense of, in the pods of the run: after its preparation."""

REFUSED: Final[tuple[Change, ...]] = (
    {"metadata.name": "x" * 53},
    {"metadata.name": "support.bot"},
    *({f"spec.{field}": uri} for field in URI_FIELDS for uri in INVALID_URIS),
    *({SOURCES: [{"uri": uri}], "spec.dataset.uri": None} for uri in INVALID_URIS),
    {"spec.model.uri": "hf://name"},
    {"spec.model.revision": "../main"},
    {"spec.dataset.uri": "hf://datasets/name"},
    {SOURCES: [{"uri": "s3://bucket/a"}]},
    {"spec.dataset.uri": None},
    {SOURCES: [{"uri": "s3://bucket/a"}], "spec.dataset.uri": None, "spec.dataset.maxSamples": 5},
    {"spec.dataset.template": {"prompt": "{q}", "answer": "{a}"}, "spec.dataset.format": "chat"},
    {"spec.quantization.bits": 16},
    {"spec.method": "lora"},
    {"spec.method": "full", "spec.quantization.bits": 16, "spec.output.merged": "bf16"},
    {"spec.lora.init": "pissa"},
    {"spec.lora.init": "loftq", "spec.quantization.bits": 8},
    {"spec.lora.init": "loftq", "spec.output.merged": "bf16"},
    {"spec.lora.init": "loftq", "spec.lora.dora": True},
    {"spec.lora.dora": True, "spec.quantization.bits": 8},
    {"spec.lora.targets": ["all-linear", "q_proj"]},
    {"spec.distribution": "ddp"},
    {"spec.resources.gpuResource": "nvidia.com/mig-3g.40gb", "spec.resources.gpusPerNode": 2},
    {
        "spec.resources.gpuResource": "nvidia.com/mig-3g.40gb",
        "spec.resources.nodes": 2,
        "spec.resources.gpusPerNode": 1,
    },
    *({"spec.resources.gpuResource": name} for name in ("", "amd.com/gpu", "gpu", "nvidia.com/mig-", "nvidia.com/GPU")),
    {"spec.distribution": "zero3", "spec.resources.nodes": 2, "spec.lora.modulesToSave": ["lm_head"]},
    {"spec.distribution": "zero2", "spec.resources.nodes": 2, "spec.training.optimizer": "adamw8bit"},
    {"spec.training.microBatchSize": 3},
    {"spec.training.keep": "best"},
    {"spec.evaluation.generations": 0, "spec.evaluation.gate.minRougeL": 0.1},
    {"spec.resources.gpuProduct": "a b"},
    {"spec.resources.nodeSelector": {"zone": "-a"}},
    {"spec.resources.tolerations": [{"key": "a b", "operator": "Exists"}]},
    {"spec.resources.tolerations": [{"key": "a", "value": "a b"}]},
    *PODS_REFUSED,
    *({"spec.tracking.mlflow": {"uri": url, "experiment": "a"}} for url in BAD_URLS),
    {"spec.lora.rank": 0},
    {"spec.lora.rnak": 8},
    {"spec.lora.rank": "8"},
    {"spec.ttl": "1 day"},
)
ACCEPTED: Final[tuple[Change, ...]] = (
    {},
    {"spec.resources.gpuResource": "nvidia.com/mig-1g.10gb.me", "spec.resources.gpusPerNode": 1},
    {"spec.resources.gpuResource": "nvidia.com/mig-1c.3g.40gb", "spec.resources.gpusPerNode": 0},
    {"spec.method": "lora", "spec.quantization.bits": 16, "spec.lora.init": "pissa"},
    {SOURCES: [{"uri": "s3://bucket/a", "weight": 2}, {"uri": "pvc://claim/a"}], "spec.dataset.uri": None},
    {"spec.distribution": "zero2", "spec.resources.nodes": 2},
    {"spec.lora.init": "loftq", "spec.output.merged": "bf16", "spec.output.mergeBase": "dequantised"},
    {"spec.tracking.mlflow": {"uri": "http://mlflow.ml.svc:5000", "experiment": "a"}},
    {f"{NODE}.nodeSelector": {"a" * 63: "", f"{'a' * 60}.example.com/{'B' * 63}": "x_y.z"}},
    {f"{NODE}.nodeSelector": {f"{'a.' * 126}a/zone": "x"}},
    {f"{NODE}.tolerations": [{"operator": "Exists"}, {"key": "gpu", "value": "true", "effect": "NoSchedule"}]},
    {f"{NODE}.tolerations": [{"key": "gpu"}, {"key": "gpu", "operator": "Exists", "value": ""}]},
    {f"{NODE}.tolerations": [{"key": "x", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0}]},
    *({f"{NODE}.memory": memory} for memory in ("17179869184", "256Mi", "1.5Gi", "0.5Ti", "1024Ti", "300M", "1.1Gi")),
    *({f"{NODE}.cpu": cpu} for cpu in ("1m", "0.5", "500m", "64", "10", "0.01")),
    {"spec.output.secretRef.name": "team-a.s3", "spec.output.serviceAccountName": "7.a-b"},
    {"spec.queue": {"name": "team-a.gpus", "priorityClass": "7"}, "spec.model.uri": "pvc://models.team-a/llama"},
)


@pytest.fixture(scope="module")
def cluster(control_plane: Cluster) -> KubeClient:
    install(control_plane)
    return connect(str(control_plane.kubeconfig), None)[0]


def manifest(change: Change) -> dict[str, Any]:
    """A manifest with fields changed, or removed where they are None."""
    made = make_manifest(namespace="default")
    for path, value in change.items():
        if value is None:
            del made["spec"]["dataset"]["uri"]
        else:
            made = override_manifest(made, [Override(tuple(path.split(".")), value)])
    return made


def validated(made: dict[str, Any]) -> str:
    """What is wrong, as `qlora validate` says."""
    [document] = parse_documents(json.dumps(made), "manifest")
    try:
        parse_manifest(document, CLUSTER_RULES)
    except ManifestError as error:
        return str(error)
    return ""


def refused(cluster: KubeClient, made: dict[str, Any]) -> str:
    """What is wrong, as the API server says."""
    try:
        cluster.create(made, dry_run=True)
    except ClusterError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("change", REFUSED, ids=",".join)
def test_rejected_manifests_are_invalid(cluster: KubeClient, change: Change) -> None:
    made = manifest(change)
    assert (bool(refused(cluster, made)), bool(validated(made))) == (True, True)


@pytest.mark.parametrize("change", ACCEPTED, ids=",".join)
def test_accepted_manifests_are_valid(cluster: KubeClient, change: Change) -> None:
    made = manifest(change)
    assert (refused(cluster, made), validated(made)) == ("", "")


def test_every_crd_rule_is_covered(cluster: KubeClient) -> None:
    said = "\n".join(refused(cluster, manifest(change)) for change in REFUSED)
    assert [message for message in rules(crd.root_schema()) if message not in said] == []


def rules(schema: dict[str, Any]) -> Iterator[str]:
    """Yield what a schema says where one of its rules does not hold, but for those on changes."""
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"]:
            yield rule["message"]
    children = (*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties"))
    for child in children:
        if isinstance(child, dict):
            yield from rules(child)
