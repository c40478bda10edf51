"""What means nothing to the chart is refused before anything is installed, and the refusal names the value."""

from typing import Any

import pytest

from tests.cluster.host.commands import CommandError
from tests.integration.chart.rendering import render, render_text

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
]


@pytest.mark.parametrize(("values", "named"), REFUSED, ids=lambda given: given if isinstance(given, str) else "")
def test_unknown_value_is_rejected_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(CommandError) as refusal:
        render_text(values)
    assert named in str(refusal.value)


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
