"""Every YAML and JSON block of a page, and every manifest in examples/, is valid without changes."""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import jsonschema
import pytest
import yaml
from kubernetes import client

from qlora_api import names
from qlora_cli.manifests.classes import ClassManifest, parse_class
from qlora_cli.manifests.loader import JobManifest, ManifestError, parse_manifest
from qlora_cli.manifests.yaml_documents import Document, parse_documents, read_documents
from qlora_planner.validation import CLUSTER_RULES
from tests.contract.docs.blocks import PAGES, ROOT, Block, blocks
from tests.make import make_manifest, merge

VALUES_SCHEMA: Final = json.loads((ROOT / "charts/qlora-operator/values.schema.json").read_text(encoding="utf-8"))
CHART: Final = yaml.safe_load((ROOT / "charts/qlora-operator/Chart.yaml").read_text(encoding="utf-8"))
JOB_SCHEMA: Final = json.loads((ROOT / "crds/qlorajob.schema.json").read_text(encoding="utf-8"))
CLASS_SCHEMA: Final = json.loads((ROOT / "crds/qloraclass.schema.json").read_text(encoding="utf-8"))
SPEC_FIELDS: Final = frozenset(JOB_SCHEMA["properties"]["spec"]["properties"])
BUILT_IN: Final = frozenset({"v1", "apps/v1", "batch/v1"})
OTHERS: Final = {"Application": "argoproj.io/v1alpha1", "Kustomization": "kustomize.toolkit.fluxcd.io/v1"}
"""Kinds of Argo CD and Flux; what of them is ours is the path that they apply."""
KUEUE: Final = frozenset(("kueue.x-k8s.io/v1beta2", kind) for kind in ("ClusterQueue", "LocalQueue", "ResourceFlavor"))
"""Applied with the same fields in tests/integration/test_kueue.py."""
RENDERED: Final = "kustomize.config.k8s.io/v1beta1"
"""Rendered by kubectl and applied in tests/integration/test_gitops.py."""
MISTAKEN: Final = "examples/broken.yaml"
"""Shows what `qlora validate` says; tests/contract/docs/test_cli_page.py has its sentences."""
MANIFESTS: Final = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "examples").rglob("*.yaml"))]


def check_job(document: Document) -> None:
    """As the API server does, in both forms in which its schema is published, with the rules that are CEL there."""
    assert isinstance(parse_manifest(document, CLUSTER_RULES), JobManifest)
    jsonschema.validate(document.value, JOB_SCHEMA)


def check_class(document: Document) -> None:
    """As `kubectl apply` and the operator do."""
    assert isinstance(parse_class(document), ClassManifest)
    jsonschema.validate(document.value, CLASS_SCHEMA)


def check_fragment(spec: Mapping[str, Any]) -> None:
    """Part of a spec: the smallest QLoRAJob accepts it."""
    manifest = make_manifest()
    if "sources" in spec.get("dataset", {}):
        del manifest["spec"]["dataset"]["uri"]
    check_job(Document("fragment", {**manifest, "spec": merge(manifest["spec"], spec)}, {}))


def check_values(values: Mapping[str, Any]) -> None:
    """As `helm install` does."""
    jsonschema.validate(values, VALUES_SCHEMA)


def check_built_in(value: Any, kind: str) -> None:
    """Every field is one that Kubernetes's client knows, so that a typing mistake is none that the server drops."""
    if listed := re.fullmatch(r"[Ll]ist\[(.+)\]", kind):
        for item in value:
            check_built_in(item, listed[1])
    elif model := getattr(client, kind, None):
        fields = {outside: model.openapi_types[inside] for inside, outside in model.attribute_map.items()}
        assert set(value) <= set(fields), f"{kind} has no {set(value) - set(fields)}"
        for name, part in value.items():
            check_built_in(part, fields[name])


def check_document(document: Document) -> str:
    """Check a document as what it is, and return that; a document of no known class fails."""
    value = document.value
    group, kind = value.get("apiVersion"), value.get("kind")
    if group == names.API_VERSION:
        (check_class if kind == names.CLASS_KIND else check_job)(document)
        return str(kind)
    if group in BUILT_IN or (group, kind) in KUEUE:
        if group in BUILT_IN:
            check_built_in(value, f"V1{kind}")
        return str(kind)
    if group == RENDERED or (kind in OTHERS and OTHERS[kind] == group):
        path = value["spec"].get("path") or value["spec"]["source"]["path"] if "spec" in value else "."
        assert (ROOT / path).is_dir()
        return str(kind)
    assert (group, kind) == (None, None), f"{document.file}: no test knows {group} {kind}"
    if "containers" in value.get("spec", {}):
        check_built_in(value, "V1Pod")
        return "part of a pod"
    if set(value) == {"spec"} or set(value) <= SPEC_FIELDS:
        check_fragment(value.get("spec", value))
        return "part of a spec"
    return check_chart_part(value)


def check_chart_part(value: Mapping[str, Any]) -> str:
    """Check values of the chart, or what a parent chart has for it."""
    if set(value) == {"dependencies"}:
        [dependency] = value["dependencies"]
        assert [dependency[key] for key in ("name", "version")] == [CHART[key] for key in ("name", "version")]
        return "part of a parent's Chart.yaml"
    if CHART["name"] in value:
        assert set(value) == {"global", CHART["name"]}
        check_values({"global": value["global"], **value[CHART["name"]]})
        return "values of a parent"
    check_values(value)
    return "values"


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.position)
def test_yaml_of_pages(block: Block) -> None:
    assert [check_document(document) for document in parse_documents(block.text, block.position)]


@pytest.mark.parametrize("file", [file for file in MANIFESTS if file != MISTAKEN])
def test_manifests_of_examples(file: str) -> None:
    assert [check_document(document) for document in read_documents(str(ROOT / file))]


def test_broken_example_is_rejected() -> None:
    [document] = read_documents(str(ROOT / MISTAKEN))
    with pytest.raises(ManifestError):
        check_document(document)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("spec: {lora: {rnk: 8}}", id="unknown field"),
        pytest.param("spec: {lora: {rank: 0}}", id="out of bounds"),
        pytest.param("lora: {dora: true, init: pissa, targets: [all-linear, q_proj]}", id="a rule of the CRD"),
        pytest.param("spec: {containers: [{name: a, imagePull: Always}]}", id="no field of a container"),
        pytest.param("trainerImage: {repo: a}", id="no value of the chart"),
        pytest.param("apiVersion: example.com/v1\nkind: Thing", id="unknown kind"),
    ],
)
def test_a_mistake_is_found(text: str) -> None:
    [document] = parse_documents(text, "page")
    with pytest.raises((ManifestError, AssertionError, jsonschema.ValidationError)):
        check_document(document)


@pytest.mark.parametrize("block", blocks("json"), ids=lambda block: block.position)
def test_json_of_pages(block: Block) -> None:
    """One object, or one a line."""
    try:
        found = [json.loads(block.text)]
    except json.JSONDecodeError:
        found = [json.loads(line) for line in block.text.splitlines()]
    assert [type(value) for value in found] == [dict] * len(found)


def test_every_language_is_named() -> None:
    """A block without a language would escape every test of its kind."""
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert all(fences[::2]), page
        assert not any(fences[1::2]), page
