"""The ConfigMap with the JSON configuration of a pod, and the launcher's files for several processes."""

import json

from qlora_api.base import ApiModel
from qlora_api.launcher_config import accelerate_config, deepspeed_config
from qlora_api.names import ACCELERATE_CONFIG_FILE, DEEPSPEED_CONFIG_FILE
from qlora_api.runconfig import PrepareConfig, Published, RunConfig
from qlora_api.strategies import STRATEGIES
from qlora_api.v1alpha1 import Plan, QLoRAJobSpec
from qlora_operator.models import AttemptInputs, Manifest
from qlora_operator.resources.metadata import (
    ChildWorkload,
    Installation,
    Owner,
    build_metadata,
    prepare_workload,
    train_workload,
)


def build_prepare_config(
    owner: Owner, spec: QLoRAJobSpec, installation: Installation, published: Published = None
) -> Manifest:
    """Return the ConfigMap of the prepare pods."""
    config = PrepareConfig(
        namespace=owner.ref.namespace,
        job=owner.ref.name,
        uid=owner.uid,
        spec=spec,
        published=published,
        platform=installation.platform,
    )
    return _build(prepare_workload(owner, number=1), config)


def build_run_config(owner: Owner, spec: QLoRAJobSpec, run: AttemptInputs, installation: Installation) -> Manifest:
    """Return the ConfigMap of the pods of a training attempt."""
    config = RunConfig(
        namespace=owner.ref.namespace,
        job=owner.ref.name,
        uid=owner.uid,
        attempt=run.attempt,
        spec=spec,
        plan=run.plan,
        prepared=run.prepared,
        checkpoint=run.checkpoint,
        published=run.published,
        platform=installation.platform,
    )
    return _build(train_workload(owner, run.attempt), config, _launch_files(spec, run.plan))


def _launch_files(spec: QLoRAJobSpec, plan: Plan) -> dict[str, str]:
    """Return the files of accelerate and DeepSpeed for several processes; JSON is valid YAML."""
    if plan.processes == 1:
        return {}
    files = {ACCELERATE_CONFIG_FILE: accelerate_config(plan)}
    if STRATEGIES[plan.strategy].launcher == "deepspeed":
        files[DEEPSPEED_CONFIG_FILE] = deepspeed_config(plan.strategy, spec.training.max_grad_norm)
    return {name: json.dumps(content, indent=1) for name, content in files.items()}


def _build(workload: ChildWorkload, config: ApiModel, others: dict[str, str] | None = None) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": build_metadata(workload),
        "data": {
            workload.config_file: config.model_dump_json(by_alias=True, exclude_none=True, indent=1),
            **(others or {}),
        },
    }
