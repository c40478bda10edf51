"""Chooses the QLoRAClass of a run: the one that it names, or the default class of its namespace."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Final

from pydantic import ValidationError

from qlora_api.names import CLASS_KIND, Phase
from qlora_api.qlora_class import ClassNamespaces, QLoRAClassSpec, settings_of
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import ClassStatus, Preparation
from qlora_operator.lifecycle.prepare_retries import LONGEST_PAUSE, describe_retries, next_try, retry_time
from qlora_operator.models import Action, Classes, Decision, Job, RawClass

MAX_CLASS_BYTES: Final = 65_536
"""Longest settings of a class, as JSON: each run that uses it has a copy in its status."""


class ClassNotReadyError(Exception):
    """The class of a run cannot be used now; the message names field, cause and fix."""


def choose_class(job: Job, classes: Classes, labels: Mapping[str, str] | None) -> ClassStatus | None:
    """Return the class that the next Job of a run has its settings from; None without one.

    A run that was planned without a class stays without one, whatever class becomes the default.

    Args:
        job: The run.
        classes: The classes of the cluster.
        labels: Labels of its namespace; None if they cannot be read.

    Raises:
        ClassNotReadyError: The class does not exist, is invalid, or is not for this namespace.

    """
    recorded = job.status.used_class
    name = job.spec.class_name or (recorded.name if recorded else None)
    if name is None:
        found = None if job.status.plan else _find_default(classes, job.ref.namespace, labels)
        return _use(found) if found else None
    if classes.unreadable:
        raise ClassNotReadyError(f"spec.className: {CLASS_KIND} {name} cannot be read: {classes.unreadable}")
    found = next((known for known in classes.items if known.name == name), None)
    if found is None:
        raise ClassNotReadyError(f"spec.className: {CLASS_KIND} {name} does not exist; create it")
    used = _use(found)
    _check_namespace(found, job.ref.namespace, labels)
    return used


def _use(found: RawClass) -> ClassStatus:
    try:
        settings = settings_of(QLoRAClassSpec.model_validate(found.spec))
    except ValidationError as error:
        raise ClassNotReadyError(f"spec.className: {_describe(found.name, error)}") from error
    if len(json.dumps(settings)) > MAX_CLASS_BYTES:
        raise ClassNotReadyError(
            f"spec.className: {CLASS_KIND} {found.name} has more than {MAX_CLASS_BYTES // 1024} KiB; move what is long "
            "into a ConfigMap"
        )
    return ClassStatus(name=found.name, generation=found.generation, settings=settings)


def _describe(name: str, error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(("spec", *map(str, first["loc"])))
    if first["type"] == "extra_forbidden":
        return f"{CLASS_KIND} {name} has {field}, which this operator does not know; remove it, or upgrade the operator"
    return f"{CLASS_KIND} {name} is invalid: {field}: {first['msg'].removeprefix('Value error, ')}; correct it"


def _check_namespace(found: RawClass, namespace: str, labels: Mapping[str, str] | None) -> None:
    allowed = ClassNamespaces.model_validate(found.spec.get("namespaces") or {})
    unknown = allowed.selector is not None and labels is None  # which no selector matches, DoesNotExist neither
    if namespace in allowed.names if unknown else allowed.allow(namespace, labels or {}):
        return
    cause = f"{CLASS_KIND} {found.name} is not for namespace {namespace}"
    if unknown:
        cause = (
            f"{cause}: the operator may not read its labels (get namespaces), so that only spec.namespaces.names count"
        )
    raise ClassNotReadyError(f"spec.className: {cause}; add the namespace to spec.namespaces of the class")


def _find_default(classes: Classes, namespace: str, labels: Mapping[str, str] | None) -> RawClass | None:
    """Return the newest default class that a namespace may use; of two that are as new, the first by name."""
    by_name = sorted((known for known in classes.items if known.is_default), key=lambda known: known.name)
    newest_first = sorted(by_name, key=lambda known: known.created_at, reverse=True)
    return next((known for known in newest_first if _is_for(known, namespace, labels)), None)


def _is_for(found: RawClass, namespace: str, labels: Mapping[str, str] | None) -> bool:
    """Return whether a namespace may use a class; one whose namespaces cannot be read is for none."""
    try:
        _check_namespace(found, namespace, labels)
    except (ClassNotReadyError, ValidationError):
        return False
    return True


def needs_namespace_labels(classes: Classes) -> bool:
    """Return whether a class selects namespaces by their labels."""
    found = (known.spec.get("namespaces") for known in classes.items)
    return any(isinstance(namespaces, Mapping) and namespaces.get("selector") is not None for namespaces in found)


def without_wait(job: Job) -> Job:
    """Return a run as if it had not waited for its class, so that preparation can begin."""
    if not _waits(job):
        return job
    return replace(job, status=job.status.model_copy(update={"preparation": Preparation(number=_number(job))}))


def _waits(job: Job) -> bool:
    """Return whether the run waits for its class; a prepare pod that says so by its message has another phase."""
    preparation = job.status.preparation
    waits = preparation is not None and preparation.reason is Reason.CLASS_NOT_READY
    return waits and job.status.phase is Phase.PENDING


def _number(job: Job) -> int:
    return job.status.preparation.number if job.status.preparation else 1


def end_wait(decision: Decision, job: Job) -> Decision:
    """Return a decision that no longer waits for the class, so that the status does not either."""
    if not _waits(job) or decision.preparation is not None:
        return decision
    return replace(decision, preparation=Preparation(number=_number(job)))


def depends_on_class(decision: Decision) -> bool:
    """Return whether a decision needs the settings of the class: it creates a Job, or records a plan."""
    return decision.action in {Action.PREPARE, Action.TRAIN} or decision.plan is not None


def wait_for_class(job: Job, problem: str, now: datetime) -> Decision:
    """Wait for a class as for a missing Secret, until spec.deadlines.startup; a run that has a plan waits longer.

    Nothing is held meanwhile.
    """
    now = now.replace(microsecond=0)
    waited = job.status.preparation if _waits(job) else None
    if waited is not None and waited.retry_at is not None and now < waited.retry_at:
        return _waiting(job, waited.model_copy(update={"message": problem}))
    # Time without an operator is no patience.
    late = next_try(waited, now) if waited is not None else Preparation()
    failed = Preparation(
        number=_number(job),
        failures=late.failures + 1,
        reason=Reason.CLASS_NOT_READY,
        message=problem,
        missing_since=late.missing_since or now,
    )
    retry_at = retry_time(job, failed, now)
    if retry_at is None and job.status.plan is None:
        message = (
            f"{problem}; it was waited for since {failed.missing_since:%Y-%m-%d %H:%M} UTC (spec.deadlines.startup)"
        )
        return Decision(Phase.FAILED, Reason.CLASS_NOT_READY, message, preparation=Preparation(number=_number(job)))
    return _waiting(job, failed.model_copy(update={"retry_at": retry_at or now + LONGEST_PAUSE}))


def _waiting(job: Job, failed: Preparation) -> Decision:
    message = describe_retries(job, failed) if job.status.plan is None else failed.message
    return Decision(Phase.PENDING, Reason.CLASS_NOT_READY, message, preparation=failed, requeue_at=failed.retry_at)
