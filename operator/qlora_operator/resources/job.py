"""The batch/v1 Jobs: one for prepare, one per training attempt."""

from collections.abc import Sequence

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.names import Role
from qlora_api.v1alpha1 import Preparation, QLoRAJobSpec, QueueSpec
from qlora_operator.models import AttemptInputs, ChildJob, Manifest
from qlora_operator.resources.metadata import (
    ChildWorkload,
    Installation,
    Owner,
    build_labels,
    build_metadata,
    prepare_workload,
    train_workload,
)
from qlora_operator.resources.placement import replace_avoided_nodes
from qlora_operator.resources.pod import build_prepare_pod, build_train_pod
from qlora_operator.resources.profile import apply_profile


def build_prepare_job(
    owner: Owner, spec: QLoRAJobSpec, installation: Installation, preparation: Preparation | None = None
) -> Manifest:
    """Return the Job that checks model, dataset and output without a GPU; by default the first one."""
    current = preparation or Preparation()
    workload = prepare_workload(owner, current.number)
    pod = build_prepare_pod(workload, spec, installation, current.avoided_nodes)
    return _build(workload, pod, installation)


def build_train_job(owner: Owner, spec: QLoRAJobSpec, run: AttemptInputs, installation: Installation) -> Manifest:
    """Return the Job of one training attempt: a gang of one pod per node."""
    workload, plan = train_workload(owner, run.attempt), run.plan
    pod = build_train_pod(workload, spec, run, installation)
    job = _build(workload, pod, installation, plan.nodes)
    return _queue(job, spec.queue) if spec.queue else job


def build_job_identity(owner: Owner, role: Role, number: int) -> Manifest:
    """Return the kind and the metadata of a Job, by which the operator finds it."""
    workload = prepare_workload(owner, number) if role is Role.PREPARE else train_workload(owner, number)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": build_metadata(workload)}


def _queue(job: Manifest, queue: QueueSpec) -> Manifest:
    """Return the Job suspended until Kueue admits it; without a queue controller it waits, and holds nothing."""
    metadata = {**job["metadata"], "labels": {**job["metadata"]["labels"], **_queue_labels(queue)}}
    return {**job, "metadata": metadata, "spec": {"suspend": True, **job["spec"]}}


def _queue_labels(queue: QueueSpec) -> dict[str, str]:
    return {
        names.QUEUE_LABEL: queue.name,
        **({names.PRIORITY_CLASS_LABEL: queue.priority_class} if queue.priority_class else {}),
    }


def build_queue_labels(ref: JobRef, child: ChildJob, queue: QueueSpec) -> Manifest:
    """Return the patch that puts a suspended Job into the queue of its run; Kueue accepts it until it admits the Job.

    A prepare Job is only in a queue where one manages all Jobs (manageJobsWithoutQueueName), so that elsewhere a
    manifest is checked at once, and the check takes nothing of the queue's quota.
    """
    patch = _build_patch(ref, child)
    return {**patch, "metadata": {**patch["metadata"], "labels": _queue_labels(queue)}}


def build_deadline(ref: JobRef, child: ChildJob, seconds: int | None) -> Manifest:
    """Return the merge patch of activeDeadlineSeconds; None removes it."""
    return {**_build_patch(ref, child), "spec": {"activeDeadlineSeconds": seconds}}


def build_avoided_nodes(ref: JobRef, child: ChildJob, nodes: Sequence[str]) -> Manifest:
    """Return the merge patch of the nodes that a suspended Job avoids; the rest of its node affinity stays."""
    terms = replace_avoided_nodes(child.node_terms, nodes)
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms} if terms else None}
    pod = {"affinity": {"nodeAffinity": required}}
    return {**_build_patch(ref, child), "spec": {"template": {"spec": pod}}}


def _build_patch(ref: JobRef, child: ChildJob) -> Manifest:
    """Return a patch without changes; with the uid, the API server refuses it for another Job that has the name now."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": child.name, "namespace": ref.namespace, "uid": child.uid},
    }


def _build(workload: ChildWorkload, pod: Manifest, installation: Installation, pods: int = 1) -> Manifest:
    """Return a Job whose pods are never restarted: the operator, not the Job controller, decides on retries.

    It has no deadline until a container runs (`lifecycle.job_deadline`).
    """
    label = {names.CLASS_LABEL: installation.used_class} if installation.used_class else {}
    metadata = build_metadata(workload)
    template = {"metadata": {"labels": build_labels(workload) | label}, "spec": pod}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata | {"labels": metadata["labels"] | label},
        "spec": {
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "template": apply_profile(template, installation.pods, workload.role),
        },
    }
