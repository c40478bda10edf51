"""The pods of a run: the attempt and node of each, and whether its container has started."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.logs.files import PREPARE_ATTEMPT
from qlora_cli.cluster.client import ClusterClient, KubeObject

_INDEX: Final = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True, order=True)
class TrainerPod:
    """A pod of a run."""

    attempt: int
    """0 for preparation."""
    node: int
    """Its index in the attempt."""
    name: str
    started: bool
    """Whether its container has started; before that there is no log."""

    @property
    def label(self) -> str:
        """Return attempt and node, the prefix of each line."""
        return "prepare" if self.attempt == PREPARE_ATTEMPT else f"{self.attempt}-{self.node}"


def find_pods(cluster: ClusterClient, ref: JobRef) -> list[TrainerPod]:
    """Return the pods of a QLoRAJob, sorted by attempt and node."""
    return sorted(map(parse_pod, cluster.pods(ref)))


def parse_pod(raw: KubeObject) -> TrainerPod:
    """Parse a pod."""
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
    """Return whether a pod has not terminated."""
    return raw.get("status", {}).get("phase") not in {"Succeeded", "Failed"}


def latest_attempt(pods: Sequence[TrainerPod]) -> int:
    """Return the latest attempt that has pods; PREPARE_ATTEMPT if no attempt has any."""
    return max((pod.attempt for pod in pods), default=PREPARE_ATTEMPT)
