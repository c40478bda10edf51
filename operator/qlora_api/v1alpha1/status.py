"""The status of a QLoRAJob."""

from datetime import datetime
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, Field

from qlora_api.accelerators import NVIDIA, DeviceName
from qlora_api.base import ApiModel, Sha256
from qlora_api.model_config import MAX_CONFIG
from qlora_api.names import ConditionType, Phase
from qlora_api.reasons import Reason
from qlora_api.strategies import SINGLE, StrategyName
from qlora_api.v1alpha1.types import MAX_URI

MAX_MESSAGE: Final = 32_768
"""Longest message of a condition (Kubernetes API conventions), and of a status."""
MAX_ATTEMPT_MESSAGE: Final = 4096
"""Longest message of an attempt: as long as a termination message."""


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
        default=None, description=f"Value of {NVIDIA.product_label} that the run was sized for; absent: any."
    )
    peak_bytes: int | None = Field(default=None, ge=0, description="Estimated peak memory per GPU, in bytes.")
    reasons: Annotated[tuple[Annotated[str, Field(max_length=256)], ...], Field(max_length=32)] = Field(
        default=(), description="Why each choice was made."
    )

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


class Attempt(ApiModel):
    """One training Job."""

    number: int = Field(ge=1, description="Counts from 1.")
    job: Annotated[str, Field(max_length=63)] = Field(description="Name of the batch/v1 Job.")
    reason: Reason | None = Field(default=None, description="How it ended; absent while it runs.")
    message: Annotated[str, Field(max_length=MAX_ATTEMPT_MESSAGE)] = Field(
        default="", description="How it ended, in a sentence."
    )
    micro_batch_size: int | None = Field(default=None, ge=1, description="Rows per forward pass.")
    node: Annotated[str, Field(max_length=253)] = Field(
        default="", description="Node of the pod whose end ended it; while it runs, of the first pod."
    )
    started_at: datetime | None = Field(default=None, description="When its container started.")
    finished_at: datetime | None = Field(default=None, description="When it ended.")


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
    updated_at: datetime = Field(description="When the pod reported.")


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
    gpus: int | None = Field(default=None, ge=0, description="GPUs that the run holds or will request.")
    attempt: int | None = Field(default=None, ge=1, description="Number of the latest attempt.")
    started_at: datetime | None = Field(default=None, description="When the operator first saw the job.")
    finished_at: datetime | None = Field(default=None, description="When the job ended.")
    model: ModelStatus | None = Field(default=None, description="What the model was resolved to.")
    dataset: DataStatus | None = Field(default=None, description="What preparation found in the dataset.")
    plan: Plan | None = Field(default=None, description="How the run is executed.")
    last_report: Progress | None = Field(default=None, description="The last report of the running pod.")
    attempts: Annotated[tuple[Attempt, ...], Field(max_length=100)] = Field(
        default=(), description="Training attempts, oldest first."
    )
    checkpoint: Checkpoint | None = Field(
        default=None, description="What the next attempt resumes from; absent before the first, and once published."
    )
    evaluation: EvaluationStatus | None = Field(default=None, description="Base model and adapter compared.")
    output: OutputStatus | None = Field(default=None, description="Where the result is.")
    conditions: Annotated[tuple[Condition, ...], Field(max_length=16)] = Field(
        default=(), description="Kubernetes conditions of the run."
    )
