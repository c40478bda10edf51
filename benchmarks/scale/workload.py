"""The workload: QLoRAJobs and JobSets of one pod each, and stages of KWOK that simulate the pods."""

import json
from pathlib import Path
from typing import Any, Final

from qlora_api import names
from qlora_api.model_config import reduce_config
from qlora_api.names import Role
from qlora_api.reasons import Reason
from tests.make import PUBLISHED_MESSAGE, make_manifest, make_prepared, make_termination_message, message_for

Manifest = dict[str, Any]

NAMESPACE: Final = "scale"
QLORAJOBS: Final = f"/apis/{names.GROUP}/{names.VERSION}/namespaces/{NAMESPACE}/{names.PLURAL}"
JOBSETS: Final = f"/apis/jobset.x-k8s.io/v1alpha2/namespaces/{NAMESPACE}/jobsets"
JOBS: Final = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
PODS: Final = f"/api/v1/namespaces/{NAMESPACE}/pods"


JOB_OF_POD: Final = f"{{{{ index $.metadata.labels `{names.JOB_LABEL}` }}}}"
"""In a stage's template: the name of the QLoRAJob that a pod belongs to."""
MODEL: Final = Path(__file__).parents[2] / "tests/unit/planner/configs/llama-3.2-3b.json"
"""The configuration from which the simulated runs are sized."""


def build_qlorajob(number: int) -> Manifest:
    """One run on one GPU, with the annotation of `kubectl apply`; its first child is the prepare Job."""
    manifest = make_manifest(f"run-{number:05}", NAMESPACE, resources={"gpusPerNode": 1})
    manifest["metadata"]["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": json.dumps(manifest)}
    return manifest


def build_jobset(number: int) -> Manifest:
    """One Job of one pod, with all defaults of JobSet's webhook set explicitly, and without a Service."""
    container = {
        "name": "trainer",
        "image": "trainer:test",
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "4Gi"}},
    }
    job = {
        "backoffLimit": 0,
        "completionMode": "Indexed",
        "completions": 1,
        "parallelism": 1,
        "template": {"spec": {"restartPolicy": "Never", "containers": [container]}},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": f"run-{number:05}", "namespace": NAMESPACE},
        "spec": {
            "network": {"enableDNSHostnames": False},
            "successPolicy": {"operator": "All", "targetReplicatedJobs": []},
            "startupPolicy": {"startupPolicyOrder": "AnyOrder"},
            "replicatedJobs": [{"name": "train", "replicas": 1, "template": {"spec": job}}],
        },
    }


def build_ends() -> str:
    """Return the stages of pods that end after one second, each with the trainer's termination message."""
    messages = {Role.PREPARE: _prepared_message(), Role.TRAIN: PUBLISHED_MESSAGE}
    return "\n---\n".join(_build_end(role, message_for(JOB_OF_POD, text)) for role, text in messages.items())


def build_prepare_end() -> str:
    """Return the stage of prepare pods that end after one second; training pods run until a test ends them."""
    return _build_end(Role.PREPARE, message_for(JOB_OF_POD, _prepared_message()))


def _prepared_message() -> str:
    prepared = make_prepared()
    model = prepared.model.model_copy(update={"config": reduce_config(json.loads(MODEL.read_text()))})
    return make_termination_message(Reason.PREPARED, prepared=prepared.model_copy(update={"model": model}))


def _build_end(role: Role, message: str) -> str:
    """Return a stage as JSON, which is YAML; the message is escaped once more for the template's YAML."""
    status = f"""
{{{{ $now := Now }}}}
phase: Succeeded
containerStatuses:
{{{{ range .spec.containers }}}}
- name: {{{{ .name | Quote }}}}
  image: {{{{ .image | Quote }}}}
  ready: false
  restartCount: 0
  state:
    terminated:
      exitCode: 0
      reason: Completed
      startedAt: {{{{ $now | Quote }}}}
      finishedAt: {{{{ $now | Quote }}}}
      message: {json.dumps(message)}
{{{{ end }}}}
"""
    stage = {
        "apiVersion": "kwok.x-k8s.io/v1alpha1",
        "kind": "Stage",
        "metadata": {"name": f"pod-end-{role}"},
        "spec": {
            "resourceRef": {"apiGroup": "v1", "kind": "Pod"},
            "selector": {
                "matchLabels": {names.ROLE_LABEL: role.value},
                "matchExpressions": [
                    {"key": ".metadata.deletionTimestamp", "operator": "DoesNotExist"},
                    {"key": ".status.phase", "operator": "In", "values": ["Running"]},
                ],
            },
            "delay": {"durationMilliseconds": 1000},
            "next": {"statusTemplate": status},
        },
    }
    return json.dumps(stage)
