"""Permissions of the operator and its users, as data; the chart's RBAC rules are generated from them.

No verb on secrets or pods/exec, and no wildcard; a test enforces this. kopf needs only the watches below: scanning,
peering and event posting are off.
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
    Permission(names.GROUP, f"{names.PLURAL}/status", ("update",), "Write the status."),
    Permission(
        names.GROUP,
        f"{names.PLURAL}/finalizers",
        ("update",),
        "Children set blockOwnerDeletion; OwnerReferencesPermissionEnforcement requires this verb for it.",
    ),
    Permission(
        "batch",
        "jobs",
        ("get", "list", "watch", "create", "patch", "delete"),
        "Run prepare and training; delete a Job that holds a GPU for nothing.",
    ),
    Permission(
        "",
        "configmaps",
        ("get", "list", "create", "patch", "delete"),
        "Pass its configuration to a pod; find and delete those of a run whose ttl has expired.",
    ),
    Permission(
        "",
        "services",
        ("get", "list", "create", "patch", "delete"),
        "Give the pods of a multi-node run DNS names; find and delete those of a run whose ttl has expired.",
    ),
    Permission("", "pods", ("get", "list", "watch"), "See why a pod waits, and read its termination message."),
    Permission("", "events", ("list",), "Say why a Job has no pod, such as a quota."),
    Permission("events.k8s.io", "events", ("create",), "Record Events for the user."),
    Permission("kueue.x-k8s.io", "workloads", ("list",), "Say what a run in a queue waits for; without Kueue, unused."),
)
"""Wherever QLoRAJobs are reconciled: in the cluster, or in the namespaces of `watchNamespaces`."""

RETENTION: Final = (
    Permission(names.GROUP, names.PLURAL, ("delete",), "Delete finished QLoRAJobs after the time in `retention`."),
)
"""Next to NAMESPACED, only if the installation has a `retention`."""

CLUSTER_SCOPED: Final = (
    Permission("authentication.k8s.io", "tokenreviews", ("create",), "Find out which pod posts progress."),
    Permission("", "nodes", ("list",), "Find out what GPUs there are, to size a run before it requests one."),
    Permission(names.GROUP, names.CLASS_PLURAL, ("list",), "Read what is kept for the runs of a namespace."),
    Permission("", "namespaces", ("get",), "Compare its labels with the selector of a QLoRAClass."),
    Permission("coordination.k8s.io", "leases", ("get",), "Find out whether another installation is still there."),
)
"""TokenReviews, nodes, QLoRAClasses and namespaces are cluster-scoped; another installation may be in any namespace."""

OWN_NAMESPACE: Final = (
    Permission("coordination.k8s.io", "leases", ("get", "create", "update"), "Elect the leader."),
    Permission("", "pods", ("patch",), "Label the leader's pod, which the progress Service selects."),
)
"""In the operator's own namespace."""

VIEW: Final = (Permission(names.GROUP, names.PLURAL, ("get", "list", "watch"), "Follow the runs of a namespace."),)
"""Aggregated into the ClusterRole `view`, and so into `edit` and `admin`."""

EDIT: Final = (
    Permission(
        names.GROUP,
        names.PLURAL,
        ("create", "update", "patch", "delete", "deletecollection"),
        "Start, suspend and delete runs; only the operator writes their status.",
    ),
)
"""Aggregated into `edit` and `admin`."""


def _to_rules(permissions: tuple[Permission, ...]) -> list[dict[str, Any]]:
    return [
        {"apiGroups": [permission.group], "resources": [permission.resource], "verbs": list(permission.verbs)}
        for permission in permissions
    ]


def build_rules() -> list[dict[str, Any]]:
    """Return the rules of the Role, or of the ClusterRole."""
    return _to_rules(NAMESPACED)


def build_retention_rules() -> list[dict[str, Any]]:
    """Return the rules that an installation with a retention adds to them."""
    return _to_rules(RETENTION)


def build_cluster_rules() -> list[dict[str, Any]]:
    """Return the rules that only a ClusterRole can hold."""
    return _to_rules(CLUSTER_SCOPED)


def build_own_namespace_rules() -> list[dict[str, Any]]:
    """Return the rules of the Role in the operator's own namespace."""
    return _to_rules(OWN_NAMESPACE)


def build_view_rules() -> list[dict[str, Any]]:
    """Return the rules for users who view runs."""
    return _to_rules(VIEW)


def build_edit_rules() -> list[dict[str, Any]]:
    """Return the rules for users who create runs."""
    return _to_rules(EDIT)
