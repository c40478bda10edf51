"""Whether the scheduler could place a training pod on a node, from the node's labels, taints and size; pure."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Final

from qlora_api.accelerators import Accelerator
from qlora_api.units import format_gib
from qlora_api.v1alpha1 import ResourcesSpec, Toleration
from qlora_planner.quantities import parse_cores, parse_quantity

_BLOCKING_EFFECTS: Final = frozenset({"NoSchedule", "NoExecute"})
_PASSING_TAINTS: Final = (
    "node.kubernetes.io/",
    "node.cloudprovider.kubernetes.io/",
    "karpenter.sh/",
    "startup-taint.cluster-autoscaler.kubernetes.io/",
    "status-taint.cluster-autoscaler.kubernetes.io/",
    "ignore-taint.cluster-autoscaler.kubernetes.io/",
    "node.cluster.x-k8s.io/",
    "aws-node-termination-handler/",
    "cloud.google.com/impending-node-termination",
    "node.gke.io/",
    "kured.io/",
    "weave.works/kured",
    "nvsentinel",
    "remediation.medik8s.io/",
    "medik8s.io/",
)
"""Prefixes of taints that a controller sets and removes by itself: not ready, cordoned, short of memory, disrupted,
starting, being rebooted or repaired. One that is missing here delays a refusal of its nodes' GPUs, no more: a run that
fits on no others waits for hours."""
_PASSING_SUFFIXES: Final = (
    "ByClusterAutoscaler",
    "OfClusterAutoscaler",
    "/agent-not-ready",
    "/driver-not-ready",
    "/not-ready",
    "/unhealthy",
)
"""Ends of more of them: an autoscaler's, and those of network, volume and device drivers that still start."""
_OPERATING_SYSTEM: Final = "kubernetes.io/os"


def find_obstacle(node: Mapping[str, Any], resources: ResourcesSpec, accelerator: Accelerator) -> str | None:
    """Return why a node never accepts the training pods of a run, whether or not it is free; None if it does.

    Args:
        node: A Node object as the API server returns it.
        resources: spec.resources.
        accelerator: The GPUs that the pods request.

    """
    labels: Mapping[str, str] = node["metadata"].get("labels", {})
    product = {accelerator.product_label: resources.gpu_product} if resources.gpu_product else {}
    for key, value in {**resources.node_selector, **product}.items():
        if labels.get(key) != value:
            return f"no node with {key}={value}"
    if labels.get(_OPERATING_SYSTEM, "linux") != "linux":
        return f"{_OPERATING_SYSTEM} is {labels[_OPERATING_SYSTEM]}"
    taints = [taint for taint in _untolerated(node, resources, accelerator) if not _is_passing(taint)]
    if taints:
        return f"taint {taints[0]['key']}, which spec.resources.tolerations does not tolerate"
    return _find_shortage(node.get("status", {}).get("allocatable", {}), resources)


def is_unready(node: Mapping[str, Any], resources: ResourcesSpec, accelerator: Accelerator) -> bool:
    """Return whether a node accepts no pod for now: it is cordoned, or has a taint that will be removed."""
    cordoned: bool = node.get("spec", {}).get("unschedulable", False)
    return cordoned or any(map(_is_passing, _untolerated(node, resources, accelerator)))


def _untolerated(
    node: Mapping[str, Any], resources: ResourcesSpec, accelerator: Accelerator
) -> list[Mapping[str, str]]:
    taints: Iterable[Mapping[str, str]] = node.get("spec", {}).get("taints", ())
    return [
        taint
        for taint in taints
        if taint.get("effect") in _BLOCKING_EFFECTS
        and taint["key"] not in accelerator.taints
        and not any(_tolerates(toleration, taint) for toleration in resources.tolerations)
    ]


def _is_passing(taint: Mapping[str, str]) -> bool:
    return taint["key"].startswith(_PASSING_TAINTS) or taint["key"].endswith(_PASSING_SUFFIXES)


def _tolerates(toleration: Toleration, taint: Mapping[str, str]) -> bool:
    """Return whether a toleration matches a taint, as in Kubernetes: an absent key or effect matches all."""
    if toleration.effect not in {None, taint["effect"]} or toleration.key not in {None, taint["key"]}:
        return False
    if toleration.operator == "Exists":
        return True
    return toleration.key is not None and (toleration.value or "") == taint.get("value", "")


def _find_shortage(allocatable: Mapping[str, str], resources: ResourcesSpec) -> str | None:
    """Return what a pod requests more of than an empty node has, or None; an amount that cannot be read is enough."""
    memory, cores = allocatable.get("memory", ""), allocatable.get("cpu", "")
    with suppress(ValueError):
        if (found := parse_quantity(memory)) < parse_quantity(resources.memory):
            return f"{format_gib(found)} of host memory, and spec.resources.memory is {resources.memory}"
    with suppress(ValueError):
        if parse_cores(cores) < parse_cores(resources.cpu):
            return f"{cores} CPU, and spec.resources.cpu is {resources.cpu}"
    return None
