"""What Helm would send, byte for byte; `QLORA_WRITE_GOLDEN=1` writes the files anew."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from qlora_api.v1alpha1 import QLoRAJobSpec
from tests.cluster.host.commands import CommandError, run
from tests.cluster.programs.binaries import binary
from tests.integration.chart.rendering import CHART, RELEASE, names_of, notes_of, render

FOLDER: Final = Path(__file__).parent / "golden"
GENERATED: Final = {"CustomResourceDefinition"}
"""Compared with the code by `make check`."""
MONITORING: Final = tuple(
    f"monitoring.coreos.com/v1/{kind}" for kind in ("ServiceMonitor", "PodMonitor", "PrometheusRule")
)
"""What a cluster with the Prometheus operator serves."""

POLICY: Final = {
    "models": ["hf://meta-llama/", "s3://models/llama-3.2-3b"],
    "datasets": ["s3://data/"],
    "outputs": ["s3://adapters/{namespace}/"],
    "trackers": ["https://mlflow.example"],
    "images": ["qlora-trainer", "registry.example/ml/"],
    "maxGpusPerJob": 8,
    "maxGpusPerNamespace": {"team-a": 16},
    "namespaceSelector": {"matchLabels": {"policy": "yes"}},
}

VALUES: Final[dict[str, dict[str, Any]]] = {
    "defaults": {},
    "namespaced": {
        "watchNamespaces": ["team-a", "team-b"],
        "ttl": "7d",
        "retention": "90d",
        "serviceAccount": {"name": "qlora"},
        "rbac": {"aggregate": False},
        "crds": {"enabled": False},
    },
    "private": {
        "image": {"repository": "registry.example/operator", "digest": f"sha256:{'a' * 64}", "pullPolicy": "Always"},
        "trainerImage": {"repository": "registry.example/trainer", "tag": "1.0"},
        "imagePullSecrets": [{"name": "registry"}],
        "platform": {
            "s3": {"endpoint": "https://s3.example", "region": "eu", "addressing": "path"},
            "hub": {"mirror": "s3://models/hub"},
        },
        "serviceAccount": {"annotations": {"team": "ml"}},
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "system", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "podAnnotations": {"team": "ml"},
        "priorityClassName": "system-cluster-critical",
        "retention": "365d",
    },
    "fitted": {
        "nameOverride": "tuning",
        "commonLabels": {"cost-center": "42", "release": "theirs"},
        "image": {"registry": "mirror.example:5000"},
        "global": {"imageRegistry": "registry.example/"},
        "strategy": {"type": "Recreate"},
        "logFormat": "text",
        "podLabels": {"sidecar.istio.io/inject": "false", "app.kubernetes.io/name": "other"},
        "deploymentAnnotations": {"reloader.stakater.com/auto": "true"},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
        "podSecurityContext": {"runAsUser": None, "runAsGroup": None},
        "pods": {
            "labels": {"cost-center": "42"},
            "securityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None},
            "proxy": {"https": "http://proxy.example:3128"},
            "caBundle": {"configMap": "company-ca"},
            "train": {"runtimeClassName": "nvidia"},
        },
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy.example:3128"}],
        "extraVolumes": [{"name": "ca", "configMap": {"name": "company-ca"}}],
        "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/company-ca", "readOnly": True}],
        "extraObjects": [
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "{{ .Release.Name }}-ca", "namespace": "{{ .Release.Namespace }}"},
                "data": {"ca.crt": "-----BEGIN CERTIFICATE-----"},
            }
        ],
        "service": {"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv4"], "annotations": {"a": "b"}},
        "monitoring": {"podMonitor": {"enabled": True, "labels": {"release": "prometheus"}}},
    },
    "bare": {
        "replicas": 1,
        "crds": {"keep": False},
        "serviceAccount": {"create": False, "name": "ours"},
        "rbac": {"create": False},
        "podDisruptionBudget": {"enabled": False},
    },
    "closed": {
        "watchNamespaces": ["team-a"],
        "platform": {"s3": {"endpoint": "http://minio.storage:9000"}},
        "networkPolicy": {
            "operator": {"enabled": True},
            "trainer": {"enabled": True, "extraEgress": [{"ports": [{"port": 5000}]}]},
        },
        "policy": POLICY,
    },
    "monitored": {
        "crds": {"enabled": False},
        "monitoring": {
            "serviceMonitor": {"enabled": True, "interval": "15s", "labels": {"release": "prometheus"}},
            "podMonitor": {"enabled": True, "renderMode": "failIfMissing"},
            "prometheusRule": {
                "enabled": True,
                "runbookUrl": "https://runbooks.example",
                "disabled": ["QLoRAJobsWaiting"],
            },
            "dashboard": {"enabled": True, "annotations": {"grafana_folder": "ML"}, "namespace": "monitoring"},
        },
    },
}
"""The sets of values that are looked at whole."""


@pytest.mark.parametrize("name", VALUES)
def test_values_reach_manifests(name: str) -> None:
    manifests = [manifest for manifest in render(VALUES[name], apis=MONITORING) if manifest["kind"] not in GENERATED]
    text = yaml.safe_dump_all(manifests, sort_keys=False, width=120)
    path = FOLDER / f"{name}.yaml"
    if os.environ.get("QLORA_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", VALUES)
def test_helm_lint_passes(name: str, tmp_path: Path) -> None:
    values = tmp_path / "values.json"
    values.write_text(json.dumps(VALUES[name]), encoding="utf-8")
    assert "0 chart(s) failed" in run([binary("helm"), "lint", "--strict", CHART, f"--values={values}"])


def test_installations_with_names_of_their_own_share_only_the_crds() -> None:
    first, second = (names_of(render({**VALUES["closed"], **value})) for value in ({}, {"fullnameOverride": "team-b"}))
    assert {name for name in first & second if not name.startswith("ConfigMap/")} == {
        "CustomResourceDefinition/qlorajobs.qlora.dev",
        "CustomResourceDefinition/qloraclasses.qlora.dev",
    }


@pytest.mark.parametrize("enabled", [True, False])
def test_parent_chart_installs_it_by_condition_and_shares_its_globals(tmp_path: Path, enabled: bool) -> None:
    parent = {
        "apiVersion": "v2",
        "name": "platform",
        "version": "0.1.0",
        "dependencies": [
            {"name": "qlora-operator", "version": "*", "repository": "", "condition": "qlora-operator.enabled"}
        ],
    }
    values = {"global": {"imageRegistry": "registry.example"}, "qlora-operator": {"enabled": enabled, "replicas": 1}}
    (tmp_path / "Chart.yaml").write_text(yaml.safe_dump(parent), encoding="utf-8")
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    shutil.copytree(CHART, tmp_path / "charts/qlora-operator")
    text = run([binary("helm"), "template", "platform", tmp_path])
    deployments = [each for each in yaml.load_all(text, yaml.CSafeLoader) if each and each["kind"] == "Deployment"]
    images = [each["spec"]["template"]["spec"]["containers"][0]["image"] for each in deployments]
    assert images == (["registry.example/qlora-operator:0.1.0"] if enabled else [])


def test_labels_of_the_selector_are_the_same_whatever_the_values_say() -> None:
    [deployment] = [each for each in render(VALUES["fitted"]) if each["kind"] == "Deployment"]
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert selector == {"app.kubernetes.io/name": "tuning", "app.kubernetes.io/instance": RELEASE}
    assert selector.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


def test_namespaced_installation_has_no_cluster_permissions_on_runs() -> None:
    roles = names_of(render(VALUES["namespaced"]))
    assert {role for role in roles if role.startswith("Cluster")} == {
        "ClusterRole/qlora-operator-cluster",
        "ClusterRoleBinding/qlora-operator-cluster",
    }


@pytest.mark.parametrize(
    ("mode", "apis", "rendered"),
    [
        ("skipIfMissing", (), False),
        ("skipIfMissing", MONITORING, True),
        ("failIfMissing", MONITORING, True),
        ("alwaysRender", (), True),
    ],
)
def test_monitors_are_rendered_if_crds_are_served(mode: str, apis: tuple[str, ...], rendered: bool) -> None:
    settings = {"enabled": True, "renderMode": mode}
    values = {"monitoring": {"serviceMonitor": settings, "podMonitor": settings, "prometheusRule": settings}}
    monitors = {"ServiceMonitor", "PodMonitor", "PrometheusRule"}
    kinds = {manifest["kind"] for manifest in render(values, apis=apis)}
    assert kinds & monitors == (monitors if rendered else set())


@pytest.mark.parametrize("key", ["serviceMonitor", "podMonitor", "prometheusRule"])
def test_required_monitors_without_crds_fail(key: str) -> None:
    with pytest.raises(CommandError, match=rf"or set monitoring\.{key}\.renderMode to skipIfMissing"):
        render({"monitoring": {key: {"enabled": True, "renderMode": "failIfMissing"}}})


@pytest.mark.parametrize("name", VALUES)
def test_rendered_rules_have_no_wildcard_and_no_secret(name: str) -> None:
    rules = [rule for manifest in render(VALUES[name], apis=MONITORING) for rule in manifest.get("rules", ())]
    words = {word for rule in rules for values in rule.values() for word in values}
    assert not words & {"*", "secrets", "pods/exec", "impersonate", "escalate", "bind"}


@pytest.mark.parametrize(
    ("values", "starts"),
    [
        pytest.param({"platform": {"hub": {"endpoint": "https://hub.example"}}}, (), id="nothing"),
        pytest.param({}, ("NOTE: models are downloaded from the public Hugging Face hub",), id="defaults"),
        pytest.param(
            VALUES["namespaced"], ("NOTE: models are downloaded from the public Hugging Face hub",), id="namespaced"
        ),
        pytest.param(VALUES["private"], (), id="private"),
        pytest.param(
            {"monitoring": {"podMonitor": {"enabled": True}}},
            (
                "NOTE: models are downloaded",
                "WARNING: monitoring.podMonitor was left out: the cluster has no PodMonitor CRD",
            ),
            id="not-monitored",
        ),
        pytest.param(
            VALUES["bare"],
            (
                "WARNING: replicas is 1",
                "NOTE: models are downloaded",
                "WARNING: crds.keep is false",
                "WARNING: rbac.create is false",
            ),
            id="bare",
        ),
        pytest.param(
            {"image": {"tag": "latest"}, "platform": {"hub": {"mirror": "s3://models/hub"}}},
            ("WARNING: image.tag latest is mutable", "WARNING: platform.hub.mirror is for air-gapped clusters"),
            id="moving-and-air-gapped",
        ),
        pytest.param(
            {
                "image": {"tag": "latest", "digest": f"sha256:{'a' * 64}"},
                "platform": {"hub": {"endpoint": "https://hub.example"}},
            },
            (),
            id="pinned",
        ),
    ],
)
def test_notes_have_warnings(values: dict[str, Any], starts: tuple[str, ...]) -> None:
    warnings = [line for line in notes_of(values).splitlines() if line.startswith(("WARNING", "NOTE:"))]
    assert [line[: len(start)] for line, start in zip(warnings, starts, strict=True)] == list(starts)


def test_first_run_in_notes_is_valid() -> None:
    notes = notes_of({"watchNamespaces": ["team-a"]})
    assert "--namespace team-a" in notes
    manifest = notes.split("<<EOF\n")[1].split("EOF\n")[0]
    assert QLoRAJobSpec.model_validate(yaml.safe_load(manifest)["spec"]).lora.rank == 16


def policies_of(values: dict[str, Any]) -> set[str]:
    """Names of the NetworkPolicies for pods of QLoRAJobs, without the release's."""
    prefix = f"NetworkPolicy/{RELEASE}-trainer-"
    return {name.removeprefix(prefix) for name in names_of(render(values)) if name.startswith(prefix)}


def test_network_policy_allows_only_named_destinations() -> None:
    closed = {"networkPolicy": {"trainer": {"enabled": True, "namespaces": ["ml"]}}}
    assert policies_of(closed) == {"deny", "dns", "s3", "hub", "operator", "gang"}
    assert policies_of({**closed, "platform": {"hub": {"mirror": "s3://models/hub"}}}) == {
        "deny", "dns", "s3", "operator", "gang",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [("", 443), ("https://s3.example", 443), ("http://minio", 80), ("http://10.0.0.1:9000/", 9000)],
)
def test_s3_port_follows_endpoint(endpoint: str, port: int) -> None:
    values = {
        "networkPolicy": {"trainer": {"enabled": True, "namespaces": ["ml"]}},
        "platform": {"s3": {"endpoint": endpoint}},
    }
    [policy] = [item for item in render(values) if item["metadata"]["name"] == f"{RELEASE}-trainer-s3"]
    assert policy["spec"]["egress"][0]["ports"] == [{"protocol": "TCP", "port": port}]


def test_network_policy_requires_namespaces() -> None:
    with pytest.raises(CommandError, match=r"needs networkPolicy\.trainer\.namespaces, or watchNamespaces"):
        render({"networkPolicy": {"trainer": {"enabled": True}}})


@pytest.mark.parametrize("allowed", ["registry.example/ml/", "registry.example/ml", "registry.example/ml/trainer"])
def test_policy_that_allows_trainer_image_is_rendered(allowed: str) -> None:
    values = {"trainerImage": {"repository": "registry.example/ml/trainer"}, "policy": {"images": [allowed]}}
    assert f"ValidatingAdmissionPolicy/{RELEASE}-images-of-pods" in names_of(render(values))


@pytest.mark.parametrize("allowed", ["registry.example/m", "registry.example/ml/train", "registryxexample/ml/trainer"])
def test_policy_that_denies_trainer_image_fails(allowed: str) -> None:
    values = {"trainerImage": {"repository": "registry.example/ml/trainer"}, "policy": {"images": [allowed]}}
    with pytest.raises(CommandError, match=r"policy\.images does not allow registry\.example/ml/trainer:0\.1\.0"):
        render(values)


@pytest.mark.parametrize("allowed", ["qlora-train", "qlora", "library"])
def test_bare_name_is_no_prefix_of_images(allowed: str) -> None:
    values = {"trainerImage": {"repository": "qlora/qlora-trainer"}, "policy": {"images": [allowed]}}
    with pytest.raises(CommandError, match=r"policy\.images does not allow qlora/qlora-trainer:0\.1\.0"):
        render(values)


@pytest.mark.parametrize("key", ["models", "datasets", "outputs", "trackers"])
def test_empty_list_restricts_nothing(key: str) -> None:
    assert render({"policy": {key: []}}) == render({})


@pytest.mark.parametrize("allowed", [[], ["nvidia.com/gpu", "nvidia.com/mig-3g.40gb"]], ids=["default", "partitions"])
def test_gpu_quota_counts_every_resource_that_is_allowed(allowed: list[str]) -> None:
    rendered = render({"policy": {"maxGpusPerNamespace": {"ml": 4}, "gpuResources": allowed}})
    [quota] = [item for item in rendered if item["kind"] == "ResourceQuota"]
    counted = allowed or ["nvidia.com/gpu"]
    assert quota["spec"]["hard"] == {f"requests.{name}": "4" for name in counted}
    [policy] = [item for item in rendered if item["kind"] == "ValidatingAdmissionPolicy"]
    [rule] = policy["spec"]["validations"]
    assert rule["expression"].endswith("in [" + ", ".join(f"'{name}'" for name in counted) + "]")


def test_policy_in_docs_is_valid() -> None:
    page = (CHART.parents[1] / "docs/operations.md").read_text(encoding="utf-8")
    [block] = [found for found in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "\npolicy:" in found]
    kinds = {manifest["kind"] for manifest in render(yaml.safe_load(block))}
    assert kinds >= {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "ResourceQuota"}
