"""The spec of a QLoRAJob: its blocks, and the rules between them."""

from typing import Annotated, Final, Literal

from pydantic import Field

from qlora_api.accelerators import NVIDIA
from qlora_api.base import ApiModel
from qlora_api.names import SecretRole
from qlora_api.optimizers import SHARDABLE
from qlora_api.strategies import DDP, FOR_SEVERAL, SHARDING_OPTIMIZER, SHARDING_WEIGHTS, ZERO2, Distribution
from qlora_api.v1alpha1.checkpoint import CheckpointSpec
from qlora_api.v1alpha1.places import DatasetSpec, ModelSpec, OutputSpec
from qlora_api.v1alpha1.recipe import EvaluationSpec, LoraSpec, QuantizationSpec, TrainingSpec
from qlora_api.v1alpha1.tracking import TrackingSpec
from qlora_api.v1alpha1.types import Duration, LabelKey, LabelValue, Quantity, SecretRef, cel


class Toleration(ApiModel):
    """A Kubernetes toleration."""

    key: LabelKey | None = Field(default=None, description="Taint key; none with operator Exists tolerates all.")
    operator: Literal["Exists", "Equal"] = Field(default="Equal", description="How the value is compared.")
    value: LabelValue | None = Field(default=None, description="Taint value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Taint effect; none means every effect."
    )
    toleration_seconds: int | None = Field(default=None, ge=0, le=31_536_000, description="Seconds, for NoExecute.")


class ResourcesSpec(ApiModel):
    """What the training pods ask for."""

    nodes: int = Field(default=1, ge=1, le=64, description="Training pods, on a node each where there are as many.")
    gpus_per_node: int = Field(
        default=1, ge=0, le=16, description="GPUs of each training pod, one process each; 0 trains on the CPU."
    )
    gpu_product: LabelValue = Field(
        default="", description=f"Required value of the node label {NVIDIA.product_label}; empty: any."
    )
    cpu: Quantity = Field(default="2", description="CPU request of each training pod.")
    memory: Quantity = Field(default="16Gi", description="Memory request and limit of each training pod.")
    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=16)] = Field(
        default={}, description="Labels that the nodes must have."
    )
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=16)] = Field(
        default=(), description=f"Taints that the training pods tolerate; {NVIDIA.resource} is tolerated anyway."
    )

    @property
    def processes(self) -> int:
        """Return the processes of a run: one per GPU, or one per node that uses all its cores."""
        return self.nodes * max(self.gpus_per_node, 1)


class RetriesSpec(ApiModel):
    """How often a training may be tried."""

    max_attempts: int = Field(
        default=5,
        ge=1,
        le=50,
        description=(
            "Training attempts in all; each goes on from the last checkpoint. Only what another attempt can mend is "
            "tried again, and an attempt that a drain, an eviction or a lost node ended does not count."
        ),
    )


class DeadlinesSpec(ApiModel):
    """When waiting ends."""

    startup: Duration = Field(
        default="30m", description="Longest time from a pod's placement on a node to its first breath."
    )
    total: Duration = Field(default="24h", description="Longest time that all training attempts may take together.")
    heartbeat: Duration = Field(
        default="10m",
        description=(
            "Longest time of a training pod without a sign of life: a step, a part of an evaluation, of a download or "
            "of an upload. Then its stacks are kept in hangs/ of the output, and another attempt is made."
        ),
    )


class QueueSpec(ApiModel):
    """A queue of Kueue, which lets the training Job start when there is room."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=63)] = Field(
        description="Name of a LocalQueue in the QLoRAJob's namespace."
    )
    priority_class: Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$", max_length=63)] = Field(
        default="", description="Name of a WorkloadPriorityClass; empty: the queue's default."
    )


MUTABLE_FIELDS: Final = frozenset({"deadlines", "queue", "retries", "suspend", "ttl"})
"""Fields of the spec that may change after creation; every other block is immutable as a whole."""


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
    """What to fine-tune, on what, how, and where the adapter goes."""

    model_config = cel(
        (
            "self.method != 'qlora' || self.quantization.bits in [4, 8]",
            "method qlora needs quantization.bits 4 or 8; for a 16-bit base set method to lora",
        ),
        (
            "self.method == 'qlora' || self.quantization.bits == 16",
            "methods lora and full need quantization.bits 16; for a quantised base set method to qlora",
        ),
        (
            "self.lora.init != 'pissa' || self.quantization.bits == 16",
            "lora.init pissa takes singular vectors out of the base's weights, which 4 or 8 bits cannot hold; set "
            "method to lora and quantization.bits to 16, or lora.init to loftq",
        ),
        (
            "self.lora.init != 'loftq' || self.quantization.bits == 4",
            "lora.init loftq makes good what 4-bit quantisation takes away; set quantization.bits to 4, or leave "
            "init out",
        ),
        (
            "self.method != 'full' || self.output.merged == 'none'",
            "method full trains the weights themselves, so there is nothing to merge; leave output.merged out",
        ),
        (
            "!self.lora.dora || self.quantization.bits != 8",
            "lora.dora fails on an 8-bit base, in its second pass; set quantization.bits to 4, or leave dora out",
        ),
        (
            "self.lora.init != 'loftq' || self.output.merged == 'none' || self.output.mergeBase == 'dequantised'",
            "a LoftQ adapter makes up for the 4-bit base, and on the original one that would count twice; set "
            "output.mergeBase to dequantised",
        ),
        (
            "self.distribution == 'auto' || self.resources.nodes > 1 || self.resources.gpusPerNode > 1",
            "distribution says how several processes share the work, and resources asks for one; leave it out, or "
            "raise nodes or gpusPerNode",
        ),
        (
            f"!(self.distribution in {list(SHARDING_WEIGHTS)}) || (self.method != 'full' && self.lora.init != 'pissa' "
            "&& size(self.lora.modulesToSave) == 0 && !(self.lora.dora && self.quantization.bits == 4))",
            f"distribution {' and '.join(SHARDING_WEIGHTS)} leaves no process a whole weight, which method full, "
            f"lora.modulesToSave, lora.init pissa and dora on 4 bits need; set it to {ZERO2.name}",
        ),
        (
            f"!(self.distribution in {list(SHARDING_OPTIMIZER)}) || self.training.optimizer in {['auto', *SHARDABLE]}",
            f"distribution {' and '.join(SHARDING_OPTIMIZER)} divide the state of AdamW; leave training.optimizer out, "
            f"or set distribution to {DDP.name}",
        ),
        *map(_immutable, _IMMUTABLE_FIELDS),
    )

    method: Literal["qlora", "lora", "full"] = Field(
        default="qlora",
        description=(
            "qlora: adapter on a quantised base; lora: adapter on a 16-bit base; full: all weights are trained, in "
            "fp32, and the model itself is published (for small models; the block lora has no say)."
        ),
    )
    model: ModelSpec = Field(description="The base model.")
    dataset: DatasetSpec = Field(description="The rows to learn from.")
    quantization: QuantizationSpec = Field(default=QuantizationSpec(), description="How the base weights are stored.")
    lora: LoraSpec = Field(default=LoraSpec(), description="The low-rank adapter.")
    training: TrainingSpec = Field(default=TrainingSpec(), description="The optimisation.")
    resources: ResourcesSpec = Field(default=ResourcesSpec(), description="What the training pods ask for.")
    distribution: Distribution = Field(
        default="auto",
        description=(
            "How several processes share the work. "
            f"{'; '.join(f'{strategy.name}: {strategy.summary}' for strategy in FOR_SEVERAL)}."
        ),
    )
    checkpoint: CheckpointSpec = Field(default=CheckpointSpec(), description="How much of a run a stop may cost.")
    tracking: TrackingSpec = Field(default=TrackingSpec(), description="Where the course of the training is shown.")
    evaluation: EvaluationSpec = Field(default=EvaluationSpec(), description="What is reported beside the loss.")
    output: OutputSpec = Field(description="Where the result goes.")
    retries: RetriesSpec = Field(default=RetriesSpec(), description="How often it is tried. May be changed later.")
    deadlines: DeadlinesSpec = Field(default=DeadlinesSpec(), description="When waiting ends. May be changed later.")
    queue: QueueSpec | None = Field(
        default=None, description="Queue that training attempts wait in. May be changed later, for the next attempt."
    )
    suspend: bool = Field(
        default=False,
        description=(
            "True: no pod runs; a training under way writes a checkpoint and ends. False again: it goes on from there. "
            "May be changed later."
        ),
    )
    ttl: Duration | None = Field(
        default=None,
        description=(
            "Time after the end until Jobs and pods are deleted; the QLoRAJob itself stays. Absent: they stay with it. "
            "May be changed later."
        ),
    )

    @property
    def input_uris(self) -> dict[str, str]:
        """Return every URI that is read, by its field."""
        held_out = self.dataset.evaluation.uri
        return {
            "spec.model.uri": self.model.uri,
            **{field: source.uri for field, source in self.dataset.inputs},
            **({"spec.dataset.evaluation.uri": held_out} if held_out else {}),
        }

    @property
    def tracker_urls(self) -> dict[str, str]:
        """Return every tracking server, by its field."""
        wandb, mlflow = self.tracking.wandb, self.tracking.mlflow
        return {
            **({"spec.tracking.wandb.baseUrl": wandb.base_url} if wandb and wandb.base_url else {}),
            **({"spec.tracking.mlflow.uri": mlflow.uri} if mlflow else {}),
        }

    @property
    def secret_refs(self) -> dict[SecretRole, SecretRef | None]:
        """The Secret that each role of a pod is given."""
        wandb, mlflow = self.tracking.wandb, self.tracking.mlflow
        return {
            SecretRole.MODEL: self.model.secret_ref,
            SecretRole.DATASET: self.dataset.secret_ref,
            SecretRole.OUTPUT: self.output.secret_ref,
            SecretRole.WANDB: wandb.secret_ref if wandb else None,
            SecretRole.MLFLOW: mlflow.secret_ref if mlflow else None,
        }
