"""The ConfigMap with the JSON configuration of a pod, and the launcher's files for several processes."""

import json
from typing import Any, Final

from qlora_api.base import ApiModel
from qlora_api.launcher_config import accelerate_config, deepspeed_config
from qlora_api.names import ACCELERATE_CONFIG_FILE, DEEPSPEED_CONFIG_FILE, RUN_CONFIG_FILE
from qlora_api.runconfig import PrepareConfig, Published, RunConfig
from qlora_api.strategies import STRATEGIES
from qlora_api.untrusted_json import InvalidJsonError, parse_object
from qlora_api.v1alpha1 import Checkpoint, Plan, QLoRAJobSpec
from qlora_operator.models import AttemptInputs, Manifest
from qlora_operator.resources.metadata import (
    ChildWorkload,
    Installation,
    Owner,
    build_metadata,
    prepare_workload,
    train_workload,
)

MAX_CONFIG_MAP_BYTES: Final = 1 << 20
"""Maximum size of a ConfigMap (Kubernetes)."""


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


def build_resumption(
    existing: Manifest, owner: Owner, checkpoint: Checkpoint | None, published: Published
) -> Manifest | None:
    """Return the patch of the ConfigMap of an attempt with what its next start resumes from.

    The rest of its configuration stays, whichever version wrote it.

    Args:
        existing: The ConfigMap as it is.
        owner: The QLoRAJob.
        checkpoint: The newest checkpoint; None: any in the output.
        published: The manifests that earlier attempts reported; None: any in the output.

    Returns:
        The patch; None if there is nothing to change, or the ConfigMap is not the operator's.

    """
    metadata = existing["metadata"]
    owners = metadata.get("ownerReferences") or ()
    if owner.uid not in [reference.get("uid") for reference in owners]:
        return None
    try:
        former = parse_object(existing["data"][RUN_CONFIG_FILE], MAX_CONFIG_MAP_BYTES)
    except (LookupError, TypeError, InvalidJsonError):
        return None
    known = {
        "checkpoint": checkpoint and _to_json(checkpoint),
        "published": None if published is None else [_to_json(manifest) for manifest in published],
    }
    resumed = {name: value for name, value in (former | known).items() if value is not None}
    if resumed == former:
        return None
    identity = {name: metadata[name] for name in ("namespace", "name", "uid", "resourceVersion")}
    data = {RUN_CONFIG_FILE: json.dumps(resumed, indent=1)}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": identity, "data": data}


def _launch_files(spec: QLoRAJobSpec, plan: Plan) -> dict[str, str]:
    """Return the files of accelerate and DeepSpeed for several processes; JSON is valid YAML."""
    if plan.processes == 1:
        return {}
    files = {ACCELERATE_CONFIG_FILE: accelerate_config(plan)}
    if STRATEGIES[plan.strategy].launcher == "deepspeed":
        files[DEEPSPEED_CONFIG_FILE] = deepspeed_config(plan.strategy, spec.training.max_grad_norm)
    return {name: json.dumps(content, indent=1) for name, content in files.items()}


def _to_json(model: ApiModel) -> dict[str, Any]:
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)


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
