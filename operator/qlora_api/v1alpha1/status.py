"""The status of a QLoRAJob."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal

from pydantic import AwareDatetime, Field

from qlora_api.accelerators import PRODUCT_LABELS, DeviceName
from qlora_api.base import ApiModel, Sha256
from qlora_api.model_config import MAX_CONFIG
from qlora_api.names import MOST_PREPARATIONS, RETRY_ANNOTATION, ConditionType, Phase
from qlora_api.reasons import Domain, Reason
from qlora_api.strategies import SINGLE, StrategyName
from qlora_api.v1alpha1.types import MAX_URI, ClassName
from qlora_api.v1alpha1.usage import AttemptUsage, GpuUsage, RunUsage

MAX_INSTALLATION: Final = 63 + 1 + 253
"""Longest namespace, a slash, and longest name of a Lease."""
MAX_MESSAGE: Final = 32_768
"""Longest message of a condition (Kubernetes API conventions), and of a status."""
MAX_PLAN_REASON: Final = 256
"""Longest reason of a plan."""
MAX_PULL_SECRETS: Final = 32
"""Pull secrets that a plan records at most; pods have one or two."""
MAX_PLAN_REASONS: Final = 32
MAX_GPU_PRODUCTS: Final = 32
"""Most GPU products that a plan names; clusters have a handful."""
MAX_SUMMARY: Final = 100
"""Longest beginning of a message that a column shows, in characters."""
MAX_RETRY_REQUEST: Final = 64
"""Longest recorded value of the annotation; a longer one is recorded as its SHA-256."""
MAX_ATTEMPT_MESSAGE: Final = 4096
"""Longest message of an attempt: as long as a termination message."""
MAX_ATTEMPTS_LISTED: Final = 100
"""Longest status.attempts; older attempts are summed up in status.earlierAttempts."""
MAX_AVOIDED_NODES: Final = 16
"""Most nodes that one attempt avoids: those that failed last."""

MAX_CONTAINER_SECONDS: Final = 10**9
"""Longest time of an attempt, 31 years: longer than any deadline that is not capped."""


class Condition(ApiModel):
    """A Kubernetes condition."""

    type: ConditionType = Field(description="What the condition is about.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: Reason = Field(description="Why: one of a fixed list of reasons.")
    message: Annotated[str, Field(max_length=MAX_MESSAGE)] = Field(description="Why, in a sentence.")
    last_transition_time: datetime = Field(description="When the status last changed.")
    observed_generation: int = Field(ge=0, description="The generation that the condition refers to.")


class ModelStatus(ApiModel):
    """What the model was resolved to."""

    uri: Annotated[str, Field(max_length=MAX_URI)] = Field(description="The model, as in the spec.")
    commit: Annotated[str, Field(max_length=64)] = Field(description="Commit or content hash used for training.")
    architecture: Annotated[str, Field(max_length=128)] = Field(description="Class of the model.")
    parameters: int = Field(ge=0, description="Weights of the base model.")
    config: Annotated[str, Field(max_length=MAX_CONFIG)] = Field(
        default="", description="The part of its config.json that decides the model's size, as JSON."
    )


class RowLengths(ApiModel):
    """Length of the rows in tokens, before truncation."""

    mean: float = Field(ge=0, description="Mean.")
    p50: int = Field(ge=0, description="Median: half of the rows are at most this long.")
    p95: int = Field(ge=0, description="95 % of the rows are at most this long.")
    p99: int = Field(ge=0, description="99 % of the rows are at most this long.")


class DataStatus(ApiModel):
    """What preparation found in the dataset."""

    digest: Annotated[str, Field(max_length=64)] = Field(description="SHA-256 over the rows in use, in hex.")
    format: Annotated[str, Field(max_length=32)] = Field(description="Formats of the rows, separated by +.")
    training_rows: int = Field(ge=0, description="Training rows.")
    evaluation_rows: int = Field(ge=0, description="Held-out rows.")
    training_tokens: int = Field(ge=0, description="Tokens in the training rows.")
    truncated_rows: int = Field(ge=0, description="Rows truncated to training.maxLength.")
    dropped_rows: int = Field(
        default=0, ge=0, description="Rows left out: too long (training.longRows), or without a token to train on."
    )
    split_rows: int = Field(
        default=0,
        ge=0,
        description="Conversations of which several rows were made, as the chat template rewrites earlier answers.",
    )
    invalid_rows: int = Field(
        default=0, ge=0, description="Rows left out as they cannot be used (dataset.onInvalidRow)."
    )
    invalid_row_numbers: Annotated[tuple[Annotated[str, Field(max_length=64)], ...], Field(max_length=20)] = Field(
        default=(), description="The first of them: their files, if there are several, and their numbers."
    )
    longest_row_tokens: int = Field(ge=0, description="Tokens of the longest row, before truncation.")
    row_lengths: RowLengths | None = Field(default=None, description="Lengths of the training and held-out rows.")


class Plan(ApiModel):
    """How the run is executed: chosen by the operator, recorded in status, followed by the trainer."""

    device: DeviceName = Field(description="Device to train on.")
    nodes: int = Field(ge=1, description="Pods, one per node.")
    gpus_per_node: int = Field(ge=0, description="GPUs per pod.")
    strategy: StrategyName = Field(default=SINGLE.name, description="How training is distributed over the processes.")
    micro_batch_size: int = Field(ge=1, description="Rows per forward pass.")
    gradient_accumulation: int = Field(ge=1, description="Forward passes per optimizer step in each process.")
    total_steps: int = Field(ge=1, description="Optimizer steps of the run.")
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="Whether activations are recomputed in the backward pass; absent: the trainer decides.",
    )
    gpu_product: Annotated[str, Field(max_length=63)] | None = Field(
        default=None, description=f"Value of {PRODUCT_LABELS} that the run was sized for; absent: any."
    )
    gpu_products: (
        Annotated[tuple[Annotated[str, Field(max_length=63)], ...], Field(max_length=MAX_GPU_PRODUCTS)] | None
    ) = Field(
        default=None,
        description=(
            f"Values of {PRODUCT_LABELS} of the nodes that its pods may run on, in the order in which they are "
            "preferred, the smallest GPU first; absent: gpuProduct only."
        ),
    )
    min_gpu_memory: int | None = Field(
        default=None,
        ge=1,
        description="Least memory of each GPU in bytes, where products do not tell it; absent: gpuProducts decide.",
    )
    peak_bytes: int | None = Field(default=None, ge=0, description="Estimated peak memory per GPU, in bytes.")
    image: Annotated[str, Field(max_length=1024)] | None = Field(
        default=None,
        description=(
            "Trainer image that prepared the run; every later pod of the run has it too, whatever image the "
            "installation changes to. Absent: the installation's."
        ),
    )
    image_pull_secrets: (
        Annotated[tuple[Annotated[str, Field(max_length=253)], ...], Field(max_length=MAX_PULL_SECRETS)] | None
    ) = Field(
        default=None,
        description="Secrets with which that image was pulled; later pods have them besides the installation's.",
    )
    reasons: Annotated[
        tuple[Annotated[str, Field(max_length=MAX_PLAN_REASON)], ...], Field(max_length=MAX_PLAN_REASONS)
    ] = Field(default=(), description="Why each choice was made.")

    @property
    def processes_per_node(self) -> int:
        """Return the number of processes per pod: one per GPU, or one on a CPU."""
        return max(self.gpus_per_node, 1)

    @property
    def processes(self) -> int:
        """Return the number of processes of the run."""
        return self.nodes * self.processes_per_node


class Checkpoint(ApiModel):
    """A training state in the output, from which the next attempt resumes."""

    step: int = Field(ge=0, description="Optimizer steps done.")
    uri: Annotated[str, Field(max_length=2048)] = Field(description="Folder with its files and their manifest.")
    time: AwareDatetime = Field(description="When it was completed.")
    verified: bool = Field(default=False, description="Whether the store confirmed the SHA-256 of every file.")
    digest: Annotated[Sha256, Field(max_length=64)] | None = Field(
        default=None, description="SHA-256 of its manifest, in hex; absent if an earlier version wrote it."
    )


class ManifestRef(ApiModel):
    """The manifest of a result, as the pod that writes it reported it."""

    uri: Annotated[str, Field(max_length=2048)] = Field(description="URI of the manifest.")
    digest: Annotated[Sha256, Field(max_length=64)] = Field(description="SHA-256 of the manifest, in hex.")


class Attempt(ApiModel):
    """One training Job."""

    number: int = Field(ge=1, description="Counts from 1.")
    job: Annotated[str, Field(max_length=63)] = Field(description="Name of the batch/v1 Job.")
    reason: Reason | None = Field(default=None, description="How it ended; absent while it runs.")
    domain: Domain | None = Field(
        default=None,
        description="Where the cause of its end lies, which decides the retry budget that it counts against.",
    )
    message: Annotated[str, Field(max_length=MAX_ATTEMPT_MESSAGE)] = Field(
        default="", description="How it ended, in a sentence."
    )
    lacking_pods: int | None = Field(
        default=None,
        ge=1,
        description="Pods that its gang lacked as it ended: not created, or without a node; the next pause is longer.",
    )
    micro_batch_size: int | None = Field(default=None, ge=1, description="Rows per forward pass.")
    node: Annotated[str, Field(max_length=253)] = Field(
        default="", description="Node of the pod whose end ended it; while it runs, of the first pod."
    )
    avoided_nodes: (
        Annotated[tuple[Annotated[str, Field(max_length=253)], ...], Field(max_length=MAX_AVOIDED_NODES)] | None
    ) = Field(default=None, description="Nodes on which its pods may not run, because attempts failed there.")
    checkpoint_step: int | None = Field(
        default=None,
        ge=0,
        description="Step of the newest checkpoint of the run while it ran; a new one refills budgets.",
    )
    started_at: datetime | None = Field(default=None, description="When its container first started.")
    running_since: datetime | None = Field(
        default=None,
        description="When the containers started that run now; absent while the attempt waits, such as in its queue.",
    )
    container_seconds: int | None = Field(
        default=None,
        ge=0,
        le=MAX_CONTAINER_SECONDS,
        description="Seconds that its containers ran, without those that run now; deadlines.total limits their sum.",
    )
    finished_at: datetime | None = Field(default=None, description="When it ended.")
    usage: AttemptUsage | None = Field(
        default=None, description="GPU-seconds that its pods held; absent if an earlier version recorded the attempt."
    )

    def run_time(self, now: datetime) -> timedelta:
        """Return how long its containers have run."""
        running = max(now - self.running_since, timedelta(0)) if self.running_since else timedelta(0)
        if self.container_seconds is not None:
            return timedelta(seconds=self.container_seconds) + running
        if running or self.started_at is None or self.finished_at is None:
            return running
        return self.finished_at - self.started_at  # of an operator that recorded only these


class EarlierAttempts(ApiModel):
    """Attempts that status.attempts has no room for."""

    count: int = Field(ge=0, description="How many.")
    seconds: int = Field(ge=0, description="What they took of spec.deadlines.total.")
    usage: GpuUsage | None = Field(default=None, description="GPU-seconds that their pods held.")


class RetryLimits(ApiModel):
    """The limits of the spec with which a run failed; raising the one that it exceeded continues the run."""

    max_attempts: int = Field(ge=1, description="spec.retries.maxAttempts.")
    total: Annotated[str, Field(max_length=16)] = Field(description="spec.deadlines.total.")
    startup: Annotated[str, Field(max_length=16)] = Field(description="spec.deadlines.startup.")


class Preparation(ApiModel):
    """The current preparation, and the failures since the last one that was needed."""

    number: int = Field(default=1, ge=1, le=MOST_PREPARATIONS, description="Counts the prepare Jobs from 1.")
    failures: int = Field(default=0, ge=0, description="Failed preparations since the last success or suspension.")
    unexplained: int = Field(
        default=0, ge=0, description="How many of the last ones in a row ended without a termination message."
    )
    reason: Reason | None = Field(default=None, description="How the last of them ended, or why there is no plan yet.")
    message: Annotated[str, Field(max_length=MAX_ATTEMPT_MESSAGE)] = Field(
        default="", description="How it ended, in a sentence."
    )
    failing_since: datetime | None = Field(default=None, description="When the first of them ended.")
    missing_since: datetime | None = Field(
        default=None, description="When the first of them ended that lacked a Secret, a model, a dataset or access."
    )
    retry_at: datetime | None = Field(
        default=None, description="When the next prepare Job is created, or the nodes are checked again."
    )
    avoided_nodes: Annotated[tuple[Annotated[str, Field(max_length=253)], ...], Field(max_length=8)] = Field(
        default=(), description="Nodes of the last pods that failed; the next pod prefers others."
    )


class Metrics(ApiModel):
    """Quality on the held-out rows: means over supervised tokens, and over answers if any were generated."""

    loss: float = Field(description="Mean cross-entropy, in nats per token.")
    perplexity: float = Field(description="exp(loss).")
    token_accuracy: float = Field(ge=0, le=1, description="Share of tokens that the model ranks first.")
    exact_match: float | None = Field(
        default=None, ge=0, le=1, description="Share of greedy answers equal to the reference, ignoring whitespace."
    )
    rouge_l: float | None = Field(
        default=None, ge=0, le=1, description="Mean ROUGE-L F-measure of greedy answers against their references."
    )


class EvaluationStatus(ApiModel):
    """Base model and adapter on the same held-out rows."""

    base: Metrics = Field(description="Without the adapter.")
    adapter: Metrics = Field(description="With the adapter.")
    rows: int = Field(ge=0, description="Held-out rows.")
    tokens: int = Field(ge=0, description="Supervised tokens in them.")
    answers: int = Field(default=0, ge=0, description="Held-out prompts answered, for exactMatch and rougeL.")


class OutputStatus(ApiModel):
    """Where the result is."""

    digest: Annotated[str, Field(max_length=64)] = Field(description="Digest of everything that decides the result.")
    prefix: Annotated[str, Field(max_length=2048)] = Field(description="Prefix that holds everything of this result.")
    adapter: Annotated[str, Field(max_length=2048)] | None = Field(default=None, description="URI of the adapter.")
    report: Annotated[str, Field(max_length=2048)] | None = Field(default=None, description="URI of report.json.")
    merged: Annotated[str, Field(max_length=2048)] | None = Field(default=None, description="URI of the merged model.")
    manifest: ManifestRef | None = Field(
        default=None,
        description="The manifest that a pod of the run has published, or was about to publish when it reported last.",
    )


class Progress(ApiModel):
    """The last report of the running pod."""

    percent: int = Field(default=0, ge=0, le=100, description="Percentage of optimizer steps done.")
    step: int | None = Field(default=None, ge=0, description="Optimizer steps done.")
    total_steps: int | None = Field(default=None, ge=0, description="Optimizer steps of the run.")
    remaining_seconds: int | None = Field(default=None, ge=0, description="Estimated seconds to the end of training.")
    loss: float | None = Field(default=None, description="Latest training loss, in nats per token.")
    tokens_per_second: float | None = Field(default=None, ge=0, description="Non-padding tokens per second.")
    phase: Phase | None = Field(default=None, description="Training, Evaluating or Publishing.")
    checkpoint: Checkpoint | None = Field(default=None, description="The newest complete checkpoint.")
    manifest: ManifestRef | None = Field(default=None, description="The manifest that the pod is about to publish.")
    updated_at: datetime = Field(description="When the pod reported.")


class RetryStatus(ApiModel):
    """What became of the annotation qlora.dev/retry-requested-at."""

    request: Annotated[str, Field(max_length=MAX_RETRY_REQUEST)] = Field(
        description=f"Value of the annotation {RETRY_ANNOTATION} that was seen last; another one is a new request."
    )
    pending: bool = Field(default=False, description="Whether the retry is about to begin.")
    after_attempt: int = Field(
        default=0,
        ge=0,
        description="Attempts up to this number were made before the last retry; budgets count later ones.",
    )
    time: datetime | None = Field(default=None, description="When the last retry began; absent if there was none.")


class ClassStatus(ApiModel):
    """A QLoRAClass as a run used it last; without the class, the run continues with it."""

    name: ClassName = Field(description="Name of the QLoRAClass.")
    generation: int = Field(ge=0, description="Its metadata.generation.")
    settings: Mapping[str, Any] = Field(description="What it sets: its spec, without namespaces.")


class QLoRAJobStatus(ApiModel):
    """The current state of the run."""

    observed_generation: int = Field(default=-1, ge=-1, description="The generation that this status refers to.")
    phase: Phase | None = Field(default=None, description="Summary in one word; the conditions are authoritative.")
    reason: Reason | None = Field(default=None, description="Reason of the phase.")
    message: Annotated[str, Field(max_length=MAX_MESSAGE)] | None = Field(
        default=None, description="Explains the phase."
    )
    progress: Annotated[str, Field(max_length=8)] | None = Field(default=None, description="For the PROGRESS column.")
    eta: Annotated[str, Field(max_length=16)] | None = Field(default=None, description="Time left, for the ETA column.")
    loss: Annotated[str, Field(max_length=16)] | None = Field(default=None, description="For the LOSS column.")
    step: Annotated[str, Field(max_length=32)] | None = Field(default=None, description="For the STEP column.")
    tokens_per_second: Annotated[str, Field(max_length=16)] | None = Field(
        default=None, description="For the TOK/S column."
    )
    summary: Annotated[str, Field(max_length=MAX_SUMMARY)] | None = Field(
        default=None, description="The beginning of the message, for the MESSAGE column."
    )
    gpus: int | None = Field(default=None, ge=0, description="GPUs that pods of the run hold now.")
    usage: RunUsage | None = Field(
        default=None, description="GPU-seconds that the pods of all attempts held, and for what."
    )
    attempt: int | None = Field(default=None, ge=1, description="Number of the latest attempt.")
    operator: Annotated[str, Field(max_length=MAX_INSTALLATION)] | None = Field(
        default=None,
        description="The installation that reconciles the run, as namespace/name of its Lease; no other one does.",
    )
    started_at: datetime | None = Field(default=None, description="When the operator first saw the job.")
    finished_at: datetime | None = Field(default=None, description="When the job ended.")
    model: ModelStatus | None = Field(default=None, description="What the model was resolved to.")
    dataset: DataStatus | None = Field(default=None, description="What preparation found in the dataset.")
    used_class: ClassStatus | None = Field(
        default=None, alias="class", description="The QLoRAClass that the pods of the run have their settings from."
    )
    preparation: Preparation | None = Field(default=None, description="The current preparation.")
    plan: Plan | None = Field(default=None, description="How the run is executed.")
    last_report: Progress | None = Field(default=None, description="The last report of the running pod.")
    attempts: Annotated[tuple[Attempt, ...], Field(max_length=MAX_ATTEMPTS_LISTED)] = Field(
        default=(), description="Training attempts, oldest first: the first one and the newest."
    )
    earlier_attempts: EarlierAttempts | None = Field(
        default=None, description="The attempts between the first one and the others that are listed."
    )
    forgiven_attempts: int | None = Field(
        default=None, ge=1, description="Attempts up to this number no longer count against any retry budget."
    )
    retry_limits: RetryLimits | None = Field(
        default=None, description="The limits with which the run failed; raising the one that it exceeded continues it."
    )
    retry: RetryStatus | None = Field(
        default=None, description=f"The last request to try again after a failure (annotation {RETRY_ANNOTATION})."
    )
    checkpoint: Checkpoint | None = Field(
        default=None, description="What the next attempt resumes from; absent before the first, and once published."
    )
    evaluation: EvaluationStatus | None = Field(default=None, description="Base model and adapter compared.")
    output: OutputStatus | None = Field(default=None, description="Where the result is.")
    children_deleted_at: datetime | None = Field(
        default=None,
        description="When ttl had expired, and Jobs, pods, ConfigMaps and Services of the run were deleted.",
    )
    conditions: Annotated[tuple[Condition, ...], Field(max_length=16)] = Field(
        default=(), description="Kubernetes conditions of the run."
    )
