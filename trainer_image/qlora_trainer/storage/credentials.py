"""Credentials: mounted Secrets in a pod, the process's own environment on a computer. Values are never logged."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qlora_api.names import SECRETS_MOUNT, SecretRole
from qlora_api.reasons import Reason
from qlora_api.redaction import REDACTOR
from qlora_api.v1alpha1 import QLoRAJobSpec, SecretRef
from qlora_trainer.errors import RunError

_STORAGE_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_ENDPOINT_URL",
    "HF_TOKEN",
)
_KEYS = {
    SecretRole.MODEL: _STORAGE_KEYS,
    SecretRole.DATASET: _STORAGE_KEYS,
    SecretRole.OUTPUT: _STORAGE_KEYS,
    SecretRole.WANDB: ("WANDB_API_KEY",),
    SecretRole.MLFLOW: ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
}
"""What is read of a Secret; its other keys are none of our business."""
_CONFIDENTIAL = frozenset({key for keys in _KEYS.values() for key in keys} - {"AWS_REGION", "AWS_ENDPOINT_URL"})
"""What must not be in a log line, whoever writes it."""
_TRACKERS = frozenset({SecretRole.WANDB, SecretRole.MLFLOW})


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


def load_secrets(spec: QLoRAJobSpec, namespace: str, mount: Path | None = None) -> Secrets:
    """Read the mounted Secrets; without any mount (a local run) the environment is used."""
    mount = mount or Path(SECRETS_MOUNT)
    if not mount.is_dir():
        return environment_secrets()
    found = {role: _load_role(role, reference, namespace, mount) for role, reference in spec.secret_refs.items()}
    output = found[SecretRole.OUTPUT] or Credentials()
    # The keys of the output are a default for what lies beside it, and nothing for a tracker to see.
    return Secrets({role: keys or (Credentials() if role in _TRACKERS else output) for role, keys in found.items()})


def environment_secrets() -> Secrets:
    """Return the process's own credentials for every role."""
    REDACTOR.add_secrets(value for key in _CONFIDENTIAL if (value := os.environ.get(key)))
    token = {"HF_TOKEN": os.environ["HF_TOKEN"]} if os.environ.get("HF_TOKEN") else {}
    # The AWS_* keys stay with boto3, whose default chain also knows profiles, roles and refresh; so do the trackers'
    # keys with their libraries.
    return Secrets({role: Credentials({} if role in _TRACKERS else token) for role in SecretRole})


def _load_role(role: SecretRole, reference: SecretRef | None, namespace: str, mount: Path) -> Credentials | None:
    if reference is None:
        return None
    folder, field = mount / role, f"tracking.{role}" if role in _TRACKERS else role
    keys = {key: (folder / key).read_text().strip() for key in _KEYS[role] if (folder / key).is_file()}
    if not keys:
        raise RunError(
            Reason.SECRET_NOT_FOUND,
            f"spec.{field}.secretRef: Secret '{reference.name}' does not exist in namespace '{namespace}', or has none "
            f"of the keys {', '.join(_KEYS[role])}; create it there, then create the QLoRAJob anew.",
        )
    REDACTOR.add_secrets(value for key, value in keys.items() if key in _CONFIDENTIAL)
    return Credentials(keys)
