"""Credentials: mounted Secrets in a pod, the process's own environment on a computer. Values are never logged."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qlora_api.names import SECRETS_MOUNT, Reason, SecretRole
from qlora_api.v1alpha1 import QLoRAJobSpec, SecretRef
from qlora_trainer.errors import RunError

_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_ENDPOINT_URL",
    "HF_TOKEN",
)
"""What is read of a Secret; its other keys are none of our business."""


@dataclass(frozen=True)
class Credentials:
    """The keys of one role, by name; an empty value means that the library's own default chain decides."""

    keys: Mapping[str, str] = field(default_factory=dict, repr=False)

    def get(self, key: str) -> str | None:
        """Return one key, or None where the Secret has none."""
        return self.keys.get(key) or None


@dataclass(frozen=True)
class Secrets:
    """The credentials of every role."""

    by_role: Mapping[SecretRole, Credentials] = field(repr=False)

    def of(self, role: SecretRole) -> Credentials:
        """Return the credentials of a role."""
        return self.by_role[role]


def secret_references(spec: QLoRAJobSpec) -> dict[SecretRole, SecretRef | None]:
    """Return the Secret that the spec names for each role."""
    return {
        SecretRole.MODEL: spec.model.secret_ref,
        SecretRole.DATASET: spec.dataset.secret_ref,
        SecretRole.OUTPUT: spec.output.secret_ref,
    }


def load_secrets(spec: QLoRAJobSpec, namespace: str, mount: Path = Path(SECRETS_MOUNT)) -> Secrets:
    """Read the mounted Secrets; without any mount (a local run) the environment is used."""
    if not mount.is_dir():
        return environment_secrets()
    references = secret_references(spec)
    output = _load_role(SecretRole.OUTPUT, references[SecretRole.OUTPUT], namespace, mount) or Credentials()
    return Secrets(
        {role: _load_role(role, reference, namespace, mount) or output for role, reference in references.items()}
    )


def environment_secrets() -> Secrets:
    """Return the process's own credentials for every role."""
    token = {"HF_TOKEN": os.environ["HF_TOKEN"]} if os.environ.get("HF_TOKEN") else {}
    # The AWS_* keys stay with boto3, whose default chain also knows profiles, roles and refresh.
    return Secrets(dict.fromkeys(SecretRole, Credentials(token)))


def _load_role(role: SecretRole, reference: SecretRef | None, namespace: str, mount: Path) -> Credentials | None:
    if reference is None:
        return None
    folder = mount / role
    keys = {key: (folder / key).read_text().strip() for key in _KEYS if (folder / key).is_file()}
    if not keys:
        raise RunError(
            Reason.SECRET_NOT_FOUND,
            f"spec.{role}.secretRef: Secret '{reference.name}' does not exist in namespace '{namespace}', or has none "
            f"of the keys {', '.join(_KEYS)}; create it there, then create the QLoRAJob anew.",
        )
    return Credentials(keys)
