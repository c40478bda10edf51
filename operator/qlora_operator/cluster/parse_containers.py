"""Parses the containers of a pod: the trainer's own, and those that others put before it."""

from collections.abc import Mapping
from typing import Any, Final

from qlora_api import names
from qlora_operator.cluster.parse_time import parse_time
from qlora_operator.models import Exit, InitContainer, Waiting

Json = Mapping[str, Any]

_KINDS: Final = ("containers", "initContainers", "ephemeralContainers")
"""Fields of a pod's spec with containers that share the kubelet's limit of termination messages."""


def count_containers(pod: Json) -> int:
    """Return how many containers a pod has."""
    return sum(len(pod["spec"].get(kind) or ()) for kind in _KINDS)


def container_state(status: Json) -> Json:
    """Return the state of the trainer's container."""
    states = (
        container.get("state", {})
        for container in status.get("containerStatuses") or ()
        if container["name"] == names.CONTAINER
    )
    return next(states, {})


def parse_init(status: Json) -> InitContainer | None:
    """Return the first init container that has neither succeeded nor, as a sidecar does, started to stay."""
    found = map(_parse_init_status, status.get("initContainerStatuses") or ())
    return next(filter(None, found), None)


def _parse_init_status(container: Json) -> InitContainer | None:
    state = container.get("state") or {}
    exit_, waiting = parse_exit(state.get("terminated")), parse_waiting(state.get("waiting"))
    if (exit_ is not None and exit_.code == 0) or ("running" in state and container.get("started")):
        return None
    last = parse_exit((container.get("lastState") or {}).get("terminated"))
    running = "running" in state or last is not None
    # The kubelet reports a container that waits for the one before it, or for volumes, as PodInitializing.
    why = f"{waiting.reason} {waiting.message}".strip() if waiting and waiting.reason != "PodInitializing" else ""
    if not (running or why or exit_):
        return None
    restarted = f"; it exited with code {last.code} before" if last is not None and why else ""
    return InitContainer(container["name"], f"{why}{restarted}", running=running, exit=exit_)


def parse_waiting(state: Json | None) -> Waiting | None:
    """Parse why a container has not started."""
    return Waiting(state.get("reason", ""), state.get("message", "")) if state else None


def parse_exit(state: Json | None) -> Exit | None:
    """Parse how a container ended."""
    if not state:
        return None
    return Exit(
        state["exitCode"], state.get("reason", ""), state.get("message", ""), parse_time(state.get("finishedAt"))
    )
