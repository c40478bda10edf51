"""What the operator and its users may do, as data: the chart's RBAC rules are generated from it.

There is no verb on secrets, none on pods/exec, and no wildcard; a test keeps it so. kopf needs nothing beyond the
watches below: scanning, peering and event posting are off.
"""

from typing import Any, Final, NamedTuple

from qlora_api import names


class Permission(NamedTuple):
    """Verbs on one resource, and the reason for them."""

    group: str
    resource: str
    verbs: tuple[str, ...]
    why: str


NAMESPACED: Final = (
    Permission(names.GROUP, names.PLURAL, ("get", "list", "watch"), "Read the spec."),
    Permission(names.GROUP, f"{names.PLURAL}/status", ("update",), "Say where the run stands."),
    Permission(
        names.GROUP,
        f"{names.PLURAL}/finalizers",
        ("update",),
        "Children block their owner's foreground deletion; clusters with OwnerReferencesPermissionEnforcement ask.",
    ),
    Permission(
        "batch",
        "jobs",
        ("get", "list", "watch", "create", "patch", "delete"),
        "Run prepare and training; delete a Job that holds a GPU in vain.",
    ),
    Permission("", "configmaps", ("get", "create", "patch"), "Hand its configuration to a pod."),
    Permission("", "services", ("get", "create", "patch"), "Give the pods of a run with several nodes their names."),
    Permission("", "pods", ("get", "list", "watch"), "See why a pod waits, and read its last word."),
    Permission("events.k8s.io", "events", ("create",), "Tell the user what happened, in `kubectl describe`."),
)
"""Wherever QLoRAJobs are served: in the whole cluster, or in the namespaces of `watchNamespaces`."""

CLUSTER_SCOPED: Final = (
    Permission("authentication.k8s.io", "tokenreviews", ("create",), "Ask who posts progress: the pod of which job."),
    Permission("", "nodes", ("list",), "See what GPUs there are, to size a run before it asks for one."),
)
"""TokenReviews and nodes have no namespace."""

OWN_NAMESPACE: Final = (
    Permission("coordination.k8s.io", "leases", ("get", "create", "update"), "Agree on which replica works."),
    Permission("", "pods", ("patch",), "Label the leader's pod, so that the progress Service leads to it."),
)
"""In the operator's own namespace."""

VIEW: Final = (Permission(names.GROUP, names.PLURAL, ("get", "list", "watch"), "Follow the runs of a namespace."),)
"""What the chart adds to Kubernetes's ClusterRole `view`, and thereby to edit and admin."""

EDIT: Final = (
    Permission(
        names.GROUP,
        names.PLURAL,
        ("create", "update", "patch", "delete", "deletecollection"),
        "Start, suspend and delete runs; their status is the operator's alone.",
    ),
)
"""What it adds to `edit` and `admin`."""


def _to_rules(permissions: tuple[Permission, ...]) -> list[dict[str, Any]]:
    return [
        {"apiGroups": [permission.group], "resources": [permission.resource], "verbs": list(permission.verbs)}
        for permission in permissions
    ]


def build_rules() -> list[dict[str, Any]]:
    """Return the rules of the Role, or of the ClusterRole."""
    return _to_rules(NAMESPACED)


def build_cluster_rules() -> list[dict[str, Any]]:
    """Return the rules that only a ClusterRole can hold."""
    return _to_rules(CLUSTER_SCOPED)


def build_own_namespace_rules() -> list[dict[str, Any]]:
    """Return the rules of the Role in the operator's own namespace."""
    return _to_rules(OWN_NAMESPACE)


def build_view_rules() -> list[dict[str, Any]]:
    """Return the rules of people who look at runs."""
    return _to_rules(VIEW)


def build_edit_rules() -> list[dict[str, Any]]:
    """Return the rules of people who make runs."""
    return _to_rules(EDIT)
