"""The nodes of a fleet, how they are broken, and which of them a pod gets."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from random import Random
from typing import Final

from qlora_api.reasons import Reason
from qlora_operator.models import Manifest
from tests.make import make_termination_message

GPUS: Final = 8
"""GPUs of a node."""
UPTIME: Final = timedelta(minutes=45)
"""Of a node that goes down again and again."""
DOWNTIME: Final = timedelta(minutes=8)
EVICTION_DELAY: Final = timedelta(seconds=110)
"""From the last heartbeat of a node to the deletion of its pods: 50 s, and the 60 s that the pods tolerate."""


class Fault(StrEnum):
    """How a node is broken."""

    ADMISSION = "refuses pods (UnexpectedAdmissionError)"
    START = "cannot start containers (StartError)"
    STUCK = "starts no container (pod network; image pull)"
    GPU = "GPU fails after minutes (ECC error, Xid)"
    CRASH = "process crashes after minutes (exit 134, 139)"
    DOWN = "goes down every 45 minutes (shutdown; dead)"


ADMISSION_MESSAGE: Final = (
    "Allocate failed due to requested number of devices unavailable for nvidia.com/gpu. Requested: 1, Available: 0, "
    "which is unexpected"
)
START_MESSAGE: Final = (
    "failed to create containerd task: failed to create shim task: OCI runtime create failed: nvidia-container-cli: "
    "initialization error: driver error: failed to process request"
)
STUCK_REASONS: Final = ("ContainerCreating", "ImagePullBackOff")
GPU_ENDS: Final = (
    (1, make_termination_message(Reason.ACCELERATOR_FAILED, "CUDA error: uncorrectable ECC error encountered")),
    (1, make_termination_message(Reason.ACCELERATOR_FAILED, "CUDA error: unspecified launch failure")),
)
CRASH_ENDS: Final = ((134, "corrupted size vs. prev_size"), (139, "Fatal Python error: Segmentation fault"))


@dataclass(eq=False)
class Node:
    """A node with GPUs."""

    name: str
    fault: Fault | None = None
    variant: int = 0
    """In which of two ways the fault shows: 0 or 1."""
    free: int = GPUS
    up: bool = True
    changed_at: datetime | None = None
    """When it went down or came back last."""

    @property
    def dead(self) -> bool:
        """Return whether it is down without having stopped its pods."""
        return not self.up and self.variant == 1


def build_nodes(count: int, broken_per_fault: int) -> list[Node]:
    """Return the nodes, the broken ones first."""
    faults = [(fault, number % 2) for fault in Fault for number in range(broken_per_fault)]
    healthy: list[tuple[Fault | None, int]] = [(None, 0)] * (count - len(faults))
    return [Node(f"gpu-{index:02}", *kind) for index, kind in enumerate([*faults, *healthy])]


def choose_node(nodes: Sequence[Node], gpus: int, pod_spec: Manifest, random: Random) -> Node | None:
    """Return the emptiest node with room, as the scheduler of Kubernetes does; those that a pod dislikes come last.

    So a node that fails every pod within seconds is the first to get the next one.
    """
    affinity = pod_spec.get("affinity", {}).get("nodeAffinity", {})
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", ())
    preferred = affinity.get("preferredDuringSchedulingIgnoredDuringExecution", ())
    avoided, disliked = _excluded(required), _excluded(term["preference"] for term in preferred)
    fitting = [node for node in nodes if node.up and node.free >= gpus and node.name not in avoided]
    return min(fitting, key=lambda node: (node.name in disliked, -node.free, random.random()), default=None)


def _excluded(terms: Iterable[Manifest]) -> set[str]:
    return {field["values"][0] for term in terms for field in term.get("matchFields", ())}
