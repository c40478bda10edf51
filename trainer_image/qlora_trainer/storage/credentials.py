"""Credentials from mounted Secrets in a pod, or from the environment in a local run. Values are never logged."""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from qlora_api.logs.redaction import REDACTOR
from qlora_api.names import SECRETS_MOUNT, SecretRole
from qlora_api.reasons import Reason
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
"""Keys that are read from the Secret of each role; others are ignored."""
_CONFIDENTIAL = frozenset({key for keys in _KEYS.values() for key in keys} - {"AWS_REGION", "AWS_ENDPOINT_URL"})
"""Keys whose values are redacted from all log lines."""
_TRACKERS = frozenset({SecretRole.WANDB, SecretRole.MLFLOW})


@dataclass(frozen=True)
class Credentials:
    """Credentials of one role; without keys, the library's own default chain applies."""

    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    folder: Path | None = None
    """Where the kubelet mounts the Secret, and updates it; None outside a pod."""

    def get(self, key: str) -> str | None:
        """Return the value of a key, or None if it is missing or empty."""
        return self.keys.get(key) or None

    def reread(self) -> "Credentials":
        """Return the keys that the mounted Secret has now, or these ones if it has none any more."""
        keys = _read_keys(self.folder, _STORAGE_KEYS) if self.folder is not None else {}
        return Credentials(keys, self.folder) if keys else self


@dataclass(frozen=True)
class Secrets:
    """The credentials of every role."""

    by_role: Mapping[SecretRole, Credentials] = field(repr=False)

    def of(self, role: SecretRole) -> Credentials:
        """Return the credentials of a role."""
        return self.by_role[role]


def load_secrets(spec: QLoRAJobSpec, namespace: str, mount: Path | None = None) -> Secrets:
    """Read the mounted Secrets, or the environment if nothing is mounted (local run).

    Args:
        spec: Its secretRefs select the Secrets.
        namespace: Named in error messages.
        mount: Folder with one folder per role; SECRETS_MOUNT by default.

    Returns:
        The credentials of every role. Model and dataset default to the credentials of the output; trackers do not.

    Raises:
        RunError: SECRET_NOT_FOUND if a Secret is missing or has none of the expected keys.

    """
    mount = mount or Path(SECRETS_MOUNT)
    if not mount.is_dir():
        return environment_secrets()
    found = {role: _load_role(role, reference, namespace, mount) for role, reference in spec.secret_refs.items()}
    output = found[SecretRole.OUTPUT] or Credentials()
    # The credentials of the output are the default for model and dataset, but must not be sent to a tracker.
    return Secrets({role: keys or (Credentials() if role in _TRACKERS else output) for role, keys in found.items()})


def environment_secrets() -> Secrets:
    """Return the process's own credentials for every role."""
    REDACTOR.add_secrets(value for key in _CONFIDENTIAL if (value := os.environ.get(key)))
    token = {"HF_TOKEN": os.environ["HF_TOKEN"]} if os.environ.get("HF_TOKEN") else {}
    # boto3 reads AWS_* itself: its default chain also supports profiles, roles and refresh. The libraries of the
    # trackers read their own variables.
    return Secrets({role: Credentials({} if role in _TRACKERS else token) for role in SecretRole})


def _load_role(role: SecretRole, reference: SecretRef | None, namespace: str, mount: Path) -> Credentials | None:
    if reference is None:
        return None
    folder, field = mount / role, f"tracking.{role}" if role in _TRACKERS else role
    keys = _read_keys(folder, _KEYS[role])
    if not keys:
        raise RunError(
            Reason.SECRET_NOT_FOUND,
            f"spec.{field}.secretRef: Secret '{reference.name}' does not exist in namespace '{namespace}', or has none "
            f"of the keys {', '.join(_KEYS[role])}; create it there, then create the QLoRAJob again.",
        )
    return Credentials(keys, folder)


def _read_keys(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Read keys of a mounted Secret, all of one version: the kubelet replaces the folder ..data by a newer one."""
    if (folder / "..data").is_dir():
        folder = (folder / "..data").resolve()
    keys = {}
    for key in names:
        with suppress(FileNotFoundError):
            keys[key] = (folder / key).read_text().strip()
    REDACTOR.add_secrets(value for name, value in keys.items() if name in _CONFIDENTIAL)
    return keys
