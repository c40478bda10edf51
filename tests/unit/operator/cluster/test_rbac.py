"""Least privilege, as a table that only this test may widen."""

from qlora_operator.cluster.rbac import (
    CLUSTER_SCOPED,
    EDIT,
    NAMESPACED,
    OWN_NAMESPACE,
    RETENTION,
    VIEW,
    build_cluster_rules,
    build_edit_rules,
    build_own_namespace_rules,
    build_retention_rules,
    build_rules,
    build_view_rules,
)


def test_operator_permissions() -> None:
    assert {f"{entry.group}/{entry.resource}": " ".join(entry.verbs) for entry in (*NAMESPACED, *CLUSTER_SCOPED)} == {
        "qlora.dev/qlorajobs": "get list watch",
        "qlora.dev/qlorajobs/status": "update",
        "qlora.dev/qlorajobs/finalizers": "update",
        "batch/jobs": "get list watch create patch delete",
        "/configmaps": "get list create patch delete",
        "/services": "get list create patch delete",
        "/pods": "get list watch",
        "/events": "list",
        "events.k8s.io/events": "create",
        "authentication.k8s.io/tokenreviews": "create",
        "/nodes": "list",
        "/namespaces": "get",
        "qlora.dev/qloraclasses": "list",
        "coordination.k8s.io/leases": "get",
        "kueue.x-k8s.io/workloads": "list",
    }


def test_operator_deletes_qlorajobs_only_with_retention() -> None:
    assert {f"{entry.group}/{entry.resource}": " ".join(entry.verbs) for entry in RETENTION} == {
        "qlora.dev/qlorajobs": "delete",
    }


def test_operator_permissions_in_own_namespace() -> None:
    assert {f"{entry.group}/{entry.resource}": " ".join(entry.verbs) for entry in OWN_NAMESPACE} == {
        "coordination.k8s.io/leases": "get create update",
        "/pods": "patch",
    }


def test_user_roles_exclude_status() -> None:
    assert {f"{entry.group}/{entry.resource}": " ".join(entry.verbs) for entry in VIEW} == {
        "qlora.dev/qlorajobs": "get list watch",
    }
    assert {f"{entry.group}/{entry.resource}": " ".join(entry.verbs) for entry in EDIT} == {
        "qlora.dev/qlorajobs": "create update patch delete deletecollection",
    }


def test_rules_have_no_wildcard_and_no_secret() -> None:
    operator = build_rules() + build_retention_rules() + build_cluster_rules() + build_own_namespace_rules()
    rules = operator + build_view_rules() + build_edit_rules()
    words = {word for rule in rules for values in rule.values() for word in values}
    assert not words & {"*", "secrets", "pods/exec", "impersonate", "escalate", "bind"}
