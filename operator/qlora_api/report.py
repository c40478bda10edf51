"""What the trainer leaves behind: its last word, the report and the manifest."""

from datetime import datetime
from typing import Annotated

from pydantic import Field

from qlora_api.base import ApiModel
from qlora_api.prepared import Prepared
from qlora_api.reasons import Reason
from qlora_api.result import Result
from qlora_api.v1alpha1 import (
    Checkpoint,
    EvaluationStatus,
    MergeBase,
    Plan,
    QLoRAJobSpec,
    QuantizationSpec,
    RowTemplate,
)

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TerminationMessage(ApiModel):
    """A container's termination message: one line of JSON, at most TERMINATION_MESSAGE_BYTES."""

    reason: Reason
    message: str = ""
    step: int | None = None
    """Optimizer steps that were done."""
    prepared: Prepared | None = None
    result: Result | None = None
    checkpoint: Checkpoint | None = None
    """The newest complete one, where the run did not end well."""


class Sample(ApiModel):
    """One held-out prompt, answered before and after."""

    prompt: str
    reference: str
    base: str
    adapter: str


class RowScore(ApiModel):
    """One model on one held-out row."""

    loss: float
    """Summed cross-entropy of the row's supervised tokens, in nats."""
    correct: int
    """Supervised tokens that are the model's first choice."""
    answer: str | None = None
    """The greedy answer, where one was asked for."""
    exact_match: float | None = None
    """1 where the answer equals the reference but for white space, else 0."""
    rouge_l: float | None = None
    """ROUGE-L F-measure of the answer, from 0 to 1."""


class EvaluatedRow(ApiModel):
    """One line of evaluation.jsonl; all figures of an evaluation follow from these lines."""

    tokens: int
    """Supervised tokens."""
    prompt: str
    reference: str
    base: RowScore
    adapter: RowScore


class Interval(ApiModel):
    """The range that a figure would probably stay in with other held-out rows of the same kind."""

    low: float
    high: float


class Intervals(ApiModel):
    """The intervals of one column of the comparison."""

    loss: Interval
    perplexity: Interval
    token_accuracy: Interval
    exact_match: Interval | None = None
    rouge_l: Interval | None = None


class Confidence(ApiModel):
    """Percentile bootstrap over held-out rows; docs/results.md has the algorithm."""

    level: float
    """Share of resamples inside an interval."""
    resamples: int
    seed: int
    base: Intervals
    adapter: Intervals
    change: Intervals
    """Adapter less base, both on the same resampled rows."""


class ServingCheck(ApiModel):
    """What vLLM would say to the adapter, by its rules; it never blocks publishing."""

    vllm: bool
    problems: tuple[str, ...] = ()
    max_lora_rank: int | None
    """The value for --max-lora-rank; None where vLLM has none that is high enough."""


class AdapterRecord(ApiModel):
    """qlora.json beside the adapter: what merging and asking need, and its weights do not say."""

    job: str
    digest: str
    base: str
    """URI of the base model."""
    commit: str
    method: str
    quantization: QuantizationSpec
    """How the base was stored in training."""
    dtype: str
    """What the base computed in."""
    attention: str
    """The attention kernel in use."""
    format: str
    """Format of the rows, and so of the prompts; several are joined by '+'. Chats are rendered by the chat template of
    the tokenizer beside the adapter."""
    template: RowTemplate | None = None
    """What made the prompts of instruction rows, where it was not the built-in one."""
    init: str = "default"
    """spec.lora.init: what the adapter started as."""
    parameters: int | None = None
    """Weights of the base."""


class MergeDifference(ApiModel):
    """A merged model in bf16 against base and adapter as they were trained, on the same held-out rows."""

    rows: int
    tokens: int
    """Supervised tokens in them, at which logits were compared."""
    max_logit: float
    """Largest absolute difference of a logit."""
    relative: float
    """Norm of all differences, over the norm of the unmerged model's logits."""
    same_choice: float
    """Share of tokens at which both have the same first choice."""
    unmerged_loss: float
    """In nats per token."""
    merged_loss: float


class MergeReport(ApiModel):
    """merge.json beside a merged model."""

    base: MergeBase
    difference: MergeDifference | None = None
    """None where there were no held-out rows to measure on."""


class TaskScore(ApiModel):
    """One metric of one public benchmark, before and after."""

    task: str
    metric: str
    """lm-evaluation-harness's name of it, with its filter where there is one."""
    base: float
    base_error: float | None
    """Standard error, where the harness knows one."""
    adapter: float
    adapter_error: float | None


class StepRecord(ApiModel):
    """One optimizer step."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    """Non-padding tokens of the step."""
    seconds: float


class TextSpan(ApiModel):
    """A part of a training row, as the model sees it."""

    text: str
    learned: bool


class ValidationRecord(ApiModel):
    """One look at the held-out rows while the training goes on."""

    step: int
    """Optimizer steps that were done."""
    loss: float
    token_accuracy: float
    seconds: float


class RunReport(ApiModel):
    """report.json: everything that report.html shows."""

    job: str
    namespace: str
    run: str = ""
    """Uid of the QLoRAJob; empty without a cluster."""
    attempt: int = 1
    """The attempt that published; earlier ones may have done a part of the steps."""
    digest: str
    spec: QLoRAJobSpec
    plan: Plan
    prepared: Prepared
    choices: dict[str, str]
    """What the hardware decided (dtype, attention, …), each with its reason."""
    history: tuple[StepRecord, ...]
    held_out: tuple[ValidationRecord, ...] = ()
    adapter_step: int
    """The step whose adapter was published: the last one, or the best."""
    evaluation: EvaluationStatus
    confidence: Confidence
    samples: tuple[Sample, ...]
    preview: tuple[tuple[TextSpan, ...], ...] = ()
    """Some training rows."""
    serving: ServingCheck
    tasks: tuple[TaskScore, ...] = ()
    """Public benchmarks, where spec.evaluation.tasks asks for any."""
    started_at: datetime
    finished_at: datetime
    training_seconds: float
    tokens_per_second: float
    """Non-padding tokens per second of training."""
    peak_memory_bytes: int
    """Peak of the device's memory on a GPU, of the resident set on a CPU."""
    versions: dict[str, str]


class ManifestFile(ApiModel):
    """One object of the result."""

    path: str
    """Relative to the manifest's folder."""
    size: int
    sha256: Sha256


class ResultManifest(ApiModel):
    """manifest.json, written last and only once: who finds it finds a complete, verified result."""

    digest: str
    job: str
    namespace: str
    run: str = ""
    """Uid of the QLoRAJob that published it; empty without a cluster."""
    base_model: str
    base_commit: str
    dataset_uri: str
    dataset_digest: str
    trainer_version: str
    created_at: datetime
    result: Result
    files: tuple[ManifestFile, ...]


class MergedManifest(ApiModel):
    """manifest.json of a merged model, written last and only once, as the adapter's."""

    digest: str
    model: str
    """URI of the merged model's folder."""
    adapter: str
    """URI of the adapter that was merged."""
    base_model: str
    base_commit: str
    created_at: datetime
    merge: MergeReport
    files: tuple[ManifestFile, ...]
