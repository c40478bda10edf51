"""The Kubernetes Event of a transition, for `kubectl describe`."""

from datetime import datetime
from hashlib import sha256
from typing import Final

from qlora_api import names
from qlora_api.escapes import cut_escaped, escape_line
from qlora_api.names import Phase
from qlora_api.reasons import NORMAL_REASONS, Reason
from qlora_api.v1alpha1 import QLoRAJobStatus
from qlora_operator.models import Manifest
from qlora_operator.resources.metadata import Owner

MAX_NOTE_BYTES: Final = 1024
"""Maximum size of an Event's note in bytes."""
QUARANTINE_REASON: Final = "NodeQuarantined"
"""The Event's reason when a node has ended attempts of several runs."""
INSTALLATION_REASON: Final = "ServedByOtherInstallation"
"""The Event's reason when an installation leaves the QLoRAJobs of a namespace to another one."""
EVENT_ACTIONS: Final = {
    Phase.PENDING: "Accept",
    Phase.PREPARING: "Prepare",
    Phase.QUEUED: "Queue",
    Phase.SCHEDULING: "Schedule",
    Phase.TRAINING: "Train",
    Phase.EVALUATING: "Evaluate",
    Phase.PUBLISHING: "Publish",
    Phase.SUSPENDED: "Suspend",
    Phase.SUCCEEDED: "Succeed",
    Phase.FAILED: "Fail",
}
"""The Event's action, by the phase that the run enters."""


def event_type(reason: Reason) -> str:
    """Return Warning for a reason that fails a run, or hinders one that continues; else Normal."""
    return "Normal" if reason in NORMAL_REASONS else "Warning"


def build_event(owner: Owner, resource_version: str, status: QLoRAJobStatus, now: datetime) -> Manifest:
    """Return the Event of a transition; its name is derived from the transition, so a repeat is a no-op."""
    phase, reason = status.phase or Phase.PENDING, status.reason or Reason.ACCEPTED
    identity = "/".join((owner.uid, resource_version, phase, reason))
    texts = {"action": EVENT_ACTIONS[phase], "reason": reason.value, "type": event_type(reason)}
    return _build(owner, identity, status.message or "", now) | texts


def build_quarantine_event(owner: Owner, node: str, until: datetime, now: datetime) -> Manifest:
    """Return the Event of a node that is quarantined from now on; it regards the run that failed there last."""
    note = (
        f"node {node} ended attempts of several QLoRAJobs: no new attempt uses it until {until:%Y-%m-%d %H:%M} UTC; "
        "check its GPUs, driver, device plugin and network"
    )
    texts = {"action": "Quarantine", "reason": QUARANTINE_REASON, "type": "Warning"}
    return _build(owner, f"{owner.uid}/{node}/{until.isoformat()}", note, now) | texts


def build_installation_event(owner: Owner, own: str, note: str, now: datetime) -> Manifest:
    """Return the Event of an installation that leaves a namespace to another one; one for each QLoRAJob at most."""
    texts = {"action": "Leave", "reason": INSTALLATION_REASON, "type": "Warning"}
    return _build(owner, f"{owner.uid}/{own}/{INSTALLATION_REASON}", note, now) | texts


def _build(owner: Owner, identity: str, note: str, now: datetime) -> Manifest:
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {
            "name": f"{owner.ref.name}.{sha256(identity.encode()).hexdigest()[:16]}",
            "namespace": owner.ref.namespace,
        },
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": f"{names.GROUP}/{names.FIELD_MANAGER}",
        "reportingInstance": names.FIELD_MANAGER,
        "note": cut_escaped(escape_line(note), MAX_NOTE_BYTES, max_bytes=MAX_NOTE_BYTES),
        "regarding": {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "name": owner.ref.name,
            "namespace": owner.ref.namespace,
            "uid": owner.uid,
        },
    }
