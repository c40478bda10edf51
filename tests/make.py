"""Valid objects with one thing changed: `make_job(method="lora")`."""

import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.names import Role
from qlora_api.prepared import Prepared
from qlora_api.reasons import Reason
from qlora_api.report import TerminationMessage
from qlora_api.result import Result
from qlora_api.v1alpha1 import (
    DataStatus,
    EvaluationStatus,
    Metrics,
    ModelStatus,
    Plan,
    QLoRAJobSpec,
    QLoRAJobStatus,
)
from qlora_operator.cluster.interface import PodIdentity
from qlora_operator.models import ChildJob, Exit, Job, Observation, Pod
from qlora_operator.resources import Installation, Owner

NOW: Final = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
UID: Final = "5f0c1b5e-0000-4000-8000-000000000001"
DIGEST: Final = "0123456789abcdef"
REF: Final = JobRef("ml", "support-bot")
OWNER: Final = Owner(REF, UID)
INSTALLATION: Final = Installation("registry.example/trainer:1", progress_url="http://operator.qlora.svc:8080")


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Merge recursively: replace leaves, and merge mappings that both have."""
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def make_spec_manifest(**change: Any) -> dict[str, Any]:
    """Return the spec of the quickstart as in a manifest."""
    spec = {
        "model": {"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"},
        "dataset": {"uri": "s3://data/support/train.jsonl"},
        "resources": {"gpusPerNode": 0},
        "output": {"uri": "s3://adapters/team-a", "secretRef": {"name": "s3-credentials"}},
    }
    return merge(spec, change)


def make_manifest(name: str = REF.name, namespace: str = REF.namespace, **change: Any) -> dict[str, Any]:
    """Return a QLoRAJob manifest."""
    metadata = {"name": name, "namespace": namespace}
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": metadata,
        "spec": make_spec_manifest(**change),
    }


def make_spec(**change: Any) -> QLoRAJobSpec:
    """Return the spec of the quickstart, parsed."""
    return QLoRAJobSpec.model_validate(make_spec_manifest(**change))


def make_result() -> Result:
    """Return the result of a published run."""
    return Result(
        adapter=f"s3://adapters/team-a/{REF.name}/{DIGEST}/adapter",
        report=f"s3://adapters/team-a/{REF.name}/{DIGEST}/report/report.json",
        evaluation=EvaluationStatus(
            base=Metrics(loss=4.26, perplexity=70.8, token_accuracy=0.31),
            adapter=Metrics(loss=2.83, perplexity=16.9, token_accuracy=0.52),
            rows=50,
            tokens=1850,
        ),
        steps=300,
        tokens_per_second=812.5,
    )


def make_prepared(**change: Any) -> Prepared:
    """Return the result of prepare."""
    prepared = Prepared(
        digest=DIGEST,
        prefix=f"s3://adapters/team-a/{REF.name}/{DIGEST}",
        model=ModelStatus(
            uri="hf://HuggingFaceTB/SmolLM2-135M-Instruct",
            commit="a" * 40,
            architecture="LlamaForCausalLM",
            parameters=134_515_008,
        ),
        dataset=DataStatus(
            digest="b" * 64,
            format="instruction",
            training_rows=950,
            evaluation_rows=50,
            training_tokens=35_150,
            truncated_rows=0,
            longest_row_tokens=212,
        ),
        trainer_version="0.1.0",
    )
    return prepared.model_copy(update=change)


def make_plan_status() -> Plan:
    """Return the plan for make_spec() and make_prepared()."""
    return Plan(
        device="cpu", nodes=1, gpus_per_node=0, micro_batch_size=8, gradient_accumulation=2, total_steps=180, reasons=()
    )


def make_token(pod: PodIdentity, **change: Any) -> str:
    """Return a token of a pod as a kubelet mounts it, but for its signature."""
    claims = {
        "aud": [names.TOKEN_AUDIENCE],
        "exp": int(NOW.timestamp()) + 3600,
        "iss": "https://kubernetes.default.svc.cluster.local",
        "kubernetes.io": {"namespace": pod.namespace, "pod": {"name": pod.name, "uid": pod.uid}},
    }
    header = {"alg": "RS256", "kid": "any"}
    return ".".join(encode_segment(json.dumps(part).encode()) for part in (header, merge(claims, change), "signature"))


def encode_segment(data: bytes) -> str:
    """Encode as a segment of a JWT."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def make_termination_message(reason: Reason, message: str = "", **facts: Any) -> str:
    """A termination message."""
    return TerminationMessage(reason=reason, message=message, **facts).model_dump_json(by_alias=True, exclude_none=True)


PREPARED_MESSAGE: Final = make_termination_message(Reason.PREPARED, prepared=make_prepared())
PUBLISHED_MESSAGE: Final = make_termination_message(Reason.PUBLISHED, result=make_result())


def message_for(job: str, message: str, spec: Mapping[str, Any] | None = None) -> str:
    """Return a termination message as the pods of another QLoRAJob write it: of its own prefix and model."""
    default, prepared = make_spec_manifest(), make_prepared()
    own = merge(default, spec or {})
    prefix = f"{names.output_root(own['output']['uri'], job)}/{DIGEST}"
    for old, new in ((prepared.prefix, prefix), (prepared.model.uri, own["model"]["uri"])):
        message = message.replace(old, json.dumps(new)[1:-1])
    return message


def make_exit(code: int = 0, message: str = "", reason: str = "") -> Exit:
    """The end of a container."""
    return Exit(code, reason or ("Completed" if code == 0 else "Error"), message, NOW)


def make_pod(**change: Any) -> Pod:
    """A running pod on a node."""
    values: dict[str, Any] = {
        "name": f"{REF.name}-1-0-abcde",
        "uid": "pod-uid",
        "phase": "Running",
        "node": "node-1",
        "created_at": NOW - timedelta(minutes=5),
        "scheduled_at": NOW - timedelta(minutes=5),
        "started_at": NOW - timedelta(minutes=4),
    }
    return Pod(**{**values, **change})


def make_pending_pod(**change: Any) -> Pod:
    """A pod that was just created."""
    return make_pod(**{"phase": "Pending", "node": "", "scheduled_at": None, "started_at": None, **change})


def make_child(role: Role = Role.TRAIN, attempt: int = 1, **change: Any) -> ChildJob:
    """A child Job with a running pod; `pod` is its only one, `pods` are several."""
    train = role is Role.TRAIN
    values: dict[str, Any] = {
        "name": names.train_job_name(REF.name, attempt) if train else names.prepare_job_name(REF.name, attempt),
        "role": role,
        "attempt": attempt,
        "created_at": NOW - timedelta(minutes=5),
        "deadline_seconds": 86_400 if train else 3600,
        "pod": make_pod(),
    } | change
    pod = values.pop("pod")
    return ChildJob(**{"pods": (pod,) if pod else (), **values})


def make_prepared_child(message: str = PREPARED_MESSAGE, **change: Any) -> ChildJob:
    """Return a prepare Job that has completed."""
    pod = make_pod(phase="Succeeded", exit=make_exit(0, message))
    return make_child(Role.PREPARE, **{"complete": True, "pod": pod, **change})


def make_observation(*jobs: ChildJob) -> Observation:
    """Return an observation of some children."""
    return Observation(jobs)


def make_job(status: QLoRAJobStatus | None = None, **change: Any) -> Job:
    """Return a QLoRAJob with a parsed spec."""
    return Job(REF, UID, 1, NOW - timedelta(minutes=10), make_spec(**change), status or QLoRAJobStatus())
