"""How long a pod on a node waits for its volumes: a ConfigMap that somebody deleted keeps it there, with its GPUs."""

from datetime import datetime, timedelta
from typing import Final

from qlora_operator.lifecycle.exit_reasons import LONGEST_EVENT_LOOKUP
from qlora_operator.models import ChildJob

VOLUMES_TIME: Final = timedelta(minutes=1)
"""A kubelet mounts ConfigMaps within seconds after a pod was bound to its node; an image may take longer."""
_CONTAINER_CREATING: Final = "ContainerCreating"
"""Reason of a container that waits for volumes, sandbox or image (pkg/kubelet, kubelet_pods.go)."""


def waits_for_volumes(child: ChildJob | None, now: datetime) -> bool:
    """Return whether a pod has had its node for long, and its container does not exist."""
    since = _waiting_since(child)
    return since is not None and now >= since + VOLUMES_TIME


def next_volume_check(child: ChildJob | None, now: datetime) -> datetime | None:
    """Return when to check again what a pod mounts whose container does not exist: ever later."""
    since = _waiting_since(child)
    return now + min(max(now - since, VOLUMES_TIME), LONGEST_EVENT_LOOKUP) if since is not None else None


def _waiting_since(child: ChildJob | None) -> datetime | None:
    """Return when the first pod of a Job was bound whose container does not exist."""
    if child is None or child.finished or child.deleting or child.suspended:
        return None
    pods = [pod for pod in child.pods if pod.started_at is None and not (pod.ended or pod.deleting)]
    creating = [pod for pod in pods if pod.waiting is None or pod.waiting.reason == _CONTAINER_CREATING]
    return min((pod.scheduled_at for pod in creating if pod.scheduled_at is not None), default=None)
