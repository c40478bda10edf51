"""The pods of a run: which attempt and node each is, and whether it has begun to write."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.logfiles import PREPARE_ATTEMPT
from qlora_cli.cluster.client import ClusterClient, KubeObject

_INDEX: Final = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True, order=True)
class TrainerPod:
    """A pod of a run."""

    attempt: int
    """0 for the preparation."""
    node: int
    """Its place among the pods of the attempt."""
    name: str
    started: bool
    """Whether its container has run; before that there is no log."""

    @property
    def label(self) -> str:
        """Return attempt and node, as they stand before each line."""
        return "prepare" if self.attempt == PREPARE_ATTEMPT else f"{self.attempt}-{self.node}"


def find_pods(cluster: ClusterClient, ref: JobRef) -> list[TrainerPod]:
    """Return the pods of a QLoRAJob in the order of attempts and nodes."""
    return sorted(map(parse_pod, cluster.pods(ref)))


def parse_pod(raw: KubeObject) -> TrainerPod:
    """Read a pod."""
    metadata = raw["metadata"]
    labels = metadata.get("labels", {})
    states = [status.get("state", {}) for status in raw.get("status", {}).get("containerStatuses", ())]
    return TrainerPod(
        attempt=int(labels.get(names.ATTEMPT_LABEL, PREPARE_ATTEMPT)),
        node=int(metadata.get("annotations", {}).get(_INDEX, 0)),
        name=metadata["name"],
        started=any("running" in state or "terminated" in state for state in states),
    )


def is_alive(raw: KubeObject) -> bool:
    """Whether a pod has not come to its end."""
    return raw.get("status", {}).get("phase") not in {"Succeeded", "Failed"}


def latest_attempt(pods: Sequence[TrainerPod]) -> int:
    """Return the latest attempt that has pods; the preparation before the first one."""
    return max((pod.attempt for pod in pods), default=PREPARE_ATTEMPT)
