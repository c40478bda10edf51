"""QLoRAJobs as the API server returns them, parsed for the commands."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from pydantic import ValidationError

from qlora_api import __version__
from qlora_api.job_ref import JobRef
from qlora_api.names import TERMINAL, Phase
from qlora_api.reasons import REASONS
from qlora_api.v1alpha1 import QLoRAJobSpec, QLoRAJobStatus
from qlora_cli.cluster.client import ClusterClient, ClusterError, KubeObject

Model = TypeVar("Model", QLoRAJobSpec, QLoRAJobStatus)


@dataclass(frozen=True)
class ClusterJob:
    """A QLoRAJob of a cluster; its spec is parsed on demand."""

    ref: JobRef
    uid: str
    created_at: datetime
    status: QLoRAJobStatus
    raw: KubeObject

    @property
    def phase(self) -> Phase:
        """Return the phase; Pending if no operator has reconciled it yet."""
        return self.status.phase or Phase.PENDING

    @property
    def finished(self) -> bool:
        """Return whether it has succeeded or failed."""
        return self.status.phase in TERMINAL

    @property
    def succeeded(self) -> bool:
        """Return whether it has succeeded."""
        return self.status.phase is Phase.SUCCEEDED

    @property
    def explanation(self) -> str:
        """Return the explanation of its phase, in a sentence."""
        reason, message = self.status.reason, self.status.message
        return message or (REASONS[reason].sentence if reason else "no operator has reconciled it yet")

    @property
    def suspended(self) -> bool:
        """Return whether spec.suspend is true."""
        return bool(self.raw["spec"].get("suspend"))

    def spec(self) -> QLoRAJobSpec:
        """Return the parsed spec; the API server has validated it."""
        return _read(QLoRAJobSpec, self.raw["spec"], self.ref)


def parse_job(raw: KubeObject) -> ClusterJob:
    """Parse a QLoRAJob; fields that a newer operator has added are ignored."""
    metadata = raw["metadata"]
    ref = JobRef(metadata["namespace"], metadata["name"])
    status = _read(QLoRAJobStatus, raw.get("status") or {}, ref)
    return ClusterJob(ref, metadata["uid"], datetime.fromisoformat(metadata["creationTimestamp"]), status, raw)


def get_job(cluster: ClusterClient, ref: JobRef) -> ClusterJob:
    """Return a QLoRAJob of the cluster."""
    return parse_job(cluster.get(ref))


def _read(model: type[Model], value: Mapping[str, Any], ref: JobRef) -> Model:
    try:
        return model.model_validate(value, extra="ignore")
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(map(str, detail["loc"]))
        raise ClusterError(
            f"QLoRAJob {ref.namespace}/{ref.name} was written by another version ({field}: {detail['msg']}); this is "
            f"qlora {__version__}: install the version of the operator"
        ) from None


def strip_managed_fields(raw: KubeObject) -> KubeObject:
    """Return the object without metadata.managedFields."""
    metadata = {key: value for key, value in raw["metadata"].items() if key != "managedFields"}
    return {**raw, "metadata": metadata}
