"""The spec of a QLoRAJob: its blocks, and the rules across them."""

from typing import Annotated, Final, Literal

from pydantic import Field

from qlora_api.accelerators import MIG_PREFIX, NVIDIA, PRODUCT_LABELS
from qlora_api.base import ApiModel
from qlora_api.names import SecretRole
from qlora_api.optimizers import SHARDABLE
from qlora_api.strategies import DDP, FOR_SEVERAL, SHARDING_OPTIMIZER, SHARDING_WEIGHTS, ZERO2, Distribution
from qlora_api.v1alpha1.checkpoint import CheckpointSpec
from qlora_api.v1alpha1.data import DatasetSpec, ModelSpec, OutputSpec
from qlora_api.v1alpha1.patterns import CPU, GPU_RESOURCE, LABEL_KEY, LABEL_PREFIX, SUBDOMAIN, WHOLE_BYTES, CelRule
from qlora_api.v1alpha1.tracking import TrackingSpec
from qlora_api.v1alpha1.training import EvaluationSpec, LoraSpec, QuantizationSpec, TrainingSpec
from qlora_api.v1alpha1.types import ClassName, Duration, LabelKey, LabelValue, Quantity, SecretRef, cel

MIN_MEMORY: Final = 256
"""Least memory of a training pod in MiB: its Python libraries alone take more; a smaller number lacks its unit."""
MAX_MEMORY: Final = 1024
"""Most memory of a training pod in TiB: no machine has as much."""
_MEMORY_RANGE: Final = CelRule(
    "!isQuantity(self) || self.endsWith('m') || "
    f"(quantity(self).compareTo(quantity('{MIN_MEMORY}Mi')) >= 0 && "
    f"quantity(self).compareTo(quantity('{MAX_MEMORY}Ti')) <= 0)",
    f"a training pod takes from {MIN_MEMORY}Mi to {MAX_MEMORY}Ti of memory; write a number and a unit, such as 16Gi",
)


class Toleration(ApiModel):
    """A Kubernetes toleration."""

    model_config = cel(
        (
            "self.operator != 'Exists' || !has(self.value) || self.value == ''",
            "operator Exists matches every value; leave value out, or set operator to Equal",
        ),
        (
            "self.operator != 'Equal' || has(self.key)",
            "operator Equal needs a key; add the taint's key, or set operator to Exists for all taints",
        ),
        (
            "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            "tolerationSeconds is for evictions; set effect to NoExecute, or leave tolerationSeconds out",
        ),
    )

    key: LabelKey | None = Field(default=None, description="Taint key; absent with operator Exists: all taints.")
    operator: Literal["Exists", "Equal"] = Field(default="Equal", description="How the value is matched.")
    value: LabelValue | None = Field(default=None, description="Taint value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Taint effect; absent: every effect."
    )
    toleration_seconds: int | None = Field(
        default=None, ge=0, le=31_536_000, description="Seconds until eviction, for NoExecute."
    )


class ResourcesSpec(ApiModel):
    """What the training pods request."""

    model_config = cel(
        (
            f"!self.gpuResource.startsWith('{MIG_PREFIX}') || self.nodes * self.gpusPerNode <= 1",
            "MIG partitions cannot train together; set nodes and gpusPerNode to 1, or gpuResource to nvidia.com/gpu",
        ),
    )

    nodes: int = Field(default=1, ge=1, le=64, description="Training pods, each on its own node if there are enough.")
    gpus_per_node: int = Field(
        default=1, ge=0, le=16, description="GPUs per training pod, one process per GPU; 0 trains on the CPU."
    )
    gpu_product: LabelValue = Field(
        default="",
        description=f"Required value of the node label {PRODUCT_LABELS}, or gpuResource.product; empty: any.",
    )
    gpu_resource: Annotated[str, Field(max_length=63), GPU_RESOURCE] = Field(
        default=NVIDIA.resource,
        description=(
            "Extended resource that is a GPU: nvidia.com/gpu, or a MIG partition where NVIDIA's device plugin has the "
            f"strategy `mixed`, such as {MIG_PREFIX}3g.40gb."
        ),
    )
    cpu: Annotated[Quantity, CPU.rule] = Field(default="2", description="CPU request of each training pod.")
    memory: Annotated[Quantity, WHOLE_BYTES.rule, _MEMORY_RANGE] = Field(
        default="16Gi", description="Memory request and limit of each training pod."
    )
    node_selector: Annotated[
        dict[LabelKey, LabelValue], Field(max_length=16), LABEL_KEY.rule_for_keys, LABEL_PREFIX.rule_for_keys
    ] = Field(default={}, description="Labels that the nodes must have.")
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=16)] = Field(
        default=(), description="Taints that the training pods tolerate; those of gpuResource are always tolerated."
    )

    @property
    def processes(self) -> int:
        """Return the number of processes of a run: one per GPU, or one per node on CPUs."""
        return self.nodes * max(self.gpus_per_node, 1)


class RetriesSpec(ApiModel):
    """The retry budget."""

    max_attempts: int = Field(
        default=5,
        ge=1,
        le=50,
        description=(
            "Maximum number of training attempts that fail for a cause in the run itself, such as memory; each resumes "
            "from the last checkpoint, and a new checkpoint sets the count back. Attempts that a node, a service or "
            "the cluster ended have budgets of their own. Raising it continues a run that failed with "
            "RetriesExhausted."
        ),
    )


class DeadlinesSpec(ApiModel):
    """Time limits."""

    startup: Duration = Field(
        default="30m",
        description=(
            "Longest time from a pod being scheduled to a node until its container starts; and how long preparation "
            "waits for a Secret, a model, a dataset, a bucket or access that is missing."
        ),
    )
    total: Duration = Field(
        default="24h",
        description=(
            "Longest time that the containers of all training attempts together may run; waiting does not count."
        ),
    )
    heartbeat: Duration = Field(
        default="10m",
        description=(
            "Longest time a training pod may go without a heartbeat: a step, or a part of an evaluation, a download or "
            "an upload. Then its stacks are written to hangs/ in the output, and the attempt is retried."
        ),
    )


class QueueSpec(ApiModel):
    """A Kueue queue, which starts the training Job when there is room."""

    name: Annotated[str, Field(pattern=f"^{SUBDOMAIN}$", max_length=63, examples=["team-a"])] = Field(
        description="Name of a LocalQueue in the QLoRAJob's namespace."
    )
    priority_class: Annotated[str, Field(pattern=f"^({SUBDOMAIN})?$", max_length=63, examples=["nightly"])] = Field(
        default="", description="Name of a WorkloadPriorityClass; empty: the queue's default."
    )


MUTABLE_FIELDS: Final = frozenset({"deadlines", "queue", "retries", "suspend", "ttl"})
"""Fields of the spec that may change after creation; every other block is immutable."""


_IMMUTABLE_FIELDS: Final = (
    "method",
    "model",
    "dataset",
    "quantization",
    "lora",
    "training",
    "resources",
    "distribution",
    "checkpoint",
    "tracking",
    "evaluation",
    "output",
)


def _immutable(field: str) -> tuple[str, str]:
    return f"self.{field} == oldSelf.{field}", f"spec.{field} cannot change; create a QLoRAJob with another name"


class QLoRAJobSpec(ApiModel):
    """What to fine-tune, on which data, how, and where the adapter goes."""

    model_config = cel(
        (
            "self.method != 'qlora' || self.quantization.bits in [4, 8]",
            "method qlora needs quantization.bits 4 or 8; for a 16-bit base set method to lora",
        ),
        (
            "self.method == 'qlora' || self.quantization.bits == 16",
            "methods lora and full need quantization.bits 16; for a quantized base set method to qlora",
        ),
        (
            "self.lora.init != 'pissa' || self.quantization.bits == 16 || self.method != 'qlora'",
            "lora.init pissa subtracts singular vectors from the base weights, which 4 or 8 bits cannot hold; set "
            "method to lora and quantization.bits to 16, or lora.init to loftq",
        ),
        (
            "self.lora.init != 'loftq' || self.quantization.bits == 4",
            "lora.init loftq compensates the error of 4-bit quantization; set quantization.bits to 4, or leave "
            "init out",
        ),
        (
            "self.method != 'full' || self.output.merged == 'none'",
            "method full trains the weights themselves, so there is nothing to merge; leave output.merged out",
        ),
        (
            "!self.lora.dora || self.quantization.bits != 8",
            "lora.dora fails on an 8-bit base, in the second forward pass; set quantization.bits to 4, or leave dora "
            "out",
        ),
        (
            "self.lora.init != 'loftq' || self.output.merged == 'none' || self.output.mergeBase == 'dequantised'",
            "a LoftQ adapter compensates the error of the 4-bit base, which the original base does not have; set "
            "output.mergeBase to dequantised",
        ),
        (
            "self.distribution == 'auto' || self.resources.nodes > 1 || self.resources.gpusPerNode > 1",
            "distribution is for several processes, and resources requests only one; leave it out, or "
            "raise nodes or gpusPerNode",
        ),
        (
            f"!(self.distribution in {list(SHARDING_WEIGHTS)}) || (self.method != 'full' && self.lora.init != 'pissa' "
            "&& size(self.lora.modulesToSave) == 0 && !(self.lora.dora && self.quantization.bits == 4))",
            f"distribution {' and '.join(SHARDING_WEIGHTS)} shards every weight, but method full, lora.modulesToSave, "
            f"lora.init pissa and dora on 4 bits need unsharded ones; set it to {ZERO2.name}",
        ),
        (
            f"!(self.distribution in {list(SHARDING_OPTIMIZER)}) || self.training.optimizer in {['auto', *SHARDABLE]}",
            f"distribution {' and '.join(SHARDING_OPTIMIZER)} can only shard the state of AdamW; leave "
            f"training.optimizer out, or set distribution to {DDP.name}",
        ),
        *map(_immutable, _IMMUTABLE_FIELDS),
        (
            "has(self.className) == has(oldSelf.className) && "
            "(!has(self.className) || self.className == oldSelf.className)",
            _immutable("className")[1],
        ),
    )

    class_name: ClassName | None = Field(
        default=None,
        description=(
            "The QLoRAClass with what the installation keeps for runs like this one. Absent: the default class of the "
            "namespace, if there is one."
        ),
    )

    method: Literal["qlora", "lora", "full"] = Field(
        default="qlora",
        description=(
            "qlora: adapter on a quantized base; lora: adapter on a 16-bit base; full: full fine-tuning of all weights "
            "in fp32, which publishes the model itself (for small models; spec.lora is ignored)."
        ),
    )
    model: ModelSpec = Field(description="The base model.")
    dataset: DatasetSpec = Field(description="The training data.")
    quantization: QuantizationSpec = Field(default=QuantizationSpec(), description="How the base weights are stored.")
    lora: LoraSpec = Field(default=LoraSpec(), description="The low-rank adapter.")
    training: TrainingSpec = Field(default=TrainingSpec(), description="Training hyperparameters.")
    resources: ResourcesSpec = Field(default=ResourcesSpec(), description="What the training pods request.")
    distribution: Distribution = Field(
        default="auto",
        description=(
            "How training is distributed over several processes. "
            f"{'; '.join(f'{strategy.name}: {strategy.summary}' for strategy in FOR_SEVERAL)}."
        ),
    )
    checkpoint: CheckpointSpec = Field(default=CheckpointSpec(), description="When to write checkpoints.")
    tracking: TrackingSpec = Field(default=TrackingSpec(), description="Experiment trackers to report to.")
    evaluation: EvaluationSpec = Field(default=EvaluationSpec(), description="What is evaluated besides the loss.")
    output: OutputSpec = Field(description="Where the result goes.")
    retries: RetriesSpec = Field(default=RetriesSpec(), description="The retry budget. Mutable.")
    deadlines: DeadlinesSpec = Field(default=DeadlinesSpec(), description="Time limits. Mutable.")
    queue: QueueSpec | None = Field(
        default=None, description="Queue that training attempts wait in. Mutable; a change applies to the next attempt."
    )
    suspend: bool = Field(
        default=False,
        description=(
            "true: no pod runs; a running training writes a checkpoint and stops. Set to false, it resumes from there. "
            "Mutable."
        ),
    )
    ttl: Duration | None = Field(
        default=None,
        description=(
            "How long after the run has ended Jobs, pods, ConfigMaps and Services are deleted; the QLoRAJob itself "
            "stays. Absent: what the installation says (chart value ttl), else they are kept until it is deleted. "
            "Mutable."
        ),
    )

    @property
    def input_uris(self) -> dict[str, str]:
        """Return every URI that the run reads, by field path."""
        held_out = self.dataset.evaluation.uri
        return {
            "spec.model.uri": self.model.uri,
            **{field: source.uri for field, source in self.dataset.sources_by_field},
            **({"spec.dataset.evaluation.uri": held_out} if held_out else {}),
        }

    @property
    def tracker_urls(self) -> dict[str, str]:
        """Return the URL of every tracking server, by field path."""
        wandb, mlflow = self.tracking.wandb, self.tracking.mlflow
        return {
            **({"spec.tracking.wandb.baseUrl": wandb.base_url} if wandb and wandb.base_url else {}),
            **({"spec.tracking.mlflow.uri": mlflow.uri} if mlflow else {}),
        }

    @property
    def secret_refs(self) -> dict[SecretRole, SecretRef | None]:
        """Return the Secret of each role."""
        wandb, mlflow = self.tracking.wandb, self.tracking.mlflow
        return {
            SecretRole.MODEL: self.model.secret_ref,
            SecretRole.DATASET: self.dataset.secret_ref,
            SecretRole.OUTPUT: self.output.secret_ref,
            SecretRole.WANDB: wandb.secret_ref if wandb else None,
            SecretRole.MLFLOW: mlflow.secret_ref if mlflow else None,
        }
