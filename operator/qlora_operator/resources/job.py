"""The batch/v1 Jobs: one for prepare, one per training attempt."""

from datetime import timedelta

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.v1alpha1 import QLoRAJobSpec, QueueSpec
from qlora_operator.models import PREPARE_DEADLINE, AttemptInputs, ChildJob, Manifest
from qlora_operator.resources.metadata import (
    ChildWorkload,
    Installation,
    Owner,
    build_labels,
    build_metadata,
    prepare_workload,
    train_workload,
)
from qlora_operator.resources.pod import build_prepare_pod, build_train_pod


def build_prepare_job(owner: Owner, spec: QLoRAJobSpec, installation: Installation) -> Manifest:
    """Return the Job that checks model, dataset and output without a GPU."""
    workload = prepare_workload(owner)
    return _build(workload, build_prepare_pod(workload, spec, installation), PREPARE_DEADLINE)


def build_train_job(owner: Owner, spec: QLoRAJobSpec, run: AttemptInputs, installation: Installation) -> Manifest:
    """Return the Job of one training attempt: a gang of one pod per node."""
    workload, plan = train_workload(owner, run.attempt), run.plan
    pod = build_train_pod(workload, spec, run, installation)
    job = _build(workload, pod, timedelta(seconds=run.seconds_left), plan.nodes)
    return _queue(job, spec.queue) if spec.queue else job


def _queue(job: Manifest, queue: QueueSpec) -> Manifest:
    """Return the Job suspended until Kueue admits it; without a queue controller it waits, and holds nothing."""
    labels = {names.QUEUE_LABEL: queue.name}
    if queue.priority_class:
        labels[names.PRIORITY_CLASS_LABEL] = queue.priority_class
    metadata = {**job["metadata"], "labels": {**job["metadata"]["labels"], **labels}}
    return {**job, "metadata": metadata, "spec": {"suspend": True, **job["spec"]}}


def build_deadline(ref: JobRef, child: ChildJob, seconds: int) -> Manifest:
    """Return the patch of activeDeadlineSeconds, the one field of a running Job that follows the spec.

    With the uid, the API server refuses it for another Job that has the name by now.
    """
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": child.name, "namespace": ref.namespace, "uid": child.uid},
        "spec": {"activeDeadlineSeconds": seconds},
    }


def _build(workload: ChildWorkload, pod: Manifest, deadline: timedelta, pods: int = 1) -> Manifest:
    """Return a Job whose pods are never restarted: the operator, not the Job controller, decides on retries."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": build_metadata(workload),
        "spec": {
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "activeDeadlineSeconds": int(deadline.total_seconds()),
            "template": {
                "metadata": {"labels": build_labels(workload)},
                "spec": pod,
            },
        },
    }
