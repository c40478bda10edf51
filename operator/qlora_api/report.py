"""What the trainer writes: its termination message, the report, the manifests."""

import math
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AwareDatetime, BeforeValidator, Field

from qlora_api.base import ApiModel, ReportedModel, Sha256
from qlora_api.object_names import ObjectName
from qlora_api.prepared import Prepared
from qlora_api.reasons import Reason
from qlora_api.result import Result
from qlora_api.units import MIB
from qlora_api.v1alpha1 import (
    Checkpoint,
    EvaluationStatus,
    MergeBase,
    Plan,
    QLoRAJobSpec,
    QuantizationSpec,
    RowTemplate,
)
from qlora_api.v1alpha1.patterns import REVISION
from qlora_api.v1alpha1.types import ModelUri

MAX_MANIFEST_BYTES: Final = 4 * MIB
"""Largest manifest that is read: one lists some twenty files with about 200 bytes each, and 10,000 files have 2 MiB."""
UNEXPLAINED_EXIT: Final = "wrote no termination message"
"""Part of the message about an exit that nobody explains; such messages are not compared with each other."""


class TerminationMessage(ReportedModel):
    """A container's termination message: one line of JSON, at most TERMINATION_MESSAGE_BYTES.

    In a pod with sidecars the kubelet cuts it earlier, so what is needed most comes first, and the text last.
    """

    reason: Reason
    step: int | None = None
    """Optimizer steps done."""
    checkpoint: Checkpoint | None = None
    """The newest complete checkpoint, if the run did not succeed."""
    result: Result | None = None
    prepared: Prepared | None = None
    message: str = ""


class Sample(ApiModel):
    """One held-out prompt, with the answers of base model and adapter."""

    prompt: str
    reference: str
    base: str
    adapter: str


class RowScore(ApiModel):
    """Scores of one model on one held-out row."""

    loss: float
    """Summed cross-entropy of the row's supervised tokens, in nats."""
    correct: int
    """Supervised tokens that the model ranks first (argmax)."""
    answer: str | None = None
    """The answer by greedy decoding, if one was generated."""
    exact_match: float | None = None
    """1 if the answer equals the reference, ignoring whitespace, else 0."""
    rouge_l: float | None = None
    """ROUGE-L F-measure of the answer, from 0 to 1."""


class EvaluatedRow(ApiModel):
    """One line of evaluation.jsonl; every figure of an evaluation can be computed from these lines."""

    tokens: int
    """Supervised tokens."""
    prompt: str
    reference: str
    base: RowScore
    adapter: RowScore


class Interval(ApiModel):
    """A confidence interval of a metric, over other samples of held-out rows."""

    low: float
    high: float


class Intervals(ApiModel):
    """Confidence intervals of one column of the comparison."""

    loss: Interval
    perplexity: Interval
    token_accuracy: Interval
    exact_match: Interval | None = None
    rouge_l: Interval | None = None


class Confidence(ApiModel):
    """Percentile bootstrap over held-out rows; docs/results.md has the algorithm."""

    level: float
    """Confidence level: fraction of resamples inside an interval."""
    resamples: int
    seed: int
    base: Intervals
    adapter: Intervals
    change: Intervals
    """Adapter minus base, on the same resampled rows."""


class ServingCheck(ApiModel):
    """Whether vLLM would load the adapter, by its rules; never blocks publishing."""

    vllm: bool
    problems: tuple[str, ...] = ()
    max_lora_rank: int | None
    """The value for --max-lora-rank; None if the rank is above vLLM's maximum."""


class AdapterRecord(ApiModel):
    """qlora.json next to the adapter: what `qlora merge` and `qlora chat` need besides its weights."""

    job: str
    digest: str
    base: ModelUri
    """URI of the base model."""
    commit: Annotated[str, REVISION]
    method: str
    quantization: QuantizationSpec
    """How the base was stored in training."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Compute dtype of the base."""
    attention: Literal["eager", "sdpa", "flash_attention_2"]
    """Attention implementation in use; transformers would download any other name from the hub, as code."""
    format: str
    """Format of the rows, and so of the prompts; several are joined by '+'. Chats use the chat template of the
    tokenizer that is published with the adapter."""
    template: RowTemplate | None = None
    """Prompt template of instruction rows, if it was not the built-in one."""
    init: str = "default"
    """spec.lora.init."""
    parameters: int | None = None
    """Weights of the base."""


class MergeDifference(ApiModel):
    """A merged model in bf16 compared with its unmerged adapter, on the same held-out rows."""

    rows: int
    tokens: int
    """Supervised tokens in the rows, at which logits were compared."""
    max_logit: float
    """Largest absolute difference of a logit."""
    relative: float
    """Norm of all differences divided by the norm of the unmerged model's logits."""
    same_choice: float
    """Fraction of tokens at which both models rank the same token first."""
    unmerged_loss: float
    """In nats per token."""
    merged_loss: float


class MergeReport(ApiModel):
    """merge.json next to a merged model."""

    base: MergeBase
    difference: MergeDifference | None = None
    """None if there were no held-out rows to measure on."""


class TaskScore(ApiModel):
    """One metric of one public benchmark, for base model and adapter."""

    task: str
    metric: str
    """Its name in lm-evaluation-harness, with its filter if there is one."""
    base: float
    base_error: float | None
    """Standard error, if the harness computes one."""
    adapter: float
    adapter_error: float | None


def _number_from_json(value: Any) -> Any:
    """Return infinity for null, as which pydantic writes a number that is not finite."""
    return math.inf if value is None else value


class StepRecord(ApiModel):
    """One optimizer step."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: Annotated[float, BeforeValidator(_number_from_json)]
    """Before clipping; infinite in a step that fp16 loss scaling skipped."""
    tokens: int
    """Non-padding tokens of the step."""
    seconds: float


class TextSpan(ApiModel):
    """A part of a training row, as the model sees it."""

    text: str
    learned: bool
    """Whether the loss covers its tokens."""


class ValidationRecord(ApiModel):
    """One evaluation on the held-out rows during training."""

    step: int
    """Optimizer steps done."""
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
    """The attempt that published; earlier ones may have done some of the steps."""
    digest: str
    spec: QLoRAJobSpec
    plan: Plan
    prepared: Prepared
    choices: dict[str, str]
    """What was chosen by hardware (dtype, attention, …), each with its reason."""
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
    """Public benchmarks of spec.evaluation.tasks."""
    started_at: datetime
    finished_at: datetime
    training_seconds: float
    tokens_per_second: float
    """Non-padding tokens per second of training."""
    peak_memory_bytes: int
    """Peak reserved GPU memory, or peak resident set size on a CPU."""
    versions: dict[str, str]


class ManifestFile(ApiModel):
    """One object of the result."""

    path: ObjectName
    """Relative to the manifest's folder."""
    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class ResultManifest(ApiModel):
    """manifest.json, written last and only once: if it exists, the result is complete and verified."""

    digest: str
    full_digest: Sha256 | None = None
    """All 64 digits of the digest; None in manifests of earlier versions."""
    job: str
    namespace: str
    run: str = ""
    """Uid of the QLoRAJob that published it; empty without a cluster."""
    base_model: str
    base_commit: str
    dataset_uri: str
    dataset_digest: str
    trainer_version: str
    created_at: AwareDatetime
    result: Result
    files: tuple[ManifestFile, ...]


class MergedManifest(ApiModel):
    """manifest.json of a merged model; like the adapter's, written last and only once."""

    digest: str
    model: str
    """URI of the merged model's folder."""
    adapter: str
    """URI of the adapter that was merged."""
    base_model: str
    base_commit: str
    created_at: AwareDatetime
    merge: MergeReport
    files: tuple[ManifestFile, ...]
