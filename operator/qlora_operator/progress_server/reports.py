"""The last progress report of every running job, and how it is read from the protocol's strings."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

from pydantic import ValidationError

from qlora_api.job_ref import JobRef
from qlora_api.names import Phase
from qlora_api.progress import MAX_COUNT, ProgressReport
from qlora_api.v1alpha1 import Checkpoint, ManifestRef, Progress
from qlora_api.v1alpha1.patterns import PRINTABLE

QUIET: Final = timedelta(minutes=5)
"""Trainers report every 5 s: a namespace that was quiet for so long could not reach the operator, or had no trainer."""
STATUS_INTERVAL: Final = timedelta(seconds=5)
"""Shortest time between two writes of a status that only progress causes."""
LONGEST_STATUS_INTERVAL: Final = timedelta(minutes=1)
STATUS_WRITES: Final = 20.0
"""Such writes a second of all runs: from a hundred runs on each is written less often, so that the API server, and
everyone who watches QLoRAJobs, has no more to do for a thousand."""
REPORTED_PHASES: Final = frozenset({Phase.TRAINING, Phase.EVALUATING, Phase.PUBLISHING})


class ReportStore:
    """The last report of every running job, in memory."""

    def __init__(self) -> None:
        self._last: dict[JobRef, tuple[Progress, str | None]] = {}
        self._reporting: dict[JobRef, datetime] = {}
        self._received_at: dict[str, datetime] = {}
        self._resumed_at: dict[str, datetime] = {}
        self._refused_at: dict[JobRef, datetime] = {}
        self._status_at: dict[JobRef, datetime] = {}
        """When the status of each run was, or will be, brought up to date."""

    def get(self, ref: JobRef) -> Progress | None:
        """Return the last report."""
        return self._last.get(ref, (None, None))[0]

    def job_uid(self, ref: JobRef) -> str | None:
        """Return the uid of the QLoRAJob whose pod sent the last report."""
        return self._last.get(ref, (None, None))[1]

    def put(self, ref: JobRef, report: Progress, job_uid: str | None = None) -> None:
        """Replace the last report."""
        self._last[ref] = (report, job_uid)
        self._reporting[ref] = report.updated_at
        received_at = self._received_at.get(ref.namespace)
        if received_at is None or report.updated_at - received_at >= QUIET:
            self._resumed_at[ref.namespace] = report.updated_at
        self._received_at[ref.namespace] = report.updated_at

    def note_refused(self, ref: JobRef, at: datetime) -> None:
        """Note a report that was refused although its token names a pod of the run."""
        self._refused_at[ref] = at

    def refused_at(self, ref: JobRef) -> datetime | None:
        """Return when such a report was refused last; None if none was."""
        return self._refused_at.get(ref)

    def time_to_status(self, ref: JobRef, now: datetime, *, urgent: bool) -> timedelta:
        """Return the time until the status of a run is to show its last report; urgent ones do not wait for others."""
        interval = STATUS_INTERVAL if urgent else self._status_interval()
        last = self._status_at.get(ref, now - interval)
        due = min(last, now + interval) if last > now else max(now, last + interval)
        self._status_at[ref] = due
        return due - now

    def _status_interval(self) -> timedelta:
        """Return the time between two writes of one status: the runs that report share STATUS_WRITES."""
        shared = timedelta(seconds=len(self._reporting) / STATUS_WRITES)
        return min(max(STATUS_INTERVAL, shared), LONGEST_STATUS_INTERVAL)

    def expect(self, ref: JobRef, reported_at: datetime) -> None:
        """Expect further reports of a run whose last one an earlier operator process received."""
        self._reporting.setdefault(ref, reported_at)

    def set_idle(self, ref: JobRef) -> None:
        """Expect no further report of a run, until one arrives: none of its pods trains."""
        self._reporting.pop(ref, None)

    def others(self, ref: JobRef) -> tuple[datetime, ...]:
        """Return when each of the other QLoRAJobs of a namespace that should report last did."""
        return tuple(
            reported_at
            for other, reported_at in self._reporting.items()
            if other.namespace == ref.namespace and other != ref
        )

    def resumed_at(self, namespace: str) -> datetime | None:
        """Return when reports of a namespace arrived first, or again after it was quiet; None if none did."""
        return self._resumed_at.get(namespace)

    def forget(self, ref: JobRef) -> None:
        """Drop the report of a run that is over."""
        self._last.pop(ref, None)
        self._refused_at.pop(ref, None)
        self._status_at.pop(ref, None)
        self.set_idle(ref)


def read_report(report: ProgressReport, now: datetime) -> Progress:
    """Convert a report, whose numbers are strings on the wire; values that cannot be parsed are left out."""
    status = report.trainer_status
    metrics = {metric.name: metric.value for metric in status.metrics}
    speed = _to_float(metrics, "tokens_per_second")
    phase = metrics.get("phase")
    return Progress(
        percent=status.progress_percentage or 0,
        step=_to_int(metrics, "current_step"),
        total_steps=_to_int(metrics, "total_steps"),
        remaining_seconds=status.estimated_remaining_seconds,
        loss=_to_float(metrics, "loss"),
        tokens_per_second=speed if speed is not None and speed >= 0 else None,
        phase=Phase(phase) if phase in REPORTED_PHASES else None,
        checkpoint=_to_checkpoint(metrics),
        manifest=_to_manifest(metrics),
        updated_at=now.replace(microsecond=0),
    )


def _to_float(metrics: Mapping[str, str], name: str) -> float | None:
    try:
        number = float(metrics[name])
    except (KeyError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _to_int(metrics: Mapping[str, str], name: str) -> int | None:
    number = _to_float(metrics, name)
    return int(number) if number is not None and 0 <= number <= MAX_COUNT else None


def _to_checkpoint(metrics: Mapping[str, str]) -> Checkpoint | None:
    values = {
        name: value for name in Checkpoint.model_fields if (value := metrics.get(f"checkpoint_{name}")) is not None
    }
    try:
        checkpoint = Checkpoint.model_validate(values)
        checkpoint.time.astimezone(UTC)
    except (ValidationError, OverflowError):
        return None
    # A time without its timezone is ambiguous.
    usable = checkpoint.time.tzinfo and checkpoint.step <= MAX_COUNT and PRINTABLE.matches(checkpoint.uri)
    return checkpoint if usable else None


def _to_manifest(metrics: Mapping[str, str]) -> ManifestRef | None:
    try:
        manifest = ManifestRef(uri=metrics["manifest_uri"], digest=metrics["manifest_digest"])
    except (KeyError, ValidationError):
        return None
    return manifest if PRINTABLE.matches(manifest.uri) else None
