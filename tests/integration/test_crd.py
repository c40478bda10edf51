"""The CRD on a real API server: what it accepts, refuses, fills in, prints and explains."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import CommandError

ROOT = Path(__file__).parents[2]
MINIMAL: dict[str, Any] = {
    "apiVersion": "qlora.dev/v1alpha1",
    "kind": "QLoRAJob",
    "metadata": {"name": "support-bot", "namespace": "crd"},
    "spec": {
        "model": {"uri": "hf://meta-llama/Llama-3.2-3B"},
        "dataset": {"uri": "s3://data/support/train.jsonl"},
        "output": {"uri": "s3://adapters/team-a", "secretRef": {"name": "s3-credentials"}},
    },
}


@pytest.fixture(scope="module")
def namespace(control_plane: Cluster) -> Cluster:
    control_plane.kubectl("apply", "-f", str(ROOT / "crds/qlorajobs.qlora.dev.yaml"))
    control_plane.wait_until_served()
    control_plane.kubectl("create", "namespace", "crd")
    return control_plane


@pytest.fixture
def created(namespace: Cluster) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Apply a manifest, and return what the API server made of it."""

    def create(manifest: dict[str, Any]) -> dict[str, Any]:
        return json.loads(namespace.kubectl("apply", "-o", "json", "-f", "-", stdin=yaml.safe_dump(manifest)))

    return create


def refusal_of(cluster: Cluster, manifest: str) -> str:
    """What kubectl says when the API server refuses a manifest."""
    with pytest.raises(CommandError) as refusal:
        cluster.kubectl("apply", "-f", "-", stdin=manifest)
    return str(refusal.value)


def with_field(path: str, value: object) -> dict[str, Any]:
    manifest = copy.deepcopy(MINIMAL)
    *parents, last = path.split(".")
    node = manifest
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return manifest


def test_minimal_job_gets_defaults_and_is_in_progress(created):
    job = created(MINIMAL)
    assert job["spec"]["lora"] == {
        "rank": 16, "alpha": 32, "dropout": 0.05, "targets": ["q_proj", "v_proj"], "dora": False, "rslora": False,
        "init": "default", "rankPattern": {}, "alphaPattern": {}, "modulesToSave": [],
    }  # fmt: skip
    assert job["spec"]["deadlines"] == {"heartbeat": "10m", "startup": "30m", "total": "24h"}
    assert job["status"] == {"observedGeneration": -1}


REFUSED = [
    ("spec.lora.rank", 0, "spec.lora.rank: Invalid value: 0: spec.lora.rank in body should be greater than or equal"),
    ("spec.lora.rnak", 8, 'unknown field "spec.lora.rnak"'),
    ("spec.quantization.bits", 5, 'spec.quantization.bits: Unsupported value: 5: supported values: "4", "8", "16"'),
    ("spec.quantization.bits", 16, "method qlora needs quantization.bits 4 or 8"),
    ("spec.method", "lora", "methods lora and full need quantization.bits 16"),
    ("spec.training.microBatchSize", 3, "microBatchSize must divide globalBatchSize"),
    ("spec.training.keep", "best", "set evaluateEvery to a number of steps"),
    ("spec.training.learningRate", 0, "spec.training.learningRate"),
    ("spec.model.uri", "meta-llama/Llama-3.2-3B", "spec.model.uri"),
    ("spec.model.uri", "hf://Llama-3.2-3B", "write hf://organization/name"),
    ("spec.model.uri", "file:///models/x", "file:// works with 'qlora run' only"),
    ("spec.dataset.uri", "s3://d/x.jsonl", "a bucket has 3 to 63 lower-case letters"),
    ("spec.dataset.uri", "file:///data/x.jsonl", "file:// works with 'qlora run' only"),
    ("spec.lora.targets", ["all-linear", "q_proj"], "list it alone"),
    ("spec.lora.targets", [], "spec.lora.targets"),
    ("spec.lora.init", "pissa", "subtracts singular vectors from the base weights"),
    ("spec.lora.rankPattern", {"v_proj": 0}, "spec.lora.rankPattern"),
    ("spec.deadlines.total", "1 day", "spec.deadlines.total"),
    ("metadata.name", "a" * 53, "metadata.name may have 52 characters"),
    ("metadata.name", "support.bot", "metadata.name must not contain a dot"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=[f"{p}={v!r:.20}" for p, v, _ in REFUSED])
def test_invalid_spec_is_rejected_with_field_and_fix(namespace, path, value, message):
    manifest = yaml.safe_dump(with_field(path, value))
    refusal = refusal_of(namespace, manifest)
    assert message in refusal


ONE_MISTAKE = [
    ("spec.model.uri", "meta-llama/Llama-3.1-8B", "write hf://organization/name, s3://bucket/prefix or pvc://"),
    ("spec.model.uri", "hf://Llama-3.2-3B", "the revision goes into spec.model.revision"),
    ("spec.model.uri", "s3://B/x", "a bucket has 3 to 63 lower-case letters"),
    ("spec.dataset.uri", "my.jsonl", "write s3://bucket/file, hf://datasets/organization/name/file or pvc://"),
    ("spec.dataset.uri", "hf://datasets/name", "write hf://datasets/organization/name/file.jsonl"),
    ("spec.output.uri", "out", "write s3://bucket/prefix"),
    ("spec.output.uri", "hf://org/name", "results are published to a bucket"),
    ("spec.resources.memory", "512m", "m means thousandths of a byte"),
    ("spec.resources.memory", "16GB", "spec.resources.memory in body should match"),
    ("spec.resources.memory", "16", "a training pod takes from"),
    ("spec.resources.cpu", "two", "spec.resources.cpu in body should match"),
    ("spec.resources.cpu", "0", "write a number of cores above 0"),
    ("spec.training.microBatchSize", 0, "should be greater than or equal to 1"),
    ("spec.quantization.bits", 5, "Unsupported value: 5"),
    ("spec.method", "lora", "methods lora and full need quantization.bits 16"),
]


@pytest.mark.parametrize(("path", "value", "message"), ONE_MISTAKE, ids=[f"{p}={v!r:.20}" for p, v, _ in ONE_MISTAKE])
def test_one_mistake_gives_one_message(namespace, path, value, message):
    manifest = with_field(path, value)
    manifest["metadata"]["name"] = "one-mistake"  # no job of this name exists, so that no field is immutable
    refusal = refusal_of(namespace, yaml.safe_dump(manifest))
    refusal = refusal.replace("<nil>: Invalid value: null: some validation rules were not checked", "")
    assert message in refusal
    assert sum(refusal.count(kind) for kind in ("Invalid value", "Unsupported value", "Required value")) == 1, refusal


CHANGES = [
    ("lora", {"rank": 8}),
    ("model", {"uri": "hf://meta-llama/Llama-3.2-3B", "secretRef": {"name": "added-later"}}),
    ("training", {"maxSteps": 5}),
    ("resources", {"gpusPerNode": 0}),
]


@pytest.mark.parametrize(("block", "value"), CHANGES, ids=[block for block, _ in CHANGES])
def test_immutable_field_change_is_rejected(created, namespace, block, value):
    created(MINIMAL)
    manifest = yaml.safe_dump(with_field(f"spec.{block}", value))
    refusal = refusal_of(namespace, manifest)
    assert f"spec.{block} cannot change; create a QLoRAJob with another name" in refusal


def test_deadline_change_is_accepted(created):
    created(MINIMAL)
    assert created(with_field("spec.deadlines", {"total": "48h"}))["spec"]["deadlines"]["total"] == "48h"


def test_short_names_and_columns(created, namespace):
    created(MINIMAL)
    narrow = namespace.kubectl("get", "qlj", "-n", "crd").splitlines()[0].split()
    assert narrow == ["NAME", "PHASE", "PROGRESS", "ETA", "LOSS", "GPUS", "REASON", "AGE"]
    wide = namespace.kubectl("get", "qlora", "-n", "crd", "-o", "wide").splitlines()[0].split()
    assert wide[8:] == ["MODEL", "STEP", "TOK/S", "ATTEMPT", "GPU-HOURS", "ADAPTER", "MESSAGE"]


def test_kubectl_explain_describes_lora_fields(namespace):
    text = namespace.kubectl("explain", "qlorajob.spec.lora")
    for field in ("alpha", "dora", "dropout", "init", "modulesToSave", "rank", "rankPattern", "rslora", "targets"):
        assert f"  {field}\t" in text
    assert "updates are multiplied by alpha / rank" in text
