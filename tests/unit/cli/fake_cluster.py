"""A cluster in memory for the command line: what it answers is written down by the test."""

import io
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Attempt, Progress, QLoRAJobStatus
from qlora_cli.cluster.client import AlreadyExistsError, KubeObject, NotFoundError
from qlora_cli.cluster.jobs import ClusterJob, parse_job
from qlora_cli.cluster.polling import Clock
from qlora_operator.status.derive import to_wire
from tests.make import NOW, REF, UID, make_manifest, make_spec_manifest, merge

Answer = KubeObject | Exception


class FakeClusterClient:
    """A fake cluster: one QLoRAJob that changes with each read, its pods and its Events."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        """What each read returns; the last one is repeated."""
        self.events_found: list[KubeObject] = []
        self.pods_found: list[KubeObject] = []
        self.logs: dict[str, list[str]] = {}
        self.queries: list[tuple[str, Mapping[str, str]]] = []
        self.writes: list[tuple[str, Any]] = []

    def get(self, ref: JobRef) -> KubeObject:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        assert (answer["metadata"]["namespace"], answer["metadata"]["name"]) == ref
        return answer

    def list_jobs(self, namespace: str, selector: str = "") -> list[KubeObject]:
        assert selector == ""
        return [
            answer
            for answer in self.answers
            if not isinstance(answer, Exception) and namespace in {"", answer["metadata"]["namespace"]}
        ]

    def create(self, manifest: KubeObject, *, dry_run: bool = False) -> KubeObject:
        self.writes.append(("check" if dry_run else "create", manifest))
        if not dry_run and manifest["metadata"]["name"] == "taken":
            raise AlreadyExistsError("taken")
        return merge(make_raw(), manifest)

    def patch(self, ref: JobRef, change: KubeObject) -> KubeObject:
        self.writes.append(("patch", change))
        return merge(self.get(ref), change)

    def delete(self, ref: JobRef, uid: str) -> None:
        self.writes.append(("delete", (ref.name, uid)))
        self.answers = [*self.answers[:1], NotFoundError("gone")]

    def events(self, namespace: str) -> list[KubeObject]:
        assert namespace == REF.namespace
        return self.events_found

    def pods(self, ref: JobRef) -> list[KubeObject]:
        assert ref.namespace == REF.namespace
        return self.pods_found

    def log(self, namespace: str, pod: str, query: Mapping[str, str]) -> Iterator[str]:
        assert namespace == REF.namespace
        self.queries.append((pod, query))
        yield from self.logs[pod]


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.clock = Clock(lambda: self.seconds, self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.seconds += seconds


def make_raw(name: str = REF.name, status: QLoRAJobStatus | None = None, age: int = 600, **change: Any) -> KubeObject:
    """Return a QLoRAJob as the API server returns it, with an age in seconds at NOW."""
    metadata = {"uid": UID, "creationTimestamp": wire(NOW - timedelta(seconds=age)), "managedFields": []}
    raw = merge(make_manifest(name), {"metadata": metadata, "spec": make_spec_manifest(**change)})
    return raw | ({"status": to_wire(status)} if status else {})


def make_job(status: QLoRAJobStatus | None = None, **change: Any) -> ClusterJob:
    """The same, read."""
    return parse_job(make_raw(status=status, **change))


def make_status(phase: Phase, reason: Reason, **facts: Any) -> QLoRAJobStatus:
    """Return a status with the fields that a test needs."""
    return QLoRAJobStatus(phase=phase, reason=reason, message=f"{reason} it is", **facts)


def make_training(step: int, loss: float = 3.0) -> QLoRAJobStatus:
    """Return the status of a training that has done some of 100 steps."""
    report = Progress(
        percent=step, step=step, total_steps=100, remaining_seconds=(100 - step) * 2, loss=loss,
        tokens_per_second=350.0, phase=Phase.TRAINING, updated_at=NOW,
    )  # fmt: skip
    return make_status(Phase.TRAINING, Reason.TRAINING, attempt=1, last_report=report, progress=f"{step}%")


SUCCEEDED = make_status(Phase.SUCCEEDED, Reason.PUBLISHED, attempt=1, progress="100%")
FAILED = make_status(Phase.FAILED, Reason.DATASET_EMPTY)
SUSPENDED = make_status(Phase.SUSPENDED, Reason.SUSPENDED_BY_USER)


def make_ended(number: int, reason: Reason = Reason.NODE_LOST, message: str = "gone") -> Attempt:
    """An attempt that is over."""
    return Attempt(number=number, job=f"{REF.name}-{number}", reason=reason, message=message, node="node-1")


def make_pod(attempt: int, node: int = 0, *, started: bool = True) -> KubeObject:
    """Return a pod of an attempt; 0 is preparation."""
    name = f"{REF.name}-{attempt or 'prepare'}-{node}-abcde"
    labels = {names.JOB_LABEL: REF.name} | ({names.ATTEMPT_LABEL: str(attempt)} if attempt else {})
    state = {"running": {}} if started else {"waiting": {"reason": "ContainerCreating"}}
    annotations = {"batch.kubernetes.io/job-completion-index": str(node)}
    return {
        "metadata": {"name": name, "labels": labels, "annotations": annotations},
        "status": {"containerStatuses": [{"name": names.CONTAINER, "state": state}]},
    }


def make_event(subject: str, minutes: int, reason: str = "Training", **change: Any) -> KubeObject:
    """Return an Event about an object, some minutes after NOW."""
    kind, name = subject.split()
    event = {
        "metadata": {"uid": f"{subject}/{minutes}", "creationTimestamp": wire(NOW)},
        "involvedObject": {"kind": kind, "name": name}, "type": "Normal", "reason": reason, "message": "it happened",
        "eventTime": wire(NOW + timedelta(minutes=minutes)), "lastTimestamp": None,
    }  # fmt: skip
    return {**event, **change}


def wire(time: datetime) -> str:
    """A time as Kubernetes writes it."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class PlainConsole:
    """A console that is no terminal."""

    def __init__(self) -> None:
        self._file = io.StringIO()
        self.console = Console(file=self._file, width=100, highlight=False)

    @property
    def lines(self) -> list[str]:
        return self._file.getvalue().splitlines()


def render_to_lines(value: Any) -> list[str]:
    paper = PlainConsole()
    paper.console.print(value, soft_wrap=True)
    return [line.rstrip() for line in paper.lines]


def make_raws(*statuses: Any) -> list[Any]:
    return [make_raw(status=found) for found in statuses]
