"""Metadata of every child: labels and owner reference; and what an installation configures."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.names import Role
from qlora_api.pod_profile import DEFAULT_PROFILE, PodProfile
from qlora_api.qlora_class import PrepareResources
from qlora_api.runconfig import Platform
from qlora_api.v1alpha1 import Plan
from qlora_operator.models import Retention


@dataclass(frozen=True)
class Installation:
    """Configuration that every child of an installation shares."""

    image: str
    pull_policy: str = "IfNotPresent"
    progress_url: str = ""
    """Base URL that pods post progress to; empty disables progress reports."""
    platform: Platform = field(default_factory=Platform)
    pull_secrets: tuple[str, ...] = ()
    """Names of imagePullSecrets in the QLoRAJob's namespace."""
    retention: Retention = field(default_factory=Retention)
    pods: PodProfile = DEFAULT_PROFILE
    used_class: str = ""
    """Name of the QLoRAClass whose settings are in `pods` and `prepare_resources`; empty without one."""
    prepare_resources: PrepareResources = field(default_factory=PrepareResources)
    """What overrides the resources of prepare pods."""

    def with_image_of(self, plan: Plan | None) -> "Installation":
        """Return an installation with the image that a plan records, and with the Secrets that it was pulled with.

        The kubelet skips those that do not exist any more, and the installation's may be renewed ones.
        """
        if plan is None or plan.image is None:
            return self
        secrets = dict.fromkeys((*self.pull_secrets, *(plan.image_pull_secrets or ())))
        return replace(self, image=plan.image, pull_secrets=tuple(secrets))


class Owner(NamedTuple):
    """The QLoRAJob that children belong to."""

    ref: JobRef
    uid: str


class ChildWorkload(NamedTuple):
    """The identity that a Job shares with its ConfigMap."""

    owner: Owner
    role: Role
    attempt: int
    """Number of the training attempt, or of the preparation."""
    name: str
    """Name of the Job and the ConfigMap."""
    config_file: str

    @property
    def config_map(self) -> str:
        """Return the name of its ConfigMap; all preparations of a QLoRAJob share one, as they have the same content."""
        return names.prepare_job_name(self.owner.ref.name) if self.role is Role.PREPARE else self.name


def prepare_workload(owner: Owner, number: int) -> ChildWorkload:
    """Return the workload of one preparation."""
    name = names.prepare_job_name(owner.ref.name, number)
    return ChildWorkload(owner, Role.PREPARE, number, name, names.PREPARE_CONFIG_FILE)


def train_workload(owner: Owner, attempt: int) -> ChildWorkload:
    """Return the workload of one training attempt."""
    return ChildWorkload(
        owner, Role.TRAIN, attempt, names.train_job_name(owner.ref.name, attempt), names.RUN_CONFIG_FILE
    )


def build_labels(workload: ChildWorkload) -> dict[str, str]:
    """Return the labels of a child and of its pods."""
    return {
        names.MANAGED_BY_LABEL: names.FIELD_MANAGER,
        names.JOB_LABEL: workload.owner.ref.name,
        names.ROLE_LABEL: workload.role.value,
        names.NUMBER_LABELS[workload.role]: str(workload.attempt),
    }


def build_metadata(workload: ChildWorkload) -> dict[str, Any]:
    """Return the metadata of a child; the garbage collector deletes it with its owner."""
    owner = workload.owner
    return {
        "name": workload.name,
        "namespace": owner.ref.namespace,
        "labels": build_labels(workload),
        "ownerReferences": [
            {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "name": owner.ref.name,
                "uid": owner.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }
