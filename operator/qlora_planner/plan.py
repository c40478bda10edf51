"""Makes the plan of a run: device, strategy, micro-batch and steps, each with its reason."""

from collections.abc import Sequence
from math import ceil
from typing import Any, Final, NamedTuple

from qlora_api.accelerators import DeviceName, usual_device
from qlora_api.escapes import cut_escaped, escape_line
from qlora_api.prepared import Prepared
from qlora_api.steps import steps_of_epochs, steps_per_epoch, total_steps
from qlora_api.strategies import DDP, SINGLE, Distribution, StrategyName
from qlora_api.units import format_gib
from qlora_api.v1alpha1 import DataStatus, Plan, QLoRAJobSpec, TrainingSpec
from qlora_api.v1alpha1.status import MAX_PLAN_REASON
from qlora_planner.explain import explain_sizing
from qlora_planner.gpu_choice import GpuChoice, choose_gpus, explain_unusable
from qlora_planner.gpu_inventory import GpuInventory, UnusableNodes
from qlora_planner.memory.estimate import SequenceLengths, TrainingWorkload
from qlora_planner.models.families import KNOWN_TYPES, read_recorded_shape
from qlora_planner.models.shapes import UnknownModelError
from qlora_planner.sizing import DoesNotFitError, Misfit, Sizing
from qlora_planner.suggestions import describe_misfit
from qlora_planner.time_estimate import explain_duration

MICRO_BATCH_GPU: Final = 4
"""Rows per forward pass on a GPU: the usual QLoRA recipe for 24 GB cards and up."""
MICRO_BATCH_CPU: Final = 16
"""Rows per forward pass on a CPU: each pass dequantizes the base once, so more rows share that cost."""


class MicroBatch(NamedTuple):
    """Rows per forward pass, and why."""

    size: int
    reason: str


class ChosenStrategy(NamedTuple):
    """The distribution strategy, and why."""

    name: StrategyName
    reason: str


class Steps(NamedTuple):
    """Optimizer steps, and why."""

    total: int
    reason: str


def make_plan(
    spec: QLoRAJobSpec,
    prepared: Prepared,
    inventory: GpuInventory = (),
    unusable: Sequence[UnusableNodes] = (),
) -> Plan:
    """Choose device, strategy, micro-batch and number of steps; sized by memory if GPUs and model are known.

    Args:
        spec: A spec without violations.
        prepared: What prepare found out about model and dataset.
        inventory: GPUs of the cluster; without any, the plan follows the default recipe.
        unusable: GPU products whose nodes never accept the pods of the run; the plan's reasons name them.

    Raises:
        DoesNotFitError: No GPU of the inventory can hold the run; the message says by how much, and what would fit.
        MismatchError: The spec asks for what the model does not have.

    """
    if not spec.resources.gpus_per_node:
        return _default_plan(spec, prepared, "cpu")
    try:
        sized = _size(spec, prepared, inventory, unusable)
    except UnknownModelError as error:
        unsized: tuple[str, ...] = (_explain_unsized(error),)
    else:
        if sized is not None:
            work, choice = sized
            return (_plan_of if work.knows_activations else _plan_by_weights)(work, choice, prepared)
        unsized = ("peak memory is not estimated: the cluster's nodes show fewer GPUs than the run needs",)
    most = max(inventory, key=lambda pool: pool.count_pods(1), default=None)
    device = most.accelerator.device if most else usual_device(spec.resources.gpus_per_node)
    return _default_plan(spec, prepared, device, (*unsized, *explain_unusable(unusable)))


def _size(
    spec: QLoRAJobSpec, prepared: Prepared, inventory: GpuInventory, unusable: Sequence[UnusableNodes]
) -> tuple[TrainingWorkload, GpuChoice] | None:
    """Return the GPUs and the layout of a run; None if the inventory has too few GPUs."""
    shape = read_recorded_shape(prepared.model.config)
    work = TrainingWorkload(spec, shape, sequence_lengths(prepared.dataset, spec.training))
    choice = choose_gpus(work, inventory, unusable)
    if isinstance(choice, Misfit):
        raise DoesNotFitError(describe_misfit(work, inventory, choice))
    return None if choice is None else (work, choice)


def _explain_unsized(error: UnknownModelError) -> str:
    """Return the cause of a plan without an estimate, and not the fix, which is for a run that is not yet planned."""
    cause = str(error).partition(";")[0].partition(KNOWN_TYPES)[0]
    return cut_escaped(escape_line(f"peak memory is not estimated: {cause}"), MAX_PLAN_REASON)


def sequence_lengths(dataset: DataStatus, training: TrainingSpec) -> SequenceLengths:
    """Return the lengths of the rows in tokens, cut to spec.training.maxLength."""
    longest = max(1, min(dataset.longest_row_tokens, training.max_length))
    mean = dataset.row_lengths.mean if dataset.row_lengths else longest
    return SequenceLengths(longest, max(1.0, min(mean, longest)))


def _plan_of(work: TrainingWorkload, choice: GpuChoice, prepared: Prepared) -> Plan:
    spec, sizing = work.spec, choice.sizing
    allocation, layout = sizing.allocation, sizing.layout
    rows = ceil(spec.training.global_batch_size / allocation.processes)
    steps = count_steps(spec.training, prepared.dataset.training_rows)
    return Plan(
        device=allocation.pool.accelerator.device,
        nodes=allocation.nodes,
        gpus_per_node=allocation.gpus_per_node,
        strategy=layout.strategy,
        micro_batch_size=layout.micro_batch,
        gradient_accumulation=ceil(rows / layout.micro_batch),
        total_steps=steps.total,
        gradient_checkpointing=layout.checkpointing,
        **_products_of(choice),
        peak_bytes=sizing.estimate.peak,
        reasons=(
            *explain_sizing(work, sizing),
            *choice.reasons,
            describe_accumulation(spec.training.global_batch_size, rows, layout.micro_batch, allocation.processes),
            steps.reason,
            *_explain_duration(work, sizing, steps.total),
        ),
    )


def _products_of(choice: GpuChoice) -> dict[str, Any]:
    """Return the fields of a plan that say on which GPUs its pods may run."""
    return {
        "gpu_product": choice.sizing.allocation.pool.product or None,
        "gpu_products": choice.products or None,
        "min_gpu_memory": choice.min_memory,
    }


def _plan_by_weights(work: TrainingWorkload, choice: GpuChoice, prepared: Prepared) -> Plan:
    """Choose by the default recipe, on GPUs that hold weights, adapter and optimizer of the run."""
    sizing = choice.sizing
    allocation, strategy = sizing.allocation, sizing.layout.strategy
    why = f"strategy {strategy}: {sizing.layout.sharing.chosen_because}"
    remarks = (_explain_weights(work, sizing), *choice.reasons)
    default = choose_strategy(work.spec.distribution, allocation.processes)
    chosen = default if default.name == strategy else ChosenStrategy(strategy, why)
    plan = _default_plan(work.spec, prepared, allocation.pool.accelerator.device, remarks, chosen)
    return plan.model_copy(update=_products_of(choice))


def _explain_weights(work: TrainingWorkload, sizing: Sizing) -> str:
    """Say what is known of the peak, and what is not."""
    least, usable = format_gib(sizing.estimate.minimum), format_gib(sizing.allocation.pool.usable)
    sentence = f"peak memory is not estimated: all but the activations takes {least} of {usable} per GPU"
    return cut_escaped(
        escape_line(f"{sentence}, and those of a model of type '{work.shape.family}' are not known"), MAX_PLAN_REASON
    )


def _explain_duration(work: TrainingWorkload, sizing: Sizing, steps: int) -> tuple[str, ...]:
    """Estimate the duration; published figures exist only for adapters on a frozen base."""
    if work.spec.method == "full":
        return ()
    allocation, weights = sizing.allocation, work.shape.parameters - work.shape.embedding.parameters
    tokens = steps * work.spec.training.global_batch_size * work.rows.mean
    recomputed = bool(sizing.layout.checkpointing)
    return explain_duration(allocation.pool.product, allocation.processes, weights, tokens, recomputed=recomputed)


def _default_plan(
    spec: QLoRAJobSpec,
    prepared: Prepared,
    device: DeviceName,
    remarks: Sequence[str] = (),
    strategy: ChosenStrategy | None = None,
) -> Plan:
    """Choose by the default recipe, without an estimate of memory; the remarks say why."""
    resources, training = spec.resources, spec.training
    strategy = strategy or choose_strategy(spec.distribution, resources.processes)
    rows = ceil(training.global_batch_size / resources.processes)
    micro_batch = choose_micro_batch(training, rows, device)
    accumulation = ceil(rows / micro_batch.size)
    steps = count_steps(training, prepared.dataset.training_rows)
    return Plan(
        device=device,
        nodes=resources.nodes,
        gpus_per_node=resources.gpus_per_node,
        strategy=strategy.name,
        micro_batch_size=micro_batch.size,
        gradient_accumulation=accumulation,
        total_steps=steps.total,
        reasons=(
            f"device {device}: spec.resources.gpusPerNode is {resources.gpus_per_node}",
            *([strategy.reason] if resources.processes > 1 else []),
            micro_batch.reason,
            describe_accumulation(training.global_batch_size, rows, micro_batch.size, resources.processes),
            steps.reason,
            *remarks,
        ),
    )


def choose_strategy(distribution: Distribution, processes: int) -> ChosenStrategy:
    """Choose the distribution strategy without an estimate of memory."""
    if processes == 1:
        return ChosenStrategy(SINGLE.name, SINGLE.summary)
    if distribution != "auto":
        return ChosenStrategy(distribution, f"strategy {distribution}: spec.distribution, for {processes} processes")
    why = "an adapter's gradients and optimizer are small, so sharding them gains nothing"
    return ChosenStrategy(DDP.name, f"strategy {DDP.name} for {processes} processes: {why}")


def choose_micro_batch(training: TrainingSpec, rows: int, device: DeviceName) -> MicroBatch:
    """Return the given micro-batch, or the largest divisor of the rows per process within the device's bound."""
    if training.micro_batch_size is not None:
        return MicroBatch(training.micro_batch_size, f"micro-batch {training.micro_batch_size}: given in the spec")
    bound, why = (
        (MICRO_BATCH_CPU, "a CPU pays for dequantization per forward pass, whatever its rows")
        if device == "cpu"
        else (MICRO_BATCH_GPU, "the usual recipe")
    )
    size = largest_divisor(rows, bound)
    global_batch_size = training.global_batch_size
    divided = f"globalBatchSize {global_batch_size}" if rows == global_batch_size else f"the {rows} rows of a process"
    return MicroBatch(size, f"micro-batch {size}: the largest divisor of {divided} up to {bound}; {why}")


def describe_accumulation(global_batch_size: int, rows: int, micro_batch: int, processes: int) -> str:
    """Return the reason for the gradient accumulation.

    Args:
        global_batch_size: Rows per optimizer step.
        rows: Rows per optimizer step and process.
        micro_batch: Rows per forward pass.
        processes: Number of processes.

    """
    passes = ceil(rows / micro_batch)
    if processes == 1:
        return f"gradient accumulation {passes}: {micro_batch} x {passes} = globalBatchSize {global_batch_size}"
    sign = "=" if micro_batch * passes * processes == global_batch_size else "for"
    product = f"{micro_batch} x {passes} x {processes} processes"
    return f"gradient accumulation {passes}: {product} {sign} globalBatchSize {global_batch_size}"


def largest_divisor(number: int, bound: int) -> int:
    """Return the largest divisor of a number that does not exceed the bound."""
    return next(size for size in range(min(number, bound), 0, -1) if number % size == 0)


def count_steps(training: TrainingSpec, rows: int) -> Steps:
    """Count the optimizer steps of a run over so many training rows."""
    per_epoch, total = steps_per_epoch(training, rows), total_steps(training, rows)
    epochs = f"{training.epochs:g} epochs x {per_epoch} steps ({rows} rows / {training.global_batch_size})"
    if total < steps_of_epochs(training, rows):
        return Steps(total, f"steps {total}: spec.training.maxSteps, before {epochs} end")
    return Steps(total, f"steps {total}: {epochs}")
