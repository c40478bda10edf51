"""The failures of nodes that the statuses of all QLoRAJobs show, in memory; reconciles fill it again after a start."""

from collections.abc import Sequence
from datetime import datetime

from qlora_api.job_ref import JobRef
from qlora_api.v1alpha1 import Attempt
from qlora_operator.lifecycle import NodeFailure, node_failures, quarantined_nodes, recent_failures


class NodeFailures:
    """The recent failures of nodes by QLoRAJob; those of a deleted one count until they are old."""

    def __init__(self) -> None:
        self._failures: dict[JobRef, tuple[NodeFailure, ...]] = {}

    def update(self, run: JobRef, attempts: Sequence[Attempt]) -> None:
        """Replace the failures of a run."""
        if failures := node_failures(run, attempts):
            self._failures[run] = failures

    def quarantined(self, now: datetime) -> dict[str, datetime]:
        """Return the nodes that no run uses for now, and until when; forget the runs whose failures are all old."""
        self._failures = {
            run: kept for run, failures in self._failures.items() if (kept := recent_failures(failures, now))
        }
        return quarantined_nodes((failure for failures in self._failures.values() for failure in failures), now)
