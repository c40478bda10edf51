"""What means nothing to the chart is refused before anything is installed, and the refusal names the value."""

import json
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from tests.cluster.host.commands import CommandError
from tests.integration.chart.rendering import CHART, render, render_text
from tests.integration.chart.test_rendering import MONITORING
from tests.make import merge

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"replica": 3}, "'replica'"),
    ({"replicas": "3"}, "/replicas"),
    ({"replicas": 0}, "/replicas"),
    ({"image": {"tags": "1.0"}}, "'tags'"),
    ({"image": {"tag": 1.0}}, "/image/tag"),
    ({"image": {"repository": ""}}, "/image/repository"),
    ({"image": {"digest": "sha256:1234"}}, "/image/digest"),
    ({"trainerImage": {"pullPolicy": "Sometimes"}}, "/trainerImage/pullPolicy"),
    ({"imagePullSecrets": ["registry"]}, "/imagePullSecrets/0"),
    ({"watchNamespaces": "ml"}, "/watchNamespaces"),
    ({"watchNamespaces": ["ml", "ml"]}, "/watchNamespaces"),
    ({"watchNamespaces": ["Team_A"]}, "/watchNamespaces/0"),
    ({"platform": {"s3": {"endpoint": "minio:9000"}}}, "/platform/s3/endpoint"),
    ({"platform": {"s3": {"addressing": "dns"}}}, "/platform/s3/addressing"),
    ({"platform": {"hub": {"mirror": "/models"}}}, "/platform/hub/mirror"),
    ({"workers": 1000}, "/workers"),
    ({"logLevel": "verbose"}, "/logLevel"),
    ({"podAnnotations": {"team": 1}}, "/podAnnotations/team"),
    ({"enabled": "yes"}, "/enabled"),
    ({"commonLabels": {"team": 1}}, "/commonLabels/team"),
    ({"extraEnv": [{"name": "QLORA_TTL", "value": "1d"}]}, "/extraEnv/0/name"),
    ({"extraObjects": [{"kind": "ConfigMap"}]}, "/extraObjects/0"),
    ({"service": {"ipFamilies": ["IPv5"]}}, "/service/ipFamilies/0"),
    ({"image": {"registry": "https://registry.example"}}, "/image/registry"),
    ({"pods": {"restartPolicy": "Always"}}, "'restartPolicy'"),
    ({"pods": {"train": {"resources": {}}}}, "/pods/train"),
    ({"pods": {"labels": {"qlora.dev/job": "other"}}}, "/pods/labels"),
    ({"pods": {"env": [{"name": "HF_HOME", "value": "/x"}]}}, "/pods/env/0/name"),
    ({"pods": {"prepare": {"env": [{"name": "HTTPS_PROXY", "value": "x"}]}}}, "/pods/prepare/env/0/name"),
    ({"pods": {"volumes": [{"name": "work", "emptyDir": {}}]}}, "/pods/volumes/0/name"),
    ({"pods": {"volumeMounts": [{"name": "models", "mountPath": "/work"}]}}, "/pods/volumeMounts/0/mountPath"),
    ({"pods": {"securityContext": {"runAsUser": 0}}}, "/pods/securityContext/runAsUser"),
    ({"pods": {"tolerations": [{"operator": "In"}]}}, "/pods/tolerations/0/operator"),
    ({"pods": {"proxy": {"https": "proxy:3128"}}}, "/pods/proxy/https"),
]


@pytest.mark.parametrize(("values", "named"), REFUSED, ids=lambda given: given if isinstance(given, str) else "")
def test_unknown_value_is_rejected_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(CommandError) as refusal:
        render_text(values)
    assert named in str(refusal.value)


def test_registry_is_put_before_the_repository() -> None:
    assert image_of({"image": {"registry": "mirror.example:5000/"}}) == "mirror.example:5000/qlora-operator:0.1.0"
    assert image_of({"global": {"imageRegistry": "registry.example"}}) == "registry.example/qlora-operator:0.1.0"
    both = {"global": {"imageRegistry": "registry.example"}, "image": {"registry": "mirror.example"}}
    assert image_of(both) == "mirror.example/qlora-operator:0.1.0"


def image_of(values: dict[str, Any]) -> str:
    [deployment] = [manifest for manifest in render(values) if manifest["kind"] == "Deployment"]
    return str(deployment["spec"]["template"]["spec"]["containers"][0]["image"])


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ({"repository": "registry/operator"}, "registry/operator:0.1.0"),
        ({"repository": "registry/operator", "tag": "main"}, "registry/operator:main"),
        ({"repository": "operator", "tag": "main", "digest": f"sha256:{'a' * 64}"}, f"operator@sha256:{'a' * 64}"),
    ],
)
def test_digest_overrides_tag_and_tag_overrides_version(image: dict[str, str], reference: str) -> None:
    assert image_of({"image": image}) == reference


def test_global_values_of_helm_are_accepted() -> None:
    assert render({"global": {"region": "eu"}}) == render({})


HOSTILE: Final = (
    "a\ninjected: yes",
    "a\n---\nkind: Secret",
    'a", injected: "b',
    "a}, injected: {b: c",
    "a'] + ['b",
    "{{ .Release.Name }}",
    "0x1f",
)
"""Strings that end a YAML scalar, a list or a CEL string, become another type, or are templates themselves."""
EVERYTHING: Final[dict[str, Any]] = {
    "crds": {"enabled": False},
    "watchNamespaces": ["team-a"],
    "policy": {"models": ["hf://meta-llama/"]},
    "networkPolicy": {"trainer": {"enabled": True}},
    "monitoring": {name: {"enabled": True} for name in ("serviceMonitor", "podMonitor", "prometheusRule", "dashboard")},
}
"""Whatever a value may be used in is rendered."""
SAME_AS_PODS: Final = {("pods", "prepare"), ("pods", "train")}
"""Sections with the types of `pods`, of which all is rendered in one place."""
Wrap = Callable[[str], Any]


def strings_of(schema: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Wrap]]:
    """Yield each value that has free text, with a function that puts some into it."""
    for name, field in schema.get("properties", {}).items():
        inner, more = (*path, name), field.get("additionalProperties")
        if inner in SAME_AS_PODS:
            continue
        if "properties" in field:
            yield from strings_of(field, inner)
        elif field["type"] == "string" and "enum" not in field:
            yield inner, lambda text: text
        elif field.get("items", {}).get("type") == "string":
            yield inner, lambda text: [text, "qlora-trainer"]
        elif field.get("items", {}).get("required") == ["name"]:
            yield inner, lambda text: [{"name": text}]
        elif more is True or more == {"type": "string"}:
            yield inner, lambda text: {text: text}
        elif "patternProperties" in field:
            yield inner, lambda text: {text: 1}


def strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (text for item in value.items() for part in item for text in strings_in(part))
    elif isinstance(value, list):
        yield from (text for item in value for text in strings_in(item))
    elif isinstance(value, str):
        yield value
        if value.startswith('{"'):  # values as JSON, in a variable of the operator
            yield from strings_in(json.loads(value))


FINE: Final = ("rejected", "one string", "not rendered")


def outcome(path: tuple[str, ...], given: Any, text: str) -> str:
    """Return what becomes of a value with hostile text: it is rejected by name, is one string, or is not rendered."""
    values: dict[str, Any] = given
    for key in reversed(path):
        values = {key: values}
    try:
        manifests = render(merge(EVERYTHING, values), apis=MONITORING)
    except CommandError as refusal:
        return "rejected" if f"at '/{'/'.join(path)}" in str(refusal) else str(refusal)[-300:]
    strings = set(strings_in(manifests))
    if any(text in string for string in strings) and "injected" not in strings:
        return "one string"
    return "not rendered" if manifests == render(EVERYTHING, apis=MONITORING) else "injected"


@pytest.mark.parametrize(
    ("path", "wrap"),
    [
        pytest.param(path, wrap, id=".".join(path))
        for path, wrap in strings_of(json.loads((CHART / "values.schema.json").read_text(encoding="utf-8")))
    ],
)
def test_text_stays_one_string_or_is_rejected(path: tuple[str, ...], wrap: Wrap) -> None:
    outcomes = {text: outcome(path, wrap(text), text) for text in HOSTILE}
    assert {text: found for text, found in outcomes.items() if found not in FINE} == {}
