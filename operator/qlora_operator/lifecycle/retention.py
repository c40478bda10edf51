"""What is deleted of a run that has ended, and when: spec.ttl, and the retention of the installation."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from qlora_api.v1alpha1 import QLoRAJobStatus, to_timedelta
from qlora_api.v1alpha1.types import Duration
from qlora_operator.lifecycle.budgets import LONGEST_WAIT
from qlora_operator.lifecycle.leftovers import leftover_jobs
from qlora_operator.models import ChildJob, Observation, Retention

_DURATION: Final[TypeAdapter[str]] = TypeAdapter(Duration)


def children_expire_at(spec: Mapping[str, Any], status: QLoRAJobStatus, retention: Retention) -> datetime | None:
    """Return when the children of a finished run are deleted; None if neither spec, class nor installation has a ttl.

    Only spec.ttl is read, so that a run whose spec is invalid expires too.
    """
    class_settings = status.used_class.settings if status.used_class else {}
    return _after_end(status, _own_ttl(spec) or _own_ttl(class_settings) or retention.ttl)


def job_expires_at(status: QLoRAJobStatus, retention: Retention) -> datetime | None:
    """Return when a finished QLoRAJob itself is deleted; None if the installation keeps them."""
    return _after_end(status, retention.jobs)


def _own_ttl(spec: Mapping[str, Any]) -> timedelta | None:
    try:
        return to_timedelta(_DURATION.validate_python(spec.get("ttl")))
    except ValidationError:
        return None


def _after_end(status: QLoRAJobStatus, age: timedelta | None) -> datetime | None:
    if age is None or status.finished_at is None:
        return None
    return status.finished_at + min(age, LONGEST_WAIT)


def jobs_to_delete(children: Observation, status: QLoRAJobStatus, now: datetime, *, expired: bool) -> list[ChildJob]:
    """Return the Jobs of a finished run to delete: all after expiry, before that those that outlive it."""
    jobs = children.jobs if expired else leftover_jobs(status, children, now)
    return [child for child in jobs if not child.deleting]
