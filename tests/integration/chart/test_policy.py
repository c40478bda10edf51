"""Odd spellings of URIs against the chart's policy, on a real API server: what looks allowed and is not is rejected."""

import json
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, Final

import pytest

from qlora_api import names
from qlora_api.crd import build_crd, spec_schema
from qlora_api.v1alpha1.patterns import VALIDATIONS
from tests.cluster.admin import MERGE
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import run, wait_until
from tests.contract.test_chart import uri_fields
from tests.integration.chart.rendering import NAMESPACE, RELEASE, helm
from tests.make import make_manifest

COMMIT: Final = "0123456789abcdef0123456789abcdef01234567"
POLICY: Final = {
    "models": [
        "hf://meta-llama/",
        f"hf://Qwen/Qwen3-8B@{COMMIT}",
        "s3://models/llama-3.2-3b",
        "pvc://models/approved/",
    ],
    "datasets": [
        "hf://datasets/our-org/",
        "hf://datasets/their-org/data@v1/",
        "hf://datasets/one-org/data",
        "hf://datasets/two-org/data/",
        "hf://datasets/two-org/rows/train.jsonl",
        "s3://data/{namespace}/",
        "s3://data/shared.jsonl",
        "pvc://data/approved/",
    ],
    "outputs": ["s3://adapters/{namespace}/"],
    "trackers": [
        "https://mlflow.example",
        "https://mlflow.example:8443/{namespace}/",
        "http://10.0.0.5:5000",
        "https://wandb.example",
    ],
}
CRD: Final = build_crd()


def model(uri: str, revision: str = "main") -> dict[str, Any]:
    return {"model": {"uri": uri, "revision": revision}}


def dataset(uri: str) -> dict[str, Any]:
    return {"dataset": {"uri": uri}}


def second_source(uri: str) -> dict[str, Any]:
    return {"dataset": {"sources": [{"uri": "s3://data/shared.jsonl"}, {"uri": uri}]}}


def held_out(uri: str) -> dict[str, Any]:
    return {"dataset": {"uri": "s3://data/shared.jsonl", "evaluation": {"uri": uri}}}


def output(uri: str) -> dict[str, Any]:
    return {"output": {"uri": uri}}


def mlflow(uri: str) -> dict[str, Any]:
    return {"tracking": {"mlflow": {"uri": uri, "experiment": "bots"}}}


def wandb(**block: str) -> dict[str, Any]:
    return {"tracking": {"wandb": {"project": "bots", **block}}}


ALLOWED: Final = (
    model("hf://meta-llama/Llama-3.2-3B"),
    model("hf://meta-llama/Llama-3.2-3B", "v1.0"),
    model("hf://meta-llama/Llama-3.2-3B", COMMIT),
    model("hf://Qwen/Qwen3-8B", COMMIT),
    model("s3://models/llama-3.2-3b"),
    model("s3://models/llama-3.2-3b/4bit..v2"),
    model("pvc://models/approved/llama"),
    dataset("hf://datasets/our-org/data/train.jsonl"),
    dataset("hf://datasets/their-org/data@v1/train.jsonl"),
    dataset("hf://datasets/our-org/data@v1/train.jsonl"),
    dataset("hf://datasets/one-org/data/train.jsonl"),
    dataset("hf://datasets/one-org/data@v1.0/train.jsonl"),
    dataset(f"hf://datasets/one-org/data@{COMMIT}/"),
    dataset(f"hf://datasets/two-org/data@{COMMIT}/in/a/folder/train.jsonl"),
    dataset("hf://datasets/two-org/rows@v1/train.jsonl"),
    second_source(f"hf://datasets/one-org/data@{COMMIT}/train.jsonl"),
    held_out("hf://datasets/two-org/data@main/held-out.jsonl"),
    dataset("s3://data/team-a/100%25/train.jsonl"),
    dataset("pvc://data/approved/"),
    second_source("s3://data/team-a/"),
    held_out("s3://data/team-a/held-out.jsonl"),
    output("s3://adapters/team-a/bots"),
    mlflow("https://mlflow.example"),
    mlflow("https://mlflow.example/any/path"),
    mlflow("https://mlflow.example:8443/team-a/"),
    mlflow("http://10.0.0.5:5000/"),
    wandb(baseUrl="https://wandb.example"),
    {},
)

MODELS: Final = (
    "hf://elsewhere/model",
    "hf://meta-llama-evil/x",
    "hf://meta-llama.evil/x",
    "hf://Meta-Llama/x",
    "HF://meta-llama/x",
    "hf://meta-llama/../evil/x",
    "hf://meta-llama/..",
    "hf://meta-llama/.",
    "hf://meta-llama/%2e%2e/evil",
    "hf://meta-llama/%2E./evil",
    "hf://meta-llama/..%2Fevil",
    "hf://meta-llama/..\\evil",
    "hf://meta-llama/..?x",
    "hf://meta-llama/..#x",
    "hf://meta-llama\\x",
    "hf://meta-llama%2fx",
    "hf:// meta-llama/x",
    " hf://meta-llama/x",
    "hf:/meta-llama/x",
    "hf:///meta-llama/x",
    "hf://evil/hf://meta-llama/x",
    "hf://evil@meta-llama/x",
    "hf://meta-llama@evil/x",
    "hf://meta-llama\u200b/x",
    "hf://m\u0435ta-llama/x",
    "hf://meta\u2010llama/x",
    "hf://Qwen/Qwen3-8B",
    f"hf://Qwen/Qwen3-8B-evil@{COMMIT}",
    "s3://models/llama-3.2-3b-evil",
    "s3://models/llama-3.2-3b.evil",
    "s3://models/llama-3.2-3b?x",
    "s3://models/llama-3.2-3b#x",
    "s3://models/llama-3.2-3b%2fx",
    "s3://models/llama-3.2-3b/../secret",
    "s3://models/llama-3.2-3b/./x",
    "s3://models/llama-3x2-3b",
    "s3://models/LLAMA-3.2-3b",
    "s3://models//llama-3.2-3b",
    "s3://models-evil/llama-3.2-3b",
    "s3://models.evil/llama-3.2-3b",
    "s3://Models/llama-3.2-3b",
    "s3://models./llama-3.2-3b",
    "s3://models:443/llama-3.2-3b",
    "s3://user@models/llama-3.2-3b",
    "s3://models@evil/llama-3.2-3b",
    "s3:///models/llama-3.2-3b",
    "s3://evil/models/llama-3.2-3b",
    "https://models/llama-3.2-3b",
    "file:///models/llama-3.2-3b",
    "pvc://models/approved-evil/x",
    "pvc://models/approved/../secret",
    "pvc://models/approved/%2e%2e/secret",
    "pvc://models/Approved/x",
    "pvc://models-evil/approved/x",
    "pvc://models//approved/x",
)
REVISIONS: Final = ("refs/pr/1", "Refs/pr/1", "refs/pr/1/merge", "refs/convert/parquet", "pr/1", "PR/1")
"""Of a repository on the hub, these are not only its owner's."""
DATASETS: Final = (
    "s3://data/team-b/x.jsonl",
    "s3://data/team-a-evil/x.jsonl",
    "s3://data/team-a",
    "s3://data/",
    "s3://data/{namespace}/x.jsonl",
    "s3://data/TEAM-A/x.jsonl",
    "s3://data/team-a/../team-b/x.jsonl",
    "s3://data/team-a/%2e%2e/team-b/x.jsonl",
    "s3://data/team%2da/x.jsonl",
    "s3://data/shared.jsonl.evil",
    "s3://data/sharedxjsonl",
    "s3://data-evil/team-a/x.jsonl",
    "hf://datasets/our-org-evil/x/f.jsonl",
    "hf://datasets/Our-Org/x/f.jsonl",
    "hf://datasets/our-org/../evil/f.jsonl",
    "hf://our-org/x/f.jsonl",
    "hf://datasets/their-org/data/f.jsonl",
    "hf://datasets/their-org/data@main/f.jsonl",
    "hf://datasets/their-org/data@v10/f.jsonl",
    "hf://datasets/their-org/data@v1-evil/f.jsonl",
    "hf://datasets/their-org/data-evil@v1/f.jsonl",
    "hf://datasets/one-org/data-evil/f.jsonl",
    "hf://datasets/one-org/data-evil@v1/f.jsonl",
    "hf://datasets/one-org/data.evil@v1/f.jsonl",
    "hf://datasets/one-org/Data@v1/f.jsonl",
    "hf://datasets/one-org@v1/data/f.jsonl",
    "hf://datasets/one-org-evil/data@v1/f.jsonl",
    "hf://datasets/evil/data@v1/one-org/data/f.jsonl",
    "hf://datasets/evil/x@hf://datasets/one-org/data/f.jsonl",
    "hf://datasets@v1/one-org/data/f.jsonl",
    "hf://one-org/data@v1/f.jsonl",
    "hf://datasets/one-org/data@v1",
    "hf://datasets/one-org/data@/f.jsonl",
    "hf://datasets/one-org/data@v1@evil/f.jsonl",
    "hf://datasets/one-org/data@v1/../../evil/data/f.jsonl",
    "hf://datasets/one-org/data@../evil/f.jsonl",
    "hf://datasets/one-org/data@v1%2f..%2f..%2fevil/f.jsonl",
    "hf://datasets/one-org/data@refs/pr/1/f.jsonl",
    "hf://datasets/one-org/data@REFS/pr/1/f.jsonl",
    "hf://datasets/one-org/data@pr/1/f.jsonl",
    "hf://datasets/one-org%2fdata@v1/f.jsonl",
    "hf://datasets/two-org/data-evil@v1/f.jsonl",
    "hf://datasets/two-org/rows@v1/other.jsonl",
    "hf://datasets/two-org/rows@v1/train.jsonl.evil",
    "hf://datasets/two-org/rows@v1/in/train.jsonl",
    "s3://data/shared.jsonl@v1/x.jsonl",
    "s3://data@v1/team-a/x.jsonl",
    "pvc://data/approved@v1/x.jsonl",
    "pvc://data/approved/../secret",
    "pvc://other/approved/x.jsonl",
)
OUTPUTS: Final = (
    "s3://adapters",
    "s3://adapters/",
    "s3://adapters/team-a",
    "s3://adapters/team-b/x",
    "s3://adapters/team-a-evil/x",
    "s3://adapters/team-a/../team-b",
    "s3://adapters/team-a/..",
    "s3://adapters/team-a/%2E%2E/team-b",
    "s3://adapters//team-a/x",
    "s3://adapters/{namespace}/x",
    "s3://adapters/Team-A/x",
    "s3://adapters-evil/team-a/x",
    "s3://adapters@evil/team-a/x",
    "s3://192.168.0.1/adapters/team-a/x",
    "file:///adapters/team-a/x",
)
SERVERS: Final = (
    "https://evil.example",
    "https://mlflow.example.evil",
    "https://mlflow.example-evil",
    "https://mlflowxexample",
    "https://mlflow.example%2eevil",
    "https://evil.example/mlflow.example",
    "https://evil.example/https://mlflow.example",
    "https://mlflow.example@evil.example",
    "https://mlflow.example:443@evil.example",
    "https://user:password@mlflow.example",
    "https://mlflow.example\\@evil.example",
    "https://mlflow.example#@evil.example",
    "https://mlflow.example?@evil.example",
    "https://mlflow.example:443",
    "https://mlflow.example:9000/",
    "https://mlflow.example:/",
    "https://mlflow.example./",
    "https://MLFLOW.example/",
    "https://mlflow.example /",
    "HTTPS://mlflow.example",
    "http://mlflow.example",
    "https:/mlflow.example",
    "https:///mlflow.example",
    "//mlflow.example",
    "https://mlflow.example:8443/",
    "https://mlflow.example:8443/team-b/",
    "https://mlflow.example:8443/team-a-evil/",
    "https://mlflow.example:8443/team-a/../team-b/",
    "https://mlflow.example:8443/team-a/%2e%2e/team-b/",
    "https://mlflow.example:8443/team-a/.%2E/team-b/",
    "https://mlflow.example:8443/team-a/..%2fteam-b/",
    "https://mlflow.example:8443/team-a/..\\team-b/",
    "https://mlflow.example:8443/team-a/x%5c..%5cteam-b/",
    "http://10.0.0.5",
    "http://10.0.0.5:50000",
    "http://10.0.0.50:5000",
    "http://10.0.0.05:5000",
    "http://10.5:5000",
    "http://167772165:5000",
    "http://0x0a000005:5000",
    "http://012.0.0.5:5000",
    "http://[::ffff:10.0.0.5]:5000",
    "http://10.0.0.5.evil.example:5000",
)
REFUSED: Final = (
    *(("spec.model.uri", model(uri)) for uri in MODELS),
    *(("spec.model.revision", model("hf://meta-llama/x", revision)) for revision in REVISIONS),
    ("spec.model.uri", model("hf://Qwen/Qwen3-8B", COMMIT[:12])),
    ("spec.model.uri", model("s3://models/other", COMMIT)),
    *(("spec.dataset.uri", dataset(uri)) for uri in DATASETS),
    *(("spec.dataset.sources[].uri", second_source(uri)) for uri in DATASETS),
    *(("spec.dataset.evaluation.uri", held_out(uri)) for uri in DATASETS),
    *(("spec.output.uri", output(uri)) for uri in OUTPUTS),
    *(("spec.tracking.mlflow.uri", mlflow(uri)) for uri in SERVERS),
    *(("spec.tracking.wandb.baseUrl", wandb(baseUrl=uri)) for uri in SERVERS),
    ("spec.tracking.wandb.baseUrl", wandb()),
    ("spec.tracking.wandb.baseUrl", wandb(entity="https://wandb.example")),
)
"""Field that is refused, and the manifest's difference from one that is allowed."""


def run_of(blocks: dict[str, Any], name: str = "odd", namespace: str = "team-a") -> dict[str, Any]:
    """Return a QLoRAJob with whole blocks of its spec replaced, which is allowed if none is."""
    manifest = make_manifest(
        name, namespace, model={"uri": "hf://meta-llama/x"}, output={"uri": "s3://adapters/team-a/x"}
    )
    return {**manifest, "spec": {**manifest["spec"], "dataset": {"uri": "s3://data/shared.jsonl"}, **blocks}}


def spoken(case: str | dict[str, Any]) -> str:
    """Return the name of a case: the field, or what is changed."""
    return case if isinstance(case, str) else json.dumps(case)


PATH: Final = f"/apis/{names.API_VERSION}/namespaces/team-a/{names.PLURAL}"
DRY_RUN: Final = {"dryRun": "All"}


def refusal_of(cluster: Cluster, manifest: dict[str, Any]) -> str:
    """Return why the API server rejects a new object; empty if it does not, and nothing is stored."""
    code, answer = cluster.admin.request("POST", PATH, manifest, query=DRY_RUN)
    return "" if code == 201 else str(answer["message"])


TEAM_A: Final = {"matchLabels": {"kubernetes.io/metadata.name": "team-a"}}
RULES: Final = {"policy": {**POLICY, "namespaceSelector": TEAM_A}}


def install(cluster: Cluster, values: dict[str, Any]) -> None:
    """Install the chart, or upgrade it."""
    command = [*helm("upgrade"), "--install", f"--kubeconfig={cluster.kubeconfig}", "--values=-"]
    run(command, stdin=json.dumps(values))


@pytest.fixture(scope="module")
def release(plane: Cluster) -> Iterator[Cluster]:
    """The chart with a rule for every field, in force."""
    install(plane, RULES)
    plane.wait_until_served()
    wait_until("the policy", lambda: refusal_of(plane, run_of(model("hf://elsewhere/x"))), 30, 0.3)
    yield plane
    plane.helm("uninstall", RELEASE, f"--namespace={NAMESPACE}")
    # The chart keeps it, and its schema is no longer only the chart's: the next release could not apply its own.
    plane.kubectl("delete", "crd", CRD["metadata"]["name"], "--wait")


def test_cases_cover_every_field_that_names_a_uri() -> None:
    assert {field for field, _ in REFUSED} == {*uri_fields(spec_schema()), "spec.model.revision"}


@pytest.mark.parametrize("blocks", ALLOWED, ids=spoken)
def test_allowed_spelling_is_accepted(release: Cluster, blocks: dict[str, Any]) -> None:
    assert refusal_of(release, run_of(blocks)) == ""


@pytest.mark.parametrize(("field", "blocks"), REFUSED, ids=spoken)
def test_odd_spelling_is_rejected_with_its_field(release: Cluster, field: str, blocks: dict[str, Any]) -> None:
    assert field.partition("[")[0] in refusal_of(release, run_of(blocks))


def test_long_list_keeps_its_message_and_its_cost(release: Cluster) -> None:
    teams = [f"s3://data/a/long/prefix/of/team-{number}/{{namespace}}/" for number in range(200)]
    values = {"policy": {"datasets": [*teams, "s3://data/"], "namespaceSelector": TEAM_A}}
    install(release, values)
    wait_until("the policy", lambda: not refusal_of(release, run_of(model("hf://elsewhere/x"))), 30, 0.3)
    longest = [{"uri": f"s3://data/{'a/' * 500}{number}"} for number in range(16)]
    assert refusal_of(release, run_of({"dataset": {"sources": longest}})) == ""
    refusal = refusal_of(release, run_of(dataset("s3://elsewhere/x.jsonl")))
    assert "spec.dataset.uri: s3://elsewhere/x.jsonl is not allowed: use a dataset from s3://data/a/long" in refusal
    assert "team-9/team-a/ and others, or ask an administrator to add it to policy.datasets" in refusal
    install(release, RULES)
    wait_until("the policy", lambda: refusal_of(release, run_of(model("hf://elsewhere/x"))), 30, 0.3)


def test_run_older_than_the_policy_can_be_suspended_and_deleted(release: Cluster) -> None:
    binding = ("validatingadmissionpolicybinding", f"{RELEASE}-runs")
    older, saved = run_of(model("hf://elsewhere/x"), "older"), release.get(*binding)
    release.kubectl("delete", *binding)
    wait_until("the policy to end", lambda: not refusal_of(release, older), 30, 0.3)
    release.admin.create(PATH, older)
    del saved["metadata"]["resourceVersion"]
    release.kubectl("create", "--filename=-", stdin=json.dumps(saved))
    wait_until("the policy", lambda: refusal_of(release, run_of(model("hf://elsewhere/x"))), 30, 0.3)
    code, _ = release.admin.request("PATCH", f"{PATH}/older", {"spec": {"suspend": True}}, MERGE)
    assert code == HTTPStatus.OK
    release.admin.delete(f"{PATH}/older")


def bare(schema: Any) -> Any:
    """Return a schema without patterns and rules."""
    if isinstance(schema, dict):
        return {key: bare(value) for key, value in schema.items() if key not in ("pattern", VALIDATIONS)}
    return [bare(item) for item in schema] if isinstance(schema, list) else schema


@pytest.fixture(scope="module")
def bare_release(release: Cluster) -> Iterator[Cluster]:
    """The same with a CRD that checks types only: nothing is rejected but by the policy, and every field may change."""
    odd = run_of(model("HF://meta-llama/x"))
    set_versions(release, bare(CRD["spec"]["versions"]))
    wait_until("the bare CRD", lambda: "ValidatingAdmissionPolicy" in refusal_of(release, odd), 30, 0.3)
    yield release
    set_versions(release, CRD["spec"]["versions"])
    wait_until("the CRD", lambda: "ValidatingAdmissionPolicy" not in refusal_of(release, odd), 30, 0.3)


def set_versions(cluster: Cluster, versions: list[dict[str, Any]]) -> None:
    """Replace the schema of the CRD, which stays the release's."""
    patch = json.dumps([{"op": "replace", "path": "/spec/versions", "value": versions}])
    cluster.kubectl("patch", "crd", CRD["metadata"]["name"], "--type=json", f"--patch={patch}")


@pytest.mark.parametrize(("field", "blocks"), REFUSED, ids=spoken)
def test_policy_alone_rejects_it(bare_release: Cluster, field: str, blocks: dict[str, Any]) -> None:
    refusal = refusal_of(bare_release, run_of(blocks))
    assert f"{field}: " in refusal
    assert "is not allowed: " in refusal


@pytest.mark.parametrize(
    ("field", "blocks"),
    [
        ("spec.model.uri", model("hf://elsewhere/x")),
        ("spec.dataset.uri", dataset("s3://elsewhere/x.jsonl")),
        ("spec.output.uri", output("s3://elsewhere/x")),
        ("spec.tracking.mlflow.uri", mlflow("https://elsewhere.example")),
    ],
)
def test_change_is_checked_like_creation(bare_release: Cluster, field: str, blocks: dict[str, Any]) -> None:
    admin = bare_release.admin
    admin.create(PATH, run_of({}, "changed"))
    try:
        code, answer = admin.request("PATCH", f"{PATH}/changed", {"spec": blocks}, MERGE, DRY_RUN)
        assert code == HTTPStatus.FORBIDDEN
        assert f"{field}: " in answer["message"]
    finally:
        admin.delete(f"{PATH}/changed")
