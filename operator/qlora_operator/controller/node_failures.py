"""The failures of nodes that the statuses of all QLoRAJobs show, in memory; reconciles fill it again after a start."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from qlora_api.job_ref import JobRef
from qlora_api.v1alpha1 import Attempt, Checkpoint
from qlora_operator.lifecycle import (
    NodeFailure,
    NodeStart,
    is_recent,
    node_failures,
    node_starts,
    quarantine_ends,
)

RECOMPUTED: Final = timedelta(minutes=1)
"""Without a new failure, time alone changes the result within hours."""


class NodeFailures:
    """The recent failures of nodes by QLoRAJob; those of a deleted one count until they are old."""

    def __init__(self) -> None:
        self._failures: dict[JobRef, tuple[NodeFailure, ...]] = {}
        self._starts: dict[JobRef, tuple[NodeStart, ...]] = {}
        self._ends: dict[str, datetime] = {}
        self._computed_at: datetime | None = None
        """None: a failure was added since."""

    def update(self, run: JobRef, attempts: Sequence[Attempt], checkpoint: Checkpoint | None = None) -> None:
        """Replace the failures of a run."""
        failures, starts = node_failures(run, attempts, checkpoint), node_starts(run, attempts)
        if failures and failures != self._failures.get(run):
            self._failures[run], self._computed_at = failures, None
        if starts and starts != self._starts.get(run):
            self._starts[run] = starts

    def quarantined(self, now: datetime) -> dict[str, datetime]:
        """Return the nodes that no run uses for now, and until when."""
        return {node: end for node, end in self.quarantine_ends(now).items() if now < end}

    def quarantine_ends(self, now: datetime) -> dict[str, datetime]:
        """Return the nodes that were quarantined lately, and until when; forget the runs whose failures are all old."""
        if self._computed_at is None or now - self._computed_at >= RECOMPUTED or now < self._computed_at:
            self._forget_old(now)
            failures = [failure for failures in self._failures.values() for failure in failures]
            starts = [start for starts in self._starts.values() for start in starts]
            self._ends, self._computed_at = quarantine_ends(failures, now, starts), now
        return self._ends

    def _forget_old(self, now: datetime) -> None:
        self._failures = {
            run: kept
            for run, failures in self._failures.items()
            if (kept := tuple(failure for failure in failures if is_recent(failure.at, now)))
        }
        self._starts = {
            run: recent
            for run, starts in self._starts.items()
            if (recent := tuple(start for start in starts if is_recent(start.at, now)))
        }
