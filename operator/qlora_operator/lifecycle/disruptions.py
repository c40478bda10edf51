"""Who stopped or refused a pod, as its status says: kubelet, scheduler, controllers, or an init container."""

import re
from typing import Final, NamedTuple

from qlora_api.names import CLASS_KIND, Role
from qlora_api.reasons import Domain, Reason
from qlora_operator.models import ChildJob, InitContainer, Pod

EVICTED: Final = "Evicted"
"""status.reason of a pod that the kubelet evicted because its node ran short of a resource."""
_OWN_DISK_LIMIT: Final = re.compile(
    r"Usage of EmptyDir volume .+ exceeds the limit"
    r"|Pod ephemeral local storage usage exceeds the total limit of containers"
    r"|Container .+ exceeded its local ephemeral storage limit"
)
"""Message of an eviction for a limit of the pod itself, on a node with room (pkg/kubelet/eviction)."""
_VOLUME: Final = "EmptyDir"
_DISRUPTION_REASONS: Final = {
    "PreemptionByScheduler": Reason.PREEMPTED,
    "DeletionByTaintManager": Reason.NODE_LOST,
    "DeletionByPodGC": Reason.NODE_LOST,
}
"""By reason of the DisruptionTarget condition (Kubernetes documentation, Disruptions); any other is a drain."""
_KUBELET_STOPS: Final = {
    "NodeShutdown": Reason.INTERRUPTED,
    "Shutdown": Reason.INTERRUPTED,
    "Terminated": Reason.INTERRUPTED,
    "DeadlineExceeded": Reason.INTERRUPTED,
    "Preempting": Reason.PREEMPTED,
}
"""By status.reason with which the kubelet stops or refuses a pod without a fault of the node: the node shuts down
(three names, pkg/kubelet/nodeshutdown), the pod's own activeDeadlineSeconds, which only others set, or a critical pod
needs the room."""
_NO_ROOM: Final = (
    "OutOf",
    "TopologyAffinityError",
    "InsufficientResourceError",
    "UnexpectedPreemptionError",
    "NodeAffinity",
    "NodeName",
    "NodePorts",
    "NodeUnschedulable",
    "TaintToleration",
    "VolumeAttachmentLimitExceeded",
)
"""Starts of the status.reason with which the kubelet refuses a pod because there is other room on the node, or another
label or taint, than the scheduler knew of (pkg/kubelet/lifecycle/predicate.go)."""


class ExitCause(NamedTuple):
    """Why a container ended."""

    reason: Reason
    message: str
    domain: Domain | None = None
    """Where the cause lies, if not where the reason's record says."""


def cause_of_disruption(child: ChildJob, pod: Pod) -> ExitCause | None:
    """Return who disrupted a pod, if the cluster recorded it."""
    if pod.reason == EVICTED:
        return _cause_of_eviction(child, pod)
    if pod.reason in _KUBELET_STOPS:
        message = f"pod {pod.name} on node {pod.node}: {pod.message or pod.reason}"
        return ExitCause(_KUBELET_STOPS[pod.reason], message)
    if not pod.disruption_reason:
        return None
    reason = _DISRUPTION_REASONS.get(pod.disruption_reason, Reason.INTERRUPTED)
    return ExitCause(reason, f"pod {pod.name} on node {pod.node}: {pod.disruption_message or pod.disruption_reason}")


def _cause_of_eviction(child: ChildJob, pod: Pod) -> ExitCause:
    """Return why the kubelet evicted a pod; one that exceeded its own limit would do so on every node."""
    message = f"pod {pod.name} was evicted from node {pod.node}: {pod.message}"
    if not (own := _OWN_DISK_LIMIT.search(pod.message)):
        return ExitCause(Reason.EVICTED, message)
    return ExitCause(Reason.EVICTED, f"{message.rstrip('. ')}; {_disk_remedy(child, own.group())}", Domain.RUN)


def _disk_remedy(child: ChildJob, exceeded: str) -> str:
    if _VOLUME in exceeded:
        return (
            "this limit follows from the model and the dataset; lower spec.dataset.maxSamples, or use a smaller model"
        )
    if child.role is Role.PREPARE:
        used = f"{CLASS_KIND} {child.used_class}" if child.used_class else f"a {CLASS_KIND}"
        return f"raise resources.prepare.ephemeralStorage of {used}, or the limit of the namespace's LimitRange"
    return "raise the limit of ephemeral-storage in the namespace's LimitRange, or in the policy that sets it"


def cause_of_rejection(pod: Pod) -> ExitCause:
    """Return why the container of a pod that has failed never ran."""
    if pod.reason.startswith(_NO_ROOM):
        message = f"pod {pod.name} on node {pod.node}: {pod.reason}: {pod.message}"
        return ExitCause(Reason.POD_REJECTED, message, Domain.CLUSTER)
    if pod.init is not None and pod.init.exit is not None:
        message = f"pod {pod.name} on node {pod.node}: {describe_init(pod.init)}"
        return ExitCause(Reason.POD_REJECTED, message, Domain.SERVICE)
    return ExitCause(Reason.POD_REJECTED, pod.message or f"pod {pod.name} failed before its container ran")


def describe_init(init: InitContainer) -> str:
    """Return what an init container does that has not succeeded; the operator adds none, so others did."""
    if init.exit is None:
        return f"init container {init.name} has not ended" + (f" ({init.waiting})" if init.waiting else "")
    details = ": ".join(filter(None, (init.exit.reason, init.exit.message.strip())))
    return f"init container {init.name} exited with code {init.exit.code}" + (f" ({details})" if details else "")
