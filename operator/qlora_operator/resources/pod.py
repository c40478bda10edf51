"""The pods, without what the installation sets (`profile`): no API token, no writable root file system."""

from math import ceil
from typing import Any, Final, NamedTuple

from qlora_api import metrics, names
from qlora_api.names import Role, SecretRole
from qlora_api.prepared import Prepared
from qlora_api.qlora_class import PrepareResources
from qlora_api.units import GIB
from qlora_api.v1alpha1 import Plan, QLoRAJobSpec, ResourcesSpec
from qlora_operator.models import PREPARE_MEMORY, AttemptInputs, Manifest
from qlora_operator.resources.claims import build_claim_mounts, build_claim_volumes
from qlora_operator.resources.metadata import ChildWorkload, Installation, build_labels
from qlora_operator.resources.placement import (
    build_prepare_affinity,
    build_prepare_placement,
    build_train_affinity,
    build_train_placement,
)


class DiskLimits(NamedTuple):
    """Size limits of the emptyDir volumes in GiB: far above what a run needs, and an end for one that fills a disk."""

    work: int
    tmp: int


class _NodeResources(NamedTuple):
    """What a pod takes of its node, and which nodes it may run on."""

    container: dict[str, Any]
    disk: DiskLimits
    placement: dict[str, Any]


LAUNCH_COMMAND: Final = "launch"
"""The trainer's subcommand for several processes."""
_IGNORED_FILES: Final = ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "HF_TOKEN_PATH", "NETRC")
"""Variables that name files of credentials and commands in a person's HOME; a pod's credentials are its Secrets'."""
_METRICS_PORT: Final = {"name": metrics.PORT_NAME, "containerPort": metrics.PORT}
_PREPARE_DISK: Final = DiskLimits(work=256, tmp=8)
"""A dataset of 20 million rows, the most that prepare reads, has about 80 GB, and its token rows as much."""
_FIXED_DISK: Final = DiskLimits(work=64, tmp=8)
"""Of a training pod, besides what follows from its model and dataset: caches, logs, benchmarks."""
_WEIGHT_BYTES: Final = 32
"""Disk per weight of the base: its files (up to 4), a merged or fully trained copy (4) and two checkpoints with the
states of the optimizer (12 each, with method full)."""
_TOKEN_BYTES: Final = 32
"""Disk per training token: its id and label spans, compressed and as the memory-mapped copy, and both while writing."""
PREPARE_RESOURCES: Final = {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": PREPARE_MEMORY}}


def build_prepare_pod(
    workload: ChildWorkload, spec: QLoRAJobSpec, installation: Installation, avoided_nodes: tuple[str, ...] = ()
) -> Manifest:
    """Return the prepare pod, without a GPU; it prefers other nodes to those that are avoided."""
    resources = _prepare_resources(installation.prepare_resources)
    taken = _NodeResources(resources, _PREPARE_DISK, build_prepare_placement(spec.resources))
    affinity = build_prepare_affinity(avoided_nodes)
    return _build(workload, spec, installation, taken) | ({"affinity": affinity} if affinity else {})


def build_train_pod(
    workload: ChildWorkload, spec: QLoRAJobSpec, run: AttemptInputs, installation: Installation
) -> Manifest:
    """Return the pod template of a training attempt on one or several nodes."""
    plan, resources = run.plan, spec.resources
    placement = build_train_placement(resources, plan)
    taken = _NodeResources(_train_resources(resources, plan), _disk_limits(run.prepared), placement)
    pod = _build(workload, spec, installation, taken)
    if affinity := build_train_affinity(spec, run, build_labels(workload)):
        pod["affinity"] = affinity
    if plan.processes > 1:
        _add_rendezvous(pod, workload, plan)
    return pod


def _add_rendezvous(pod: Manifest, workload: ChildWorkload, plan: Plan) -> None:
    """Start the launcher instead of a single process; set the address of the main pod, and mount shared memory."""
    container = pod["containers"][0]
    container["args"][0] = LAUNCH_COMMAND
    if plan.nodes > 1:
        pod["subdomain"] = names.gang_service_name(workload.owner.ref.name, workload.attempt)
        main = {"name": names.MAIN_ADDRESS_ENV, "value": f"{workload.name}-0.{pod['subdomain']}"}
        container["env"].append(main)
    if plan.gpus_per_node > 1:
        # NCCL moves tensors between the GPUs of a node through shared memory; a container's own has 64 MiB.
        container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108 (an emptyDir)
        pod["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory"}})


def _build(
    workload: ChildWorkload,
    spec: QLoRAJobSpec,
    installation: Installation,
    taken: _NodeResources,
) -> Manifest:
    account = spec.output.service_account_name
    pull_secrets = [{"name": name} for name in installation.pull_secrets]
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        **({"serviceAccountName": account} if account else {}),
        **({"imagePullSecrets": pull_secrets} if pull_secrets else {}),
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": names.GRACE_SECONDS,
        **taken.placement,
        "containers": [_container(workload, spec, installation, taken.container)],
        "volumes": _volumes(workload, spec, installation, taken.disk),
    }


def _container(
    workload: ChildWorkload, spec: QLoRAJobSpec, installation: Installation, resources: dict[str, Any]
) -> Manifest:
    return {
        "name": names.CONTAINER,
        "image": installation.image,
        "imagePullPolicy": installation.pull_policy,
        "args": [workload.role.value, "--config", f"{names.CONFIG_MOUNT}/{workload.config_file}"],
        "env": _environment(workload, installation),
        **({"ports": [_METRICS_PORT]} if workload.role is Role.TRAIN else {}),
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": names.TERMINATION_MESSAGE_PATH,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _mounts(spec, installation),
    }


def _environment(workload: ChildWorkload, installation: Installation) -> list[dict[str, str]]:
    """Point every cache at a folder of its own, and the trainer at the progress endpoint.

    HOME is a folder that nothing is downloaded to: libraries read settings from it, some of which are commands.
    """
    folders = {
        "HOME": f"{names.WORK_MOUNT}/home",
        "HF_HOME": f"{names.WORK_MOUNT}/huggingface",
        "XDG_CACHE_HOME": f"{names.WORK_MOUNT}/cache",
        "MPLCONFIGDIR": f"{names.WORK_MOUNT}/matplotlib",
        "TRITON_CACHE_DIR": f"{names.WORK_MOUNT}/triton",
        "TMPDIR": "/tmp",  # noqa: S108 (an emptyDir of the pod)
        **dict.fromkeys(_IGNORED_FILES, "/dev/null"),
    }
    return [{"name": name, "value": value} for name, value in (folders | _progress(workload, installation)).items()]


def _progress(workload: ChildWorkload, installation: Installation) -> dict[str, str]:
    if not installation.progress_url:
        return {}
    path = names.progress_path(workload.owner.ref.namespace, workload.owner.ref.name)
    return {
        names.PROGRESS_URL_ENV: f"{installation.progress_url.rstrip('/')}{path}",
        names.PROGRESS_TOKEN_ENV: names.TOKEN_FILE,
    }


def _secrets(spec: QLoRAJobSpec) -> dict[SecretRole, str]:
    return {role: reference.name for role, reference in spec.secret_refs.items() if reference}


def _mounts(spec: QLoRAJobSpec, installation: Installation) -> list[dict[str, Any]]:
    secrets = [
        {"name": f"secret-{role}", "mountPath": f"{names.SECRETS_MOUNT}/{role}", "readOnly": True}
        for role in _secrets(spec)
    ]
    token = [{"name": "token", "mountPath": names.TOKEN_MOUNT, "readOnly": True}] if installation.progress_url else []
    return [
        {"name": "config", "mountPath": names.CONFIG_MOUNT, "readOnly": True},
        {"name": "work", "mountPath": names.WORK_MOUNT},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 (an emptyDir of the pod)
        *secrets,
        *token,
        *build_claim_mounts(spec),
    ]


def _disk_limits(prepared: Prepared) -> DiskLimits:
    weights = ceil(prepared.model.parameters * _WEIGHT_BYTES / GIB)
    rows = ceil(prepared.dataset.training_tokens * _TOKEN_BYTES / GIB)
    return DiskLimits(_FIXED_DISK.work + weights + rows, _FIXED_DISK.tmp + weights)


def _volumes(
    workload: ChildWorkload, spec: QLoRAJobSpec, installation: Installation, disk: DiskLimits
) -> list[dict[str, Any]]:
    """Return the volumes; Secrets are optional: a pod that waits for a missing one would hold its GPU."""
    secrets = [
        {"name": f"secret-{role}", "secret": {"secretName": name, "optional": True}}
        for role, name in _secrets(spec).items()
    ]
    token = {
        "path": names.TOKEN_FILE.rpartition("/")[2],
        "audience": names.TOKEN_AUDIENCE,
        "expirationSeconds": names.TOKEN_SECONDS,
    }
    projected = [{"name": "token", "projected": {"sources": [{"serviceAccountToken": token}]}}]
    return [
        {"name": "config", "configMap": {"name": workload.config_map}},
        {"name": "work", "emptyDir": {"sizeLimit": f"{disk.work}Gi"}},
        {"name": "tmp", "emptyDir": {"sizeLimit": f"{disk.tmp}Gi"}},
        *secrets,
        *(projected if installation.progress_url else []),
        *build_claim_volumes(spec),
    ]


def _prepare_resources(chosen: PrepareResources) -> dict[str, Any]:
    """Return the resources of a prepare pod; a chosen memory is its request too, as in training pods."""
    limits = {"memory": chosen.memory, "ephemeral-storage": chosen.ephemeral_storage}
    limits = {name: quantity for name, quantity in limits.items() if quantity}
    cpu = {"cpu": chosen.cpu} if chosen.cpu else {}
    return {
        "requests": PREPARE_RESOURCES["requests"] | cpu | limits,
        "limits": PREPARE_RESOURCES["limits"] | limits,
    }


def _train_resources(resources: ResourcesSpec, plan: Plan) -> dict[str, Any]:
    gpus = {resources.gpu_resource: plan.gpus_per_node} if plan.gpus_per_node else {}
    return {
        "requests": {"cpu": resources.cpu, "memory": resources.memory},
        "limits": {"memory": resources.memory, **gpus},
    }
