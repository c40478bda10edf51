"""The reasons of a plan: one sentence for each choice."""

from math import ceil
from typing import Final

from qlora_api.optimizers import ADAMW
from qlora_api.precision import OVERFLOWS_IN_FP16, compute_dtype_of
from qlora_api.units import GIB, format_gib
from qlora_planner.gpu_inventory import GpuPool
from qlora_planner.memory.estimate import TrainingWorkload
from qlora_planner.sizing import COMPUTE_BOUND_TOKENS, Sizing, micro_batches, pass_tokens

MIN_QUANTIZED_SHARE: Final = 0.5
"""Fraction of the layers' weights that is quantized, below which the plan says so (as prepare does)."""


def explain_sizing(work: TrainingWorkload, sizing: Sizing, *, flexible: bool = False) -> tuple[str, ...]:
    """Return the reasons of a sized plan, without those of its steps.

    Args:
        work: The run.
        sizing: GPUs and layout that were chosen for it.
        flexible: Whether the number of GPUs was chosen too, instead of taken from spec.resources.

    """
    work = work.on(sizing.allocation.pool.capability)
    return (
        _explain_gpus(sizing, flexible=flexible),
        *([_explain_strategy(work, sizing)] if sizing.allocation.processes > 1 else []),
        explain_dtype(sizing.allocation.pool, work.shape.family),
        *_explain_base(work),
        _explain_attention(work),
        _explain_optimizer(work, sizing),
        _explain_micro_batch(work, sizing),
        _explain_checkpointing(work, sizing),
        explain_peak(sizing),
    )


def _explain_gpus(sizing: Sizing, *, flexible: bool) -> str:
    allocation = sizing.allocation
    gpu = allocation.pool.product or f"GPU of {format_gib(allocation.pool.memory)}"
    nodes = f"{allocation.nodes} node{'s' if allocation.nodes > 1 else ''}"
    why = "the fewest that fit" if flexible else "as spec.resources asks"
    return f"{allocation.gpus_per_node} x {gpu} on {nodes}: {why}"


def _explain_strategy(work: TrainingWorkload, sizing: Sizing) -> str:
    strategy = sizing.layout.strategy
    if work.spec.distribution != "auto":
        return f"strategy {strategy}: spec.distribution"
    return f"strategy {strategy}: {sizing.layout.sharing.chosen_because}"


def explain_dtype(pool: GpuPool, family: str) -> str:
    """Explain in which dtype the trainer will compute a model of this family."""
    if pool.capability is None:
        older = "float32, as this family overflows in float16" if family in OVERFLOWS_IN_FP16 else "float16"
        return f"dtype bfloat16 where the GPU has it (sm_80 and later), else {older}"
    dtype, reason = compute_dtype_of(pool.capability, family)
    return f"dtype {dtype}: {reason}"


def _explain_base(work: TrainingWorkload) -> tuple[str, ...]:
    """Explain why a quantized base takes far more memory than its bits suggest, if it does."""
    shape, bits = work.shape, work.spec.quantization.bits
    layers = shape.parameters - shape.embedding.parameters - (0 if shape.tied else shape.head.weights)
    if bits == 16 or shape.quantizable > MIN_QUANTIZED_SHARE * layers:
        return ()
    unquantized = (layers - shape.quantizable) * work.width
    return (
        f"base: only {shape.quantizable / layers:.0%} of its layers' weights can be stored in {bits} bits; the rest, "
        f"such as stacked experts, takes {format_gib(unquantized)} in {8 * work.width}",
    )


def _explain_attention(work: TrainingWorkload) -> str:
    if work.attention == "eager":
        return "attention eager: the model caps attention scores, which SDPA cannot"
    return "attention sdpa: exact with packed rows; FlashAttention, where the image has it, takes less memory"


def _explain_optimizer(work: TrainingWorkload, sizing: Sizing) -> str:
    optimizer = sizing.layout.optimizer
    if work.spec.training.optimizer != "auto":
        return f"optimizer {optimizer}: spec.training.optimizer"
    if optimizer != ADAMW.name:
        return f"optimizer {optimizer}: with fp32 state the model would not fit"
    state = "all weights" if work.full_finetune else "an adapter"
    return f"optimizer {optimizer}: the fp32 state of {state} fits, in {format_gib(sizing.estimate.optimizer)}"


def _explain_micro_batch(work: TrainingWorkload, sizing: Sizing) -> str:
    size = sizing.layout.micro_batch
    if work.spec.training.micro_batch_size is not None:
        return f"micro-batch {size}: given in the spec"
    rows = ceil(work.spec.training.global_batch_size / sizing.allocation.processes)
    largest = micro_batches(work, sizing.allocation.processes)[0]
    if size < largest:
        how = "" if sizing.layout.checkpointing else " without recomputing"
        return f"micro-batch {size}: the largest divisor of a GPU's {rows} rows that fits{how}"
    if size < rows:
        return f"micro-batch {size}: rows of {work.rows.mean:.0f} tokens on average fill a pass of 4,096"
    return f"micro-batch {size}: all rows of a GPU's step in one pass"


def _explain_checkpointing(work: TrainingWorkload, sizing: Sizing) -> str:
    tokens = f"{pass_tokens(work, sizing):.0f} tokens a pass"
    if not sizing.layout.checkpointing:
        return f"gradient checkpointing off: activations of {tokens} fit, and recomputing them costs a forward pass"
    without = f"without it a pass of {COMPUTE_BOUND_TOKENS:,} tokens would not fit"
    return f"gradient checkpointing on: {without}; with it, {tokens}"


def explain_peak(sizing: Sizing) -> str:
    """Explain what fills the GPU."""
    estimate = sizing.estimate
    parts = {
        "base": estimate.base.total,
        "adapter": estimate.adapter,
        "gradients": estimate.gradients,
        "optimizer": estimate.optimizer,
        "activations": estimate.activations,
        "communication": estimate.communication,
        "context": estimate.non_torch,
    }
    note = "; tight: it fits if torch's allocator needs less than that slack" if sizing.tight else ""
    sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    usable = format_gib(sizing.allocation.pool.usable)
    return f"peak {format_gib(estimate.peak)} of {usable} per GPU: {sizes}, slack 7 %{note}"
