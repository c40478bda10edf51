"""The settings that a run is decided with and its Jobs are built with: its own, its class's, and the installation's."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from typing import Final

from pydantic import ValidationError

from qlora_api.names import CLASS_KIND, Role
from qlora_api.pod_profile import PodProfile
from qlora_api.qlora_class import ClassSettings
from qlora_api.tolerant_reader import ignore_unknown
from qlora_api.v1alpha1 import ClassStatus, QLoRAJobSpec, QueueSpec
from qlora_operator.cluster.interface import Cluster
from qlora_operator.lifecycle import ReconcileContext
from qlora_operator.lifecycle.class_choice import ClassNotReadyError, choose_class, needs_namespace_labels
from qlora_operator.models import Job, Observation
from qlora_operator.resources import Installation, merge_profiles, training_placement

MAX_MERGED: Final = 256
"""Classes whose settings are kept merged with those of the installation."""


@dataclass(frozen=True)
class RunSettings:
    """A run, its installation and the context of a decision, with the settings of its class."""

    job: Job
    installation: Installation
    context: ReconcileContext
    used_class: ClassStatus | None = None
    """The class, if the run has one that can be used."""
    problem: str = ""
    """Why its class cannot be used; empty if it can, or if it has none."""


async def read_settings(
    job: Job, children: Observation, cluster: Cluster, installation: Installation, context: ReconcileContext
) -> RunSettings:
    """Return the settings for the next decision on a run.

    As long as a training Job exists, they are the recorded ones, so that a change of the class reaches the next attempt
    only. The recorded ones also serve when the class cannot be used any more.
    """
    recorded = job.status.used_class
    try:
        used = recorded if _trains(children) else await _read_class(job, cluster, context.now - job.created_at)
        return RunSettings(*apply_class(used, job, installation, context), used)
    except ClassNotReadyError as error:
        problem = str(error)
    try:
        settings = apply_class(recorded, job, installation, context)
    except ClassNotReadyError as error:
        return RunSettings(job, installation, context, problem=str(error))
    return RunSettings(*settings, recorded, "" if recorded else problem)


def _trains(children: Observation) -> bool:
    return any(child.role is Role.TRAIN and child.holds_resources for child in children.jobs)


async def _read_class(job: Job, cluster: Cluster, age: timedelta) -> ClassStatus | None:
    """Return the class of a run; both times of its age are the API server's."""
    classes = await cluster.list_classes(age)
    asks = needs_namespace_labels(classes)
    labels = await cluster.namespace_labels(job.ref.namespace, age) if asks else {}
    return choose_class(job, classes, labels)


def apply_class(
    used: ClassStatus | None, job: Job, installation: Installation, context: ReconcileContext
) -> tuple[Job, Installation, ReconcileContext]:
    """Return run, installation and context with the settings of a class.

    Raises:
        ClassNotReadyError: The settings contradict those of the installation, or cannot be read any more.

    """
    if used is None:
        return job, installation, context
    try:
        settings = ignore_unknown(ClassSettings, used.settings, f"{CLASS_KIND} {used.name}")
    except ValidationError as error:
        why = f"status.class: the settings of {CLASS_KIND} {used.name} cannot be read; upgrade the operator"
        raise ClassNotReadyError(why) from error
    try:
        installation = with_settings(installation, used.name, settings)
    except ValidationError as error:
        raise ClassNotReadyError(_describe(used.name, error)) from error
    job = replace(job, spec=with_defaults(job.spec, settings))
    if settings.queue.required and job.spec.queue is None:
        raise ClassNotReadyError(f"spec.queue: {CLASS_KIND} {used.name} requires a queue; set spec.queue.name")
    selector, tolerations = training_placement(installation.pods)
    return job, installation, replace(context, node_selector=selector, tolerations=tolerations)


def _describe(name: str, error: ValidationError) -> str:
    return (
        f"spec.className: {CLASS_KIND} {name} contradicts the chart's pods: "
        f"{error.errors()[0]['msg'].removeprefix('Value error, ')}; correct one of them"
    )


def with_settings(installation: Installation, name: str, settings: ClassSettings) -> Installation:
    """Return an installation with the settings of a class; ValidationError if they contradict each other."""
    return replace(
        installation,
        pods=_merge(installation.pods.model_dump_json(by_alias=True), settings.pods.model_dump_json(by_alias=True)),
        prepare_resources=settings.resources.prepare,
        used_class=name,
    )


@lru_cache(maxsize=MAX_MERGED)
def _merge(installation: str, added: str) -> PodProfile:
    """Merge two profiles once: a run with a class is reconciled with each of its reports."""
    return merge_profiles(PodProfile.model_validate_json(installation), PodProfile.model_validate_json(added))


def with_defaults(spec: QLoRAJobSpec, settings: ClassSettings) -> QLoRAJobSpec:
    """Return a spec with what a class sets for runs that leave it out."""
    return spec.model_copy(update=dict(_defaults(spec, settings)))


def _defaults(spec: QLoRAJobSpec, settings: ClassSettings) -> Iterator[tuple[str, object]]:
    queue = settings.queue
    if spec.queue is None and queue.name:
        yield "queue", QueueSpec(name=queue.name, priority_class=queue.priority_class)
    if spec.ttl is None and settings.ttl is not None:
        yield "ttl", settings.ttl
