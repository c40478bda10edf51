"""Settings of the pods of runs are refused with field, cause and fix."""

import json
from typing import Any

import pytest

from qlora_api.pod_profile import DEFAULT_PROFILE
from qlora_operator.settings import SettingsError, read_settings

IMAGE = {"QLORA_TRAINER_IMAGE": "trainer:1"}


def mounted_at(path: str) -> dict[str, Any]:
    volume = {"name": "models", "nfs": {"server": "nfs", "path": "/"}}
    return {"volumes": [volume], "volumeMounts": [{"name": "models", "mountPath": path}]}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"restartPolicy": "Always"}, "pods.restartPolicy"),
    ({"containers": []}, "pods.containers"),
    ({"train": {"resources": {}}}, "pods.train.resources"),
    ({"prepare": {"proxy": {}}}, "pods.prepare.proxy"),
    ({"labels": {"qlora.dev/job": "other"}}, "pods.labels"),
    ({"labels": {"app.kubernetes.io/managed-by": "helm"}}, "pods.labels"),
    ({"labels": {"team": "a team"}}, "pods.labels"),
    ({"annotations": {"batch.kubernetes.io/job-completion-index": "7"}}, "pods.annotations"),
    ({"env": [{"name": "HF_HOME", "value": "/x"}]}, "pods.env.0.name"),
    ({"env": [{"name": "QLORA_MAIN_ADDRESS", "value": "x"}]}, "pods.env.0.name"),
    ({"env": [{"name": "PYTHONPATH", "value": "/x"}]}, "pods.env.0.name"),
    ({"env": [{"name": "WORLD_SIZE", "value": "1"}]}, "pods.env.0.name"),
    ({"env": [{"name": "https_proxy", "value": "http://proxy"}]}, "pods.env.0.name"),
    ({"env": [{"name": "SSL_CERT_FILE", "value": "/ca"}]}, "pods.env.0.name"),
    ({"env": [{"name": "A", "value": 1}]}, "pods.env.0.value"),
    ({"env": [{"name": "A\n", "value": "1"}]}, "pods.env.0.name"),
    ({"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}, "pods: env"),
    ({"env": [{"name": "A", "valueFrom": {}}]}, "pods.env.0.valueFrom"),
    (
        {"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "x"}, "secretKeyRef": {"name": "a", "key": "b"}}}]},  # noqa: E501
        "pods.env.0.valueFrom",
    ),
    ({"hostAliases": [{"ip": "10.0.0.5", "hostnames": [name]} for name in ("a", "b")]}, "pods: hostAliases"),
    ({"imagePullSecrets": [{"name": "a"}, {"name": "a"}]}, "pods: imagePullSecrets"),
    ({"volumes": [{"name": "work", "emptyDir": {}}]}, "pods.volumes.0.name"),
    ({"volumes": [{"name": "secret-model", "emptyDir": {}}]}, "pods.volumes.0.name"),
    ({"volumes": [{"name": "models"}]}, "pods.volumes.0"),
    ({"volumeMounts": [{"name": "models", "mountPath": "/models"}]}, "volumeMounts"),
    (mounted_at("/work/models"), "volumeMounts.0.mountPath"),
    (mounted_at("/var/run"), "volumeMounts.0.mountPath"),
    (mounted_at("/opt"), "volumeMounts.0.mountPath"),
    (mounted_at("/opt/qlora-operator/qlora_trainer"), "volumeMounts.0.mountPath"),
    (mounted_at("/a/../work"), "volumeMounts.0.mountPath"),
    (mounted_at("models"), "volumeMounts.0.mountPath"),
    ({"securityContext": {"runAsUser": 0}}, "pods.securityContext.runAsUser"),
    ({"securityContext": {"privileged": True}}, "pods.securityContext.privileged"),
    ({"tolerations": [{"operator": "In"}]}, "pods.tolerations.0.operator"),
    ({"tolerations": [{"operator": "Exists", "key": "a", "value": "b"}]}, "pods.tolerations.0"),
    ({"tolerations": [{"value": "b"}]}, "pods.tolerations.0"),
    ({"tolerations": [{"key": "a b"}]}, "pods.tolerations.0.key"),
    (
        {"tolerations": [{"key": "a", "effect": "NoExecute", "tolerationSeconds": 31_536_001}]},
        "pods.tolerations.0.tolerationSeconds",
    ),
    ({"tolerations": [{"key": "a", "tolerationSeconds": 9}]}, "pods.tolerations.0"),
    ({"hostAliases": [{"ip": "s3", "hostnames": ["s3"]}]}, "pods.hostAliases.0.ip"),
    ({"dnsPolicy": "None"}, "dnsConfig.nameservers"),
    ({"runtimeClassName": "NVIDIA"}, "pods.runtimeClassName"),
    ({"caBundle": {"configMap": "a", "secret": "b"}}, "pods.caBundle"),
    ({"caBundle": {"configMap": "a", "key": "../b"}}, "pods.caBundle.key"),
    ({"proxy": {"https": "proxy:3128"}}, "pods.proxy.https"),
]  # fmt: skip


@pytest.mark.parametrize(("pods", "named"), REFUSED)
def test_value_that_a_run_could_not_work_with_is_refused_at_start_up(pods: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        read_settings(IMAGE | {"QLORA_PODS": json.dumps(pods)})
    assert str(refusal.value).startswith("QLORA_PODS: pods")
    assert named in str(refusal.value)


def test_refusal_says_what_to_do_instead() -> None:
    with pytest.raises(SettingsError, match=r"pods\.env\.0\.name: 'HTTPS_PROXY' is set .* or set pods\.proxy"):
        read_settings(IMAGE | {"QLORA_PODS": '{"env": [{"name": "HTTPS_PROXY", "value": "http://proxy"}]}'})


@pytest.mark.parametrize("variable", [{}, {"QLORA_PODS": ""}, {"QLORA_PODS": "null"}])
def test_operator_without_the_variable_keeps_the_user_of_the_image(variable: dict[str, str]) -> None:
    assert read_settings(IMAGE | variable).installation.pods == DEFAULT_PROFILE
    assert DEFAULT_PROFILE.security_context.run_as_user == 65532
