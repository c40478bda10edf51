"""A snapshot of a namespace, without what differs between two runs of the same scenario."""

import difflib
import json
import re
from typing import Any, Final

from tests.integration.operator_process import JobNamespace

KINDS: Final = ("qlorajobs", "jobs", "configmaps", "services", "events")
TRANSIENT_REASONS: Final = frozenset({"Preparing", "Scheduling", "Unschedulable"})
"""Reasons of short-lived states, which not every run reports; every other Event records a step."""
_RANDOM_KEYS: Final = frozenset({"uid", "resourceVersion", "managedFields", "clusterIP", "clusterIPs"})
_DURATIONS: Final = frozenset({"activeDeadlineSeconds", "containerSeconds", "podSeconds"})
"""They count seconds, which two runs do not take alike."""
_MASKS: Final = (
    (re.compile(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"), "<time>"),
    (re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "<uid>"),
    (re.compile(r"(?<=-\d)-[a-z0-9]{5}\b"), "-<suffix>"),
)


def take_snapshot(job_namespace: JobNamespace) -> dict[str, Any]:
    """Return the QLoRAJob, its children without what Kubernetes' controllers write, and the reasons of its Events."""
    items = [item for kind in KINDS for item in job_namespace.items(kind)]
    objects = {f"{item['kind']}/{item['metadata']['name']}": item for item in items if _is_ours(item)}
    reasons = sorted({event["reason"] for event in items if event["kind"] == "Event" and _is_step_event(event)})
    return {
        "events": reasons,
        **{name: mask(_own_part(item), job_namespace.namespace) for name, item in objects.items()},
    }


def _is_ours(item: dict[str, Any]) -> bool:
    return str(item["kind"]) != "Event" and str(item["metadata"]["name"]) != "kube-root-ca.crt"


def _is_step_event(event: dict[str, Any]) -> bool:
    return event["regarding"]["kind"] == "QLoRAJob" and event["reason"] not in TRANSIENT_REASONS


def _own_part(item: dict[str, Any]) -> dict[str, Any]:
    """Drop the status of a Job, which its controller may still change."""
    return {key: value for key, value in item.items() if key != "status" or item["kind"] == "QLoRAJob"}


def mask(value: Any, namespace: str) -> Any:
    """Replace times, uids, names of pods and the namespace."""
    if isinstance(value, dict):
        return {key: mask(entry, namespace) for key, entry in value.items() if key not in _RANDOM_KEYS | _DURATIONS}
    if isinstance(value, list):
        return [mask(entry, namespace) for entry in value]
    if not isinstance(value, str):
        return value
    text = value.replace(namespace, "<namespace>")
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    return text


def compare(expected: dict[str, Any], left: dict[str, Any]) -> list[str]:
    """Return the lines in which two snapshots differ."""
    before, after = (json.dumps(entry, indent=1, sort_keys=True).splitlines() for entry in (expected, left))
    lines = difflib.unified_diff(before, after, n=0, lineterm="")
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]
