"""The QLoRAJob resource: the only source of the CRD, its defaults, its bounds and its reference."""

import re
from datetime import datetime, timedelta
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, ConfigDict, Field, JsonValue

from qlora_api.base import ApiModel
from qlora_api.names import ConditionType, Phase, Reason

MAX_URI: Final = 1024
"""Longest object key that S3 stores."""

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _validate_duration(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*(s|m|h|d)", text):
        raise ValueError("write a number and one unit: 90s, 30m, 24h or 7d")
    return text


def to_timedelta(duration: str) -> timedelta:
    """Turn '30m' into 30 minutes."""
    return timedelta(seconds=int(duration[:-1]) * _SECONDS[duration[-1]])


def _cel(*rules: tuple[str, str]) -> ConfigDict:
    """Attach rules for the API server, (expression that must hold, what to do), to a model."""
    validations: list[JsonValue] = [{"rule": rule, "message": message} for rule, message in rules]
    return ConfigDict(json_schema_extra={"x-kubernetes-validations": validations})


_IN_CLUSTER: Final = "!self.uri.startsWith('file://')"
_S3_SHAPE: Final = (
    "!self.uri.startsWith('s3://') || self.uri.matches('^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?$')",
    "write s3://bucket/key; a bucket has 3 to 63 lower-case letters, digits, dots and hyphens",
)

Duration = Annotated[
    str, Field(pattern=r"^[1-9][0-9]*(s|m|h|d)$", max_length=8, examples=["30m"]), AfterValidator(_validate_duration)
]
Uri = Annotated[str, Field(pattern=r"^(hf|s3|file)://.+$", max_length=MAX_URI)]
OutputUri = Annotated[str, Field(pattern=r"^(s3|file)://.+$", max_length=MAX_URI)]
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$", max_length=16)]
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$", max_length=128)]
LabelKey = Annotated[str, Field(max_length=317)]
LabelValue = Annotated[str, Field(max_length=63)]


class SecretRef(ApiModel):
    """A Secret in the QLoRAJob's own namespace; it is mounted into pods, and the operator never reads it."""

    name: ObjectName = Field(description="Name of the Secret.")


class ModelSpec(ApiModel):
    """The base model."""

    model_config = _cel(
        (_IN_CLUSTER, "file:// works with 'qlora run' only; upload the model and use s3://, or use hf://"),
        (
            "!self.uri.startsWith('hf://') || self.uri.matches('^hf://[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$')",
            "write hf://organisation/name; the revision goes into spec.model.revision",
        ),
        _S3_SHAPE,
    )

    uri: Uri = Field(
        description=(
            "Where the base model is: hf://organisation/name (the hub, or its mirror where the platform has one), "
            "s3://bucket/prefix (a folder in the Hugging Face format), or file:///folder (with `qlora run` only). "
            "Weights must be safetensors."
        ),
        examples=["hf://HuggingFaceTB/SmolLM2-135M-Instruct"],
    )
    revision: str = Field(
        default="main",
        min_length=1,
        max_length=255,
        description="Branch, tag or commit of an hf:// model; status.model.commit has what it was resolved to.",
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with HF_TOKEN for the hub, or AWS_* keys for s3://. Default: output.secretRef for s3://.",
    )


class EvaluationSplit(ApiModel):
    """The held-out rows, on which base model and adapter are compared."""

    model_config = _cel(
        (
            "!has(self.uri) || !self.uri.startsWith('file://')",
            "file:// works with 'qlora run' only; upload the rows and use s3://",
        ),
    )

    fraction: float = Field(
        default=0.05,
        gt=0,
        le=0.5,
        description="Share of the rows that is held out, chosen by a hash of each row. Unused where uri is set.",
    )
    uri: Uri | None = Field(default=None, description="A dataset of held-out rows, in the format of the training rows.")


class DatasetSpec(ApiModel):
    """The rows to learn from."""

    model_config = _cel(
        (_IN_CLUSTER, "file:// works with 'qlora run' only; upload the dataset and use s3://"),
        _S3_SHAPE,
    )

    uri: Uri = Field(
        description="Object with one JSON object a line (.jsonl): s3://bucket/key, hf://datasets/name/file or file://.",
        examples=["s3://data/support/train.jsonl"],
    )
    format: Literal["auto", "instruction", "completion"] = Field(
        default="auto",
        description=(
            "instruction: fields instruction, input (optional) and output or response; completion: fields prompt and "
            "completion; auto: told by the fields of the first row."
        ),
    )
    secret_ref: SecretRef | None = Field(
        default=None, description="Secret with AWS_* keys or HF_TOKEN for the dataset. Default: output.secretRef."
    )
    evaluation: EvaluationSplit = Field(default=EvaluationSplit(), description="The held-out rows.")
    max_samples: int | None = Field(
        default=None, ge=2, le=100_000_000, description="Use only the first rows, this many: a quick trial of a run."
    )


class QuantizationSpec(ApiModel):
    """How the frozen base weights are stored."""

    bits: Literal[4, 8, 16] = Field(
        default=4, description="Bits per weight: 4 or 8 (bitsandbytes) for method qlora, 16 for method lora."
    )
    type: Literal["nf4", "fp4"] = Field(default="nf4", description="4-bit data type.")
    double_quant: bool = Field(default=True, description="Quantise the 4-bit scales as well (0.37 bit a weight less).")


class LoraSpec(ApiModel):
    """The low-rank adapter."""

    model_config = _cel(
        (
            "!('all-linear' in self.targets) || size(self.targets) == 1",
            "all-linear means every linear module; list it alone, or list module names without it",
        ),
    )

    rank: int = Field(default=16, ge=1, le=1024, description="Rank r of the update matrices.")
    alpha: int = Field(default=32, ge=1, le=4096, description="Scale: updates are multiplied by alpha / rank.")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout on the adapter's input while training.")
    targets: Annotated[tuple[ModuleName, ...], Field(min_length=1, max_length=64)] = Field(
        default=("q_proj", "v_proj"),
        description="Names of the linear modules that get an adapter, or the one word all-linear.",
    )
    dora: bool = Field(default=False, description="Weight-decomposed LoRA; vLLM cannot serve it unmerged.")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank.")


class TrainingSpec(ApiModel):
    """The optimisation."""

    model_config = _cel(
        (
            "!has(self.microBatchSize) || self.globalBatchSize % self.microBatchSize == 0",
            "microBatchSize must divide globalBatchSize; leave it out to let the plan choose",
        ),
    )

    epochs: float = Field(default=3, gt=0, le=1000, description="Passes over the training rows.")
    max_steps: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Stop after this many optimizer steps, if that comes first."
    )
    global_batch_size: int = Field(default=16, ge=1, le=65_536, description="Rows per optimizer step, over all GPUs.")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Rows per forward pass on one device; must divide globalBatchSize. Default: chosen by the plan.",
    )
    learning_rate: float = Field(default=2e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    scheduler: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Course of the learning rate after the warm-up."
    )
    warmup_ratio: float = Field(default=0.03, ge=0, le=1, description="Share of the steps with a rising learning rate.")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="Decoupled weight decay of AdamW.")
    max_grad_norm: float = Field(default=1.0, gt=0, le=1000, description="Gradients are clipped to this global norm.")
    max_length: int = Field(
        default=2048, ge=16, le=1_048_576, description="Tokens a row may have; a longer row is cut at its end."
    )
    packing: bool = Field(
        default=True,
        description=(
            "Join the rows of a micro-batch into one sequence without padding. Rows do not see each other and a step "
            "keeps its rows, so only the speed changes."
        ),
    )
    loss: Literal["completion", "all"] = Field(
        default="completion", description="Learn the answer's tokens only, or the prompt's as well."
    )
    seed: int = Field(default=42, ge=0, le=4_294_967_295, description="Seed of data order, dropout and adapter.")


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
    """What the training pod asks for."""

    gpus_per_node: int = Field(default=1, ge=0, le=1, description="GPUs of the training pod; 0 trains on the CPU.")
    gpu_product: str = Field(
        default="", max_length=63, description="Required value of the node label nvidia.com/gpu.product; empty: any."
    )
    cpu: Quantity = Field(default="2", description="CPU request of the training pod.")
    memory: Quantity = Field(default="16Gi", description="Memory request and limit of the training pod.")
    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=16)] = Field(
        default={}, description="Labels that the node must have."
    )
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=16)] = Field(
        default=(), description="Taints that the training pod tolerates; nvidia.com/gpu is tolerated anyway."
    )


class EvaluationSpec(ApiModel):
    """What is reported beside the held-out loss."""

    generations: int = Field(
        default=3, ge=0, le=64, description="Held-out prompts that base model and adapter answer, for the report."
    )


class OutputSpec(ApiModel):
    """Where the result goes."""

    model_config = _cel(
        (_IN_CLUSTER, "file:// works with 'qlora run' only; use s3://bucket/prefix"),
        _S3_SHAPE,
    )

    uri: OutputUri = Field(
        description="Prefix for the result, s3://bucket/prefix; the adapter lands in <uri>/<name>/<digest>/adapter.",
        examples=["s3://adapters/team-a"],
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY; AWS_REGION, AWS_ENDPOINT_URL if needed.",
    )
    service_account_name: ObjectName | None = Field(
        default=None, description="ServiceAccount of the pods, for workload identity instead of a Secret."
    )
    if_exists: Literal["Skip", "Fail"] = Field(
        default="Skip", description="When the same result is published already: succeed without a GPU, or fail."
    )


class DeadlinesSpec(ApiModel):
    """When waiting ends."""

    startup: Duration = Field(
        default="30m", description="Longest time from a pod's placement on a node to its first breath."
    )
    total: Duration = Field(default="24h", description="Longest time that the training attempt may take.")


MUTABLE_FIELDS: Final = frozenset({"deadlines"})
"""Fields of the spec that may change after creation; every other block is immutable as a whole."""


def _immutable(field: str) -> tuple[str, str]:
    return f"self.{field} == oldSelf.{field}", f"spec.{field} cannot change; create a QLoRAJob with another name"


class QLoRAJobSpec(ApiModel):
    """What to fine-tune, on what, how, and where the adapter goes."""

    model_config = _cel(
        (
            "self.method != 'qlora' || self.quantization.bits in [4, 8]",
            "method qlora needs quantization.bits 4 or 8; for a 16-bit base set method to lora",
        ),
        (
            "self.method != 'lora' || self.quantization.bits == 16",
            "method lora needs quantization.bits 16; for a quantised base set method to qlora",
        ),
        *map(
            _immutable,
            ("method", "model", "dataset", "quantization", "lora", "training", "resources", "evaluation", "output"),
        ),
    )

    method: Literal["qlora", "lora"] = Field(
        default="qlora", description="qlora: adapter on a quantised base; lora: adapter on a 16-bit base."
    )
    model: ModelSpec = Field(description="The base model.")
    dataset: DatasetSpec = Field(description="The rows to learn from.")
    quantization: QuantizationSpec = Field(default=QuantizationSpec(), description="How the base weights are stored.")
    lora: LoraSpec = Field(default=LoraSpec(), description="The low-rank adapter.")
    training: TrainingSpec = Field(default=TrainingSpec(), description="The optimisation.")
    resources: ResourcesSpec = Field(default=ResourcesSpec(), description="What the training pod asks for.")
    evaluation: EvaluationSpec = Field(default=EvaluationSpec(), description="What is reported beside the loss.")
    output: OutputSpec = Field(description="Where the result goes.")
    deadlines: DeadlinesSpec = Field(default=DeadlinesSpec(), description="When waiting ends. May be changed later.")


class Condition(ApiModel):
    """A Kubernetes condition."""

    type: ConditionType = Field(description="What the condition is about.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: Reason = Field(description="Why, in one word of a closed list.")
    message: Annotated[str, Field(max_length=32_768)] = Field(description="Why, in a sentence.")
    last_transition_time: datetime = Field(description="When the status last changed.")
    observed_generation: int = Field(ge=0, description="The generation that the condition speaks of.")


class ModelStatus(ApiModel):
    """What the model was resolved to."""

    uri: Annotated[str, Field(max_length=MAX_URI)] = Field(description="The model, as in the spec.")
    commit: Annotated[str, Field(max_length=64)] = Field(description="Commit or content hash that is trained on.")
    architecture: Annotated[str, Field(max_length=128)] = Field(description="Class of the model.")
    parameters: int = Field(ge=0, description="Weights of the base model.")


class DataStatus(ApiModel):
    """What the dataset turned out to be."""

    digest: Annotated[str, Field(max_length=64)] = Field(description="SHA-256 over the rows in use, as hex digits.")
    format: Annotated[str, Field(max_length=32)] = Field(description="Format of the rows.")
    training_rows: int = Field(ge=0, description="Rows to learn from.")
    evaluation_rows: int = Field(ge=0, description="Rows held out.")
    training_tokens: int = Field(ge=0, description="Tokens in the training rows.")
    truncated_rows: int = Field(ge=0, description="Rows that were cut at training.maxLength.")
    longest_row_tokens: int = Field(ge=0, description="Tokens of the longest row, before any cut.")


class Plan(ApiModel):
    """How the run is executed: chosen by the operator, recorded in status, followed by the trainer."""

    device: Literal["cpu", "cuda"] = Field(description="Where the training runs.")
    nodes: int = Field(ge=1, description="Pods, one per node.")
    gpus_per_node: int = Field(ge=0, description="GPUs of each pod.")
    micro_batch_size: int = Field(ge=1, description="Rows per forward pass.")
    gradient_accumulation: int = Field(ge=1, description="Forward passes per optimizer step.")
    total_steps: int = Field(ge=1, description="Optimizer steps of the run.")
    reasons: Annotated[tuple[Annotated[str, Field(max_length=256)], ...], Field(max_length=32)] = Field(
        default=(), description="Why each choice was made."
    )


class Attempt(ApiModel):
    """One training Job."""

    number: int = Field(ge=1, description="Counts from 1.")
    job: Annotated[str, Field(max_length=63)] = Field(description="Name of the batch/v1 Job.")
    reason: Reason | None = Field(default=None, description="How it ended; absent while it runs.")
    message: Annotated[str, Field(max_length=4096)] = Field(default="", description="How it ended, in a sentence.")
    started_at: datetime | None = Field(default=None, description="When its container started.")
    finished_at: datetime | None = Field(default=None, description="When it ended.")


class Metrics(ApiModel):
    """Quality on the held-out rows; every mean is over supervised tokens."""

    loss: float = Field(description="Mean cross-entropy, in nats per token.")
    perplexity: float = Field(description="exp(loss).")
    token_accuracy: float = Field(ge=0, le=1, description="Share of tokens that are the model's first choice.")


class EvaluationStatus(ApiModel):
    """Base model and adapter on the same held-out rows."""

    base: Metrics = Field(description="Without the adapter.")
    adapter: Metrics = Field(description="With the adapter.")
    rows: int = Field(ge=0, description="Held-out rows.")
    tokens: int = Field(ge=0, description="Supervised tokens in them.")


class OutputStatus(ApiModel):
    """Where the result is."""

    digest: Annotated[str, Field(max_length=64)] = Field(description="Digest of everything that decides the result.")
    prefix: Annotated[str, Field(max_length=2048)] = Field(description="Prefix that holds everything of this result.")
    adapter: Annotated[str, Field(max_length=2048)] | None = Field(default=None, description="URI of the adapter.")
    report: Annotated[str, Field(max_length=2048)] | None = Field(default=None, description="URI of report.json.")


class Progress(ApiModel):
    """The last report of the running pod."""

    percent: int = Field(default=0, ge=0, le=100, description="Share of the optimizer steps that are done.")
    step: int | None = Field(default=None, ge=0, description="Optimizer steps done.")
    total_steps: int | None = Field(default=None, ge=0, description="Optimizer steps of the run.")
    remaining_seconds: int | None = Field(default=None, ge=0, description="Estimated seconds to the end of training.")
    loss: float | None = Field(default=None, description="Latest training loss, in nats per token.")
    tokens_per_second: float | None = Field(default=None, ge=0, description="Non-padding tokens per second.")
    phase: Phase | None = Field(default=None, description="Training, Evaluating or Publishing.")
    updated_at: datetime = Field(description="When the pod reported.")


class QLoRAJobStatus(ApiModel):
    """Where the run stands."""

    observed_generation: int = Field(default=-1, ge=-1, description="The generation that this status speaks of.")
    phase: Phase | None = Field(default=None, description="One word; the conditions are the truth.")
    reason: Reason | None = Field(default=None, description="Reason of the phase.")
    message: Annotated[str, Field(max_length=32_768)] | None = Field(default=None, description="The phase, explained.")
    progress: Annotated[str, Field(max_length=8)] | None = Field(default=None, description="For the PROGRESS column.")
    eta: Annotated[str, Field(max_length=16)] | None = Field(default=None, description="Time left, for the ETA column.")
    loss: Annotated[str, Field(max_length=16)] | None = Field(default=None, description="For the LOSS column.")
    step: Annotated[str, Field(max_length=32)] | None = Field(default=None, description="For the STEP column.")
    tokens_per_second: Annotated[str, Field(max_length=16)] | None = Field(
        default=None, description="For the TOK/S column."
    )
    gpus: int | None = Field(default=None, ge=0, description="GPUs that the run holds or will ask for.")
    attempt: int | None = Field(default=None, ge=1, description="Number of the latest attempt.")
    started_at: datetime | None = Field(default=None, description="When the operator first saw the job.")
    finished_at: datetime | None = Field(default=None, description="When the job ended.")
    model: ModelStatus | None = Field(default=None, description="What the model was resolved to.")
    dataset: DataStatus | None = Field(default=None, description="What the dataset turned out to be.")
    plan: Plan | None = Field(default=None, description="How the run is executed.")
    last_report: Progress | None = Field(default=None, description="The last report of the running pod.")
    attempts: Annotated[tuple[Attempt, ...], Field(max_length=100)] = Field(
        default=(), description="Training attempts, oldest first."
    )
    evaluation: EvaluationStatus | None = Field(default=None, description="Base model and adapter compared.")
    output: OutputStatus | None = Field(default=None, description="Where the result is.")
    conditions: Annotated[tuple[Condition, ...], Field(max_length=16)] = Field(
        default=(), description="The truth about the run, in Kubernetes's form."
    )
