"""What an installation sets in the pods of runs: every demand, in prepare and training pods."""

from dataclasses import replace
from re import search
from typing import Any, Final

import pytest

from qlora_api.pod_names import RESERVED_ENVIRONMENT, RESERVED_LABELS, RESERVED_PATHS, RESERVED_VOLUMES
from qlora_api.pod_profile import PodProfile
from qlora_operator.models import AttemptInputs
from qlora_operator.resources import build_prepare_job, build_train_job
from qlora_planner import make_plan
from tests.make import INSTALLATION, OWNER, make_prepared, make_spec

GANG: Final = make_spec(
    resources={"nodes": 2, "gpusPerNode": 1}, distribution="zero3", training={"globalBatchSize": 64}
)
TOLERATION: Final = {"key": "dedicated", "operator": "Equal", "value": "ml", "effect": "NoSchedule"}
ENVIRONMENT: Final = {"name": "NCCL_IB_HCA", "value": "mlx5"}
VOLUME: Final = {"name": "models", "persistentVolumeClaim": {"claimName": "models"}}
MOUNT: Final = {"name": "models", "mountPath": "/models", "readOnly": True}


def templates_of(pods: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod templates of an installation with such values, by the section for their role."""
    installation = replace(INSTALLATION, pods=PodProfile.model_validate(pods))
    run = AttemptInputs(1, make_plan(GANG, make_prepared()), make_prepared())
    jobs = {
        "prepare": build_prepare_job(OWNER, GANG, installation),
        "train": build_train_job(OWNER, GANG, run, installation),
    }
    return {role: job["spec"]["template"] for role, job in jobs.items()}


def environment_of(template: dict[str, Any]) -> dict[str, Any]:
    variables = template["spec"]["containers"][0]["env"]
    assert len({variable["name"] for variable in variables}) == len(variables)
    return {variable["name"]: variable.get("value") for variable in variables}


@pytest.mark.parametrize("section", ["all", "prepare", "train"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priorityClassName", "training"),
        ("runtimeClassName", "nvidia"),
        ("schedulerName", "volcano"),
        ("imagePullSecrets", [{"name": "registry"}]),
        ("hostAliases", [{"ip": "10.0.0.5", "hostnames": ["s3.example"]}]),
        ("dnsPolicy", "Default"),
        ("dnsConfig", {"nameservers": ["10.0.0.2"], "options": [{"name": "ndots", "value": "2"}]}),
        ("nodeSelector", {"pool": "ml"}),
        ("securityContext", {"runAsUser": 1000, "fsGroup": 1000}),
    ],
)  # fmt: skip
def test_field_reaches_the_pods_of_its_section_only(section: str, field: str, value: Any) -> None:
    templates = templates_of({field: value} if section == "all" else {section: {field: value}})
    for role, template in templates.items():
        assert (template["spec"].get(field) == value) is (section in ("all", role))


@pytest.mark.parametrize("section", ["all", "prepare", "train"])
def test_entries_are_added_to_the_pods_of_their_section_only(section: str) -> None:
    added = {
        "labels": {"cost-center": "42"},
        "annotations": {"sidecar.istio.io/inject": "false"},
        "tolerations": [TOLERATION],
        "env": [ENVIRONMENT],
        "volumes": [VOLUME],
        "volumeMounts": [MOUNT],
    }
    before, after = templates_of({}), templates_of(added if section == "all" else {section: added})
    for role, template in after.items():
        expected = before[role]
        if section in ("all", role):
            [container] = expected["spec"]["containers"]
            expected["metadata"]["labels"]["cost-center"] = "42"
            expected["metadata"]["annotations"] = added["annotations"]
            expected["spec"]["tolerations"].append(TOLERATION)
            expected["spec"]["volumes"].append(VOLUME)
            container["env"].append(ENVIRONMENT)
            container["volumeMounts"].append(MOUNT)
        template["spec"]["tolerations"].sort(key=str)
        expected["spec"]["tolerations"].sort(key=str)
        assert template == expected


def test_section_is_merged_into_the_settings_of_all_pods() -> None:
    all_pods = {
        "labels": {"team": "a", "cost-center": "42"},
        "runtimeClassName": "runc",
        "tolerations": [TOLERATION],
        "env": [ENVIRONMENT, {"name": "FI_PROVIDER", "value": "efa"}],
        "securityContext": {"runAsUser": 1000, "fsGroup": 1000},
    }
    train = {
        "labels": {"team": "b"},
        "runtimeClassName": "nvidia",
        "tolerations": [{"key": "spot", "operator": "Exists"}],
        "env": [{"name": "FI_PROVIDER", "value": "tcp"}],
        "securityContext": {"runAsUser": 2000},
    }
    templates = templates_of({**all_pods, "train": train})
    template, environment = templates["train"], environment_of(templates["train"])
    assert {"team": "b", "cost-center": "42"}.items() <= template["metadata"]["labels"].items()
    assert template["spec"]["runtimeClassName"] == "nvidia"
    assert {"dedicated", "spot"} <= {toleration.get("key") for toleration in template["spec"]["tolerations"]}
    assert (environment["FI_PROVIDER"], environment["NCCL_IB_HCA"]) == ("tcp", "mlx5")
    assert template["spec"]["securityContext"] == {"runAsUser": 2000, "fsGroup": 1000}
    assert templates["prepare"]["spec"]["runtimeClassName"] == "runc"


def test_security_context_without_fields_is_left_out() -> None:
    assert all("securityContext" not in template["spec"] for template in templates_of({}).values())


def test_node_selector_of_a_run_takes_precedence() -> None:
    spec = make_spec(resources={"nodeSelector": {"pool": "a100"}, "gpusPerNode": 1})
    profile = PodProfile.model_validate({"nodeSelector": {"pool": "any", "zone": "a"}})
    run = AttemptInputs(1, make_plan(spec, make_prepared()), make_prepared())
    pod = build_train_job(OWNER, spec, run, replace(INSTALLATION, pods=profile))["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "a100", "zone": "a"}


def test_pod_that_tolerates_everything_still_leaves_a_dead_node_after_a_minute() -> None:
    for template in templates_of({"tolerations": [{"operator": "Exists"}]}).values():
        tolerations = template["spec"]["tolerations"]
        dead = next(entry for entry in tolerations if entry.get("key") in (None, "node.kubernetes.io/unreachable"))
        assert dead["tolerationSeconds"] == 60


@pytest.mark.parametrize("section", ["prepare", "train"])
def test_proxy_is_set_in_both_spellings_and_excludes_the_cluster(section: str) -> None:
    proxy = {"http": "http://proxy:3128", "https": "http://proxy:3129", "noProxy": ["s3.example", ".svc"]}
    environment = environment_of(templates_of({"proxy": proxy})[section])
    assert environment["HTTP_PROXY"] == environment["http_proxy"] == "http://proxy:3128"
    assert environment["HTTPS_PROXY"] == environment["https_proxy"] == "http://proxy:3129"
    excluded = environment["NO_PROXY"].split(",")
    assert environment["no_proxy"] == environment["NO_PROXY"]
    assert {"localhost", "127.0.0.1", ".svc", ".cluster.local", "operator.qlora.svc", "s3.example"} <= set(excluded)
    assert (environment.get("QLORA_MAIN_ADDRESS", "localhost")) in excluded
    assert len(set(excluded)) == len(excluded)


def test_no_proxy_alone_sets_no_variable() -> None:
    assert "NO_PROXY" not in environment_of(templates_of({"proxy": {"noProxy": ["s3.example"]}})["train"])


@pytest.mark.parametrize(
    ("bundle", "source"),
    [
        ({"configMap": "ca"}, {"configMap": {"name": "ca", "items": [{"key": "ca.crt", "path": "ca.crt"}]}}),
        ({"secret": "ca", "key": "tls"}, {"secret": {"secretName": "ca", "items": [{"key": "tls", "path": "tls"}]}}),
    ],
)
def test_ca_bundle_is_mounted_and_named_to_every_client(bundle: dict[str, str], source: dict[str, Any]) -> None:
    for template in templates_of({"caBundle": bundle}).values():
        environment, [container] = environment_of(template), template["spec"]["containers"]
        path = f"/etc/qlora-ca/{bundle.get('key', 'ca.crt')}"
        for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE"):
            assert environment[name] == path
        assert {"name": "ca-bundle", **source} in template["spec"]["volumes"]
        assert {"name": "ca-bundle", "mountPath": "/etc/qlora-ca", "readOnly": True} in container["volumeMounts"]


def test_what_the_operator_sets_cannot_be_named() -> None:
    """Whatever a new version adds to its pods must be reserved, or an installation could override it."""
    for template in templates_of({}).values():
        [container] = template["spec"]["containers"]
        assert all(search(RESERVED_LABELS, name) for name in template["metadata"]["labels"])
        assert all(search(RESERVED_ENVIRONMENT, variable["name"]) for variable in container["env"])
        assert all(search(RESERVED_PATHS, mount["mountPath"]) for mount in container["volumeMounts"])
        assert all(search(RESERVED_VOLUMES, volume["name"]) for volume in template["spec"]["volumes"])
