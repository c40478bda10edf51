"""Which namespaces may use a QLoRAClass, and what of it is recorded."""

from typing import Any

import pytest
from pydantic import ValidationError

from qlora_api.qlora_class import ClassNamespaces, ClassSettings, QLoRAClassSpec, settings_of

LABELS = {"team": "a", "stage": "test"}


@pytest.mark.parametrize(
    ("namespaces", "allowed"),
    [
        pytest.param({}, True, id="all"),
        pytest.param({"names": ["ml", "other"]}, True, id="listed"),
        pytest.param({"names": ["other"]}, False, id="not-listed"),
        pytest.param({"selector": {}}, True, id="empty-selector"),
        pytest.param({"selector": {"matchLabels": {"team": "a"}}}, True, id="label"),
        pytest.param({"selector": {"matchLabels": {"team": "a", "stage": "prod"}}}, False, id="one-label-of-two"),
        pytest.param({"names": ["ml"], "selector": {"matchLabels": {"team": "b"}}}, True, id="listed-not-selected"),
        pytest.param({"names": ["other"], "selector": {"matchLabels": {"team": "a"}}}, True, id="selected-not-listed"),
    ],
)
def test_namespace_may_use_a_class(namespaces: dict[str, Any], allowed: bool) -> None:
    assert ClassNamespaces.model_validate(namespaces).allow("ml", LABELS) is allowed


@pytest.mark.parametrize(
    ("expression", "matches"),
    [
        ({"key": "team", "operator": "In", "values": ["a", "b"]}, True),
        ({"key": "team", "operator": "In", "values": ["b"]}, False),
        ({"key": "owner", "operator": "In", "values": ["a"]}, False),
        ({"key": "team", "operator": "NotIn", "values": ["b"]}, True),
        ({"key": "team", "operator": "NotIn", "values": ["a"]}, False),
        ({"key": "owner", "operator": "NotIn", "values": ["a"]}, True),
        ({"key": "team", "operator": "Exists"}, True),
        ({"key": "owner", "operator": "Exists"}, False),
        ({"key": "team", "operator": "DoesNotExist"}, False),
        ({"key": "owner", "operator": "DoesNotExist"}, True),
    ],
)
def test_expression_matches_as_in_kubernetes(expression: dict[str, Any], matches: bool) -> None:
    selector = {"selector": {"matchExpressions": [expression]}}
    assert ClassNamespaces.model_validate(selector).allow("ml", LABELS) is matches


@pytest.mark.parametrize(
    "spec",
    [
        {"pods": {"labels": {"qlora.dev/job": "x"}}},
        {"pods": {"train": {"env": [{"name": "RANK", "value": "0"}]}}},
        {"pods": {"volumeMounts": [{"name": "missing", "mountPath": "/data"}]}},
        {"pods": {"restartPolicy": "Never"}},
        {"queue": {"name": "Not A Name"}},
        {"ttl": "soon"},
        {"resources": {"prepare": {"memory": "16GB"}}},
        {"resources": {"train": {"memory": "16Gi"}}},
        {"namespaces": ["ml"]},
        {"namespaces": {"names": ["Not A Name"]}},
        {"namespaces": {"selector": {"matchExpressions": [{"key": "team", "operator": "Like"}]}}},
        {"gpus": 8},
    ],
)
def test_wrong_class_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        QLoRAClassSpec.model_validate(spec)


def test_record_has_what_a_class_sets_and_reads_back_as_it() -> None:
    spec = {
        "namespaces": {"names": ["ml"]},
        "queue": {"name": "gpus"},
        "ttl": "7d",
        "resources": {"prepare": {"memory": "16Gi"}},
        "pods": {
            "tolerations": [{"key": "team", "value": "a", "effect": "NoSchedule"}],
            "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
            "volumeMounts": [{"name": "models", "mountPath": "/models/"}],
            "train": {"runtimeClassName": "nvidia", "env": [{"name": "A", "value": ""}]},
        },
    }
    parsed = QLoRAClassSpec.model_validate(spec)
    recorded = settings_of(parsed)
    assert recorded.keys() == spec.keys() - {"namespaces"}
    assert ClassSettings.model_validate(recorded) == ClassSettings.model_validate(
        parsed.model_dump(exclude={"namespaces"})
    )
