"""The recipe of a run: spec.quantization, spec.lora, spec.training, spec.evaluation."""

from typing import Annotated, Final, Literal

from pydantic import Field

from qlora_api.base import ApiModel
from qlora_api.optimizers import SUMMARY, AskedOptimizer
from qlora_api.v1alpha1.types import ModuleName, TaskName, cel


class QuantizationSpec(ApiModel):
    """How the frozen base weights are stored."""

    bits: Literal[4, 8, 16] = Field(
        default=4, description="Bits per weight: 4 or 8 (bitsandbytes) for method qlora, 16 for lora and full."
    )
    type: Literal["nf4", "fp4"] = Field(default="nf4", description="4-bit data type.")
    double_quant: bool = Field(
        default=True, description="Quantize the 4-bit scales as well (saves 0.37 bits per weight)."
    )


MAX_PATTERNS: Final = 64
"""Maximum number of modules with their own rank or alpha."""
Rank = Annotated[int, Field(ge=1, le=1024)]
Alpha = Annotated[int, Field(ge=1, le=4096)]


class LoraSpec(ApiModel):
    """The low-rank adapter."""

    model_config = cel(
        (
            "!('all-linear' in self.targets) || size(self.targets) == 1",
            "all-linear means every linear module; list it alone, or list module names without it",
        ),
        (
            "!(self.init in ['pissa', 'loftq'] && self.dora) && !(self.init == 'pissa' && self.rslora)",
            "init pissa and loftq do not work with dora, nor pissa with rslora; leave those false, or leave init out",
        ),
    )

    rank: Rank = Field(default=16, description="Rank r of the update matrices.")
    alpha: Alpha = Field(default=32, description="Scale: updates are multiplied by alpha / rank.")
    rank_pattern: Annotated[dict[ModuleName, Rank], Field(max_length=MAX_PATTERNS)] = Field(
        default={},
        description="Ranks of single modules, by name (v_proj) or path suffix (layers.0.self_attn.v_proj), which wins.",
    )
    alpha_pattern: Annotated[dict[ModuleName, Alpha], Field(max_length=MAX_PATTERNS)] = Field(
        default={}, description="Alphas of single modules, named as in rankPattern."
    )
    dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout on the adapter's input during training.")
    targets: Annotated[tuple[ModuleName, ...], Field(min_length=1, max_length=64)] = Field(
        default=("q_proj", "v_proj"),
        description="Linear modules that get an adapter (target_modules in peft), or the single word all-linear.",
    )
    dora: bool = Field(default=False, description="Weight-decomposed LoRA; vLLM cannot serve it unmerged.")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank.")
    init: Literal["default", "gaussian", "pissa", "loftq"] = Field(
        default="default",
        description=(
            "Initialization of the adapter. default, gaussian: no change to the base at first. pissa: the largest "
            "singular vectors of a 16-bit base; published for the original base, with twice the rank. loftq: offsets "
            "the error of 4-bit quantization; must be served on the same 4-bit base."
        ),
    )
    modules_to_save: Annotated[tuple[ModuleName, ...], Field(max_length=16)] = Field(
        default=(),
        description=(
            "Modules that are fully trained and saved with the adapter, such as embed_tokens, lm_head or norm. vLLM "
            "does not serve such an adapter unmerged."
        ),
    )


class EarlyStoppingSpec(ApiModel):
    """When training stops before its last step."""

    patience: int = Field(
        default=3,
        ge=1,
        le=1000,
        description="Stop after this many evaluations on the held-out rows without a lower loss.",
    )
    min_delta: float = Field(
        default=0.0, ge=0, le=100, description="Smallest decrease of the loss that counts, in nats per token."
    )


class TrainingSpec(ApiModel):
    """Training hyperparameters."""

    model_config = cel(
        (
            "!has(self.microBatchSize) || self.microBatchSize < 1 || self.globalBatchSize % self.microBatchSize == 0",
            "microBatchSize must divide globalBatchSize; leave it out to let the plan choose",
        ),
        (
            "has(self.evaluateEvery) || (!has(self.earlyStopping) && self.keep == 'last')",
            "earlyStopping and keep best need held-out losses; set evaluateEvery to a number of steps",
        ),
    )

    epochs: float = Field(default=3, gt=0, le=1000, description="Passes over the training rows.")
    max_steps: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Stop after this many optimizer steps, if that comes first."
    )
    global_batch_size: int = Field(
        default=16, ge=1, le=65_536, description="Batch size: rows per optimizer step, over all GPUs."
    )
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Rows per forward pass on one device; must divide globalBatchSize. Default: chosen by the plan.",
    )
    learning_rate: float = Field(default=2e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    scheduler: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Learning rate schedule after the warm-up."
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0, le=1, description="Share of the steps that warm up the learning rate."
    )
    optimizer: AskedOptimizer = Field(
        default="auto",
        description=f"{SUMMARY} auto: chosen from what is trained; the report has the reason.",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Decoupled weight decay of AdamW, on matrices only: not on norms or biases.",
    )
    max_grad_norm: float = Field(default=1.0, gt=0, le=1000, description="Gradients are clipped to this global norm.")
    max_length: int = Field(
        default=2048,
        ge=16,
        le=1_048_576,
        description="Maximum tokens per row; see longRows.",
    )
    packing: bool = Field(
        default=True,
        description=(
            "Pack the rows of a micro-batch into one sequence without padding. Rows do not attend to each other and a "
            "step keeps its rows, so only the speed changes."
        ),
    )
    loss: Literal["auto", "completion", "assistant", "all"] = Field(
        default="auto",
        description=(
            "Which tokens the loss covers. completion: the answer, in a chat only the last one; assistant: every "
            "answer in a chat; all: the prompt too; auto: every answer in a chat, the answer to a prompt, and all of a "
            "text."
        ),
    )
    long_rows: Literal["truncate", "drop", "refuse"] = Field(
        default="truncate",
        description=(
            "What happens to rows with more than maxLength tokens: truncate the end, drop the row, or refuse the run."
        ),
    )
    neftune_alpha: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="Noise on the embeddings during training (NEFTune): 5 is usual, 0 is off. Never during evaluation.",
    )
    evaluate_every: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="Evaluate on the held-out rows every this many steps. Default: only before and after training.",
    )
    early_stopping: EarlyStoppingSpec | None = Field(
        default=None, description="Stop when the held-out loss no longer improves. Default: train all steps."
    )
    keep: Literal["last", "best"] = Field(
        default="last", description="Which adapter is published: the last, or the one with the lowest held-out loss."
    )
    seed: int = Field(
        default=42, ge=0, le=4_294_967_295, description="Seed for data order, dropout and adapter initialization."
    )


class GateSpec(ApiModel):
    """Rules that a result must meet to be published; a rule that is left out is not checked."""

    max_loss_increase: float | None = Field(
        default=None,
        ge=-1,
        le=10,
        description=(
            "How much higher than the base's held-out loss the adapter's may be, as a fraction of it: 0 rejects an "
            "adapter that is worse, -0.1 one that is not at least 10 % better."
        ),
    )
    max_loss: float | None = Field(default=None, gt=0, le=1000, description="Highest held-out loss, in nats per token.")
    min_exact_match: float | None = Field(default=None, ge=0, le=1, description="Lowest exactMatch of the adapter.")
    min_rouge_l: float | None = Field(default=None, ge=0, le=1, description="Lowest rougeL of the adapter.")


class EvaluationSpec(ApiModel):
    """How base model and adapter are compared, besides the held-out loss."""

    model_config = cel(
        (
            "self.generations > 0 || (!has(self.gate.minExactMatch) && !has(self.gate.minRougeL))",
            "gate.minExactMatch and gate.minRougeL need answers; set generations to 1 or more, or leave them out",
        ),
    )

    generations: int = Field(
        default=16,
        ge=0,
        le=1024,
        description=(
            "Held-out prompts that base model and adapter answer with greedy decoding, for exactMatch, rougeL and the "
            "report. Text rows have no prompt and are skipped."
        ),
    )
    max_answer_tokens: int = Field(
        default=128, ge=1, le=4096, description="Maximum tokens per answer (max_new_tokens); a longer one is cut there."
    )
    tasks: Annotated[tuple[TaskName, ...], Field(max_length=16)] = Field(
        default=(),
        description=(
            "Public benchmarks for the report, by their names in lm-evaluation-harness (tasks, groups or tags), run on "
            "base model and adapter. Their data comes from the hub or its mirror, with the model's token."
        ),
        examples=[["arc_easy"]],
    )
    task_examples: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Use only this many examples per task, the first ones."
    )
    gate: GateSpec = Field(
        default=GateSpec(),
        description="Minimum quality of a result; one that fails is kept under rejected/ and not published.",
    )
