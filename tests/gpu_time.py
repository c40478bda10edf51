"""Compares what a status accounts of GPU time with the times of the pods themselves, as their kubelets wrote them."""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from qlora_api import names
from qlora_api.v1alpha1.usage import PARTS

TOLERANCE: Final = timedelta(seconds=1)
"""For each attempt: the times of Kubernetes are whole seconds."""


def check_gpu_time(status: Mapping[str, Any], pods: Iterable[Mapping[str, Any]]) -> None:
    """Compare each attempt of a run that holds nothing any more with its pods.

    The Job controller deletes the other pods of an attempt of which one has failed: they held more than can be seen.
    """
    every = tuple(pods)
    for attempt in status["attempts"]:
        usage, number = attempt["usage"], str(attempt["number"])
        own = [pod for pod in every if pod["metadata"]["labels"].get(names.ATTEMPT_LABEL) == number]
        held = sum((_held(pod) for pod in own), timedelta(0))
        accounted = timedelta(seconds=usage["podSeconds"])
        complete = len(own) == status["plan"]["nodes"]
        assert accounted >= held - TOLERANCE, f"attempt {number}: {accounted} accounted, {held} held"
        assert accounted <= held + TOLERANCE or not complete, f"attempt {number}: {accounted} accounted, {held} held"
        assert usage["held"] == usage["podSeconds"] * usage["gpusPerPod"] == sum(usage[part] for part in PARTS)
        assert usage["holding"] == []
    for name in ("podSeconds", "held", *PARTS):
        assert status["usage"][name] == sum(attempt["usage"][name] for attempt in status["attempts"]), name
    assert status["gpus"] == 0


def _held(pod: Mapping[str, Any]) -> timedelta:
    """Return how long a pod held its node: from its binding to the end of its last container."""
    [bound] = [
        condition["lastTransitionTime"]
        for condition in pod["status"]["conditions"]
        if condition["type"] == "PodScheduled" and condition["status"] == "True"
    ]
    ends = [
        container["state"]["terminated"]["finishedAt"]
        for kind in ("containerStatuses", "initContainerStatuses")
        for container in pod["status"].get(kind, ())
    ]
    return datetime.fromisoformat(max(ends)) - datetime.fromisoformat(bound)
