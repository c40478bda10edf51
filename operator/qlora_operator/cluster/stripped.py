"""Jobs and pods from which somebody removed the labels or the owner reference by which the operator finds them.

They train on, while their run appears to have lost them.
"""

from datetime import datetime
from typing import Final

from qlora_api import names
from qlora_operator.cluster.parse import Json, controller_uid, created_at, labels_of, pod_labels_of
from qlora_operator.cluster.tolerant import parse_or_skip
from qlora_operator.models import Manifest

_IDENTITY: Final = frozenset({names.MANAGED_BY_LABEL, names.JOB_LABEL, names.ROLE_LABEL, *names.NUMBER_LABELS.values()})
"""Labels that a Job and its pods have alike."""

CONTROLLER_UID_LABEL: Final = "batch.kubernetes.io/controller-uid"
"""Label of the pods of a Job, with its uid."""


def find_podless(jobs: Json, pods: Json) -> list[str]:
    """Return the uids of Jobs that have pods, none of which is in a list of pods by the operator's label."""
    owners = {parse_or_skip("Pod", controller_uid, pod) for pod in pods.get("items") or ()}
    active = (parse_or_skip("Job", _uid_if_active, job) for job in jobs.get("items") or ())
    return [uid for uid in active if uid and uid not in owners]


def _uid_if_active(job: Json) -> str | None:
    return str(job["metadata"]["uid"]) if (job.get("status") or {}).get("active") else None


def build_restoration(existing: Json, job: Manifest, run_created_at: datetime) -> Manifest | None:
    """Return the patch that restores the metadata of a Job; None if it lacks nothing, or is another Job.

    What tells is the template of its pods, which cannot be changed, and its age: a Job of an earlier QLoRAJob with the
    same name, deleted without its children, has no owner either.

    Args:
        existing: The Job that has the name.
        job: The manifest with the labels and the owner reference that it was created with.
        run_created_at: When its QLoRAJob was created.

    """
    metadata, expected = existing["metadata"], job["metadata"]
    controller, [owner] = controller_uid(existing), expected["ownerReferences"]
    created_with = pod_labels_of(existing)
    identity = {name: value for name, value in expected["labels"].items() if name in _IDENTITY}
    is_another = (
        "deletionTimestamp" in metadata
        or created_at(existing) < run_created_at
        or controller not in {None, owner["uid"]}
        or any(created_with.get(name) != value for name, value in identity.items())
    )
    labels = {name: value for name, value in identity.items() if labels_of(existing).get(name) != value}
    if is_another or (controller and not labels):
        return None
    owners = {} if controller else {"ownerReferences": [*(metadata.get("ownerReferences") or ()), owner]}
    version = {name: metadata[name] for name in ("namespace", "name", "uid", "resourceVersion")}
    return {"apiVersion": job["apiVersion"], "kind": job["kind"], "metadata": {**version, "labels": labels, **owners}}
