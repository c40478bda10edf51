"""How a run is executed, each choice with its reason."""

import json
from math import ceil
from typing import Final, NamedTuple

from qlora_api.accelerators import DeviceName, usual_device
from qlora_api.prepared import Prepared
from qlora_api.steps import steps_of_epochs, steps_per_epoch, total_steps
from qlora_api.strategies import DDP, SINGLE, Distribution, StrategyName
from qlora_api.v1alpha1 import DataStatus, Plan, QLoRAJobSpec, TrainingSpec
from qlora_planner.explain import explain_sizing
from qlora_planner.gpu_inventory import GpuInventory
from qlora_planner.memory.estimate import SequenceLengths, TrainingWorkload
from qlora_planner.models.families import read_shape
from qlora_planner.models.shapes import UnknownModelError
from qlora_planner.sizing import DoesNotFitError, Misfit, Sizing, size_run
from qlora_planner.suggestions import describe_misfit
from qlora_planner.time_estimate import explain_duration

MICRO_BATCH_GPU: Final = 4
"""Rows per forward pass on a GPU: the usual QLoRA recipe for 24 GB cards and up."""
MICRO_BATCH_CPU: Final = 16
"""Rows per forward pass on a CPU: dequantising the base is paid per pass, so more rows share its cost."""


class MicroBatch(NamedTuple):
    """Rows per forward pass, and why."""

    size: int
    reason: str


class ChosenStrategy(NamedTuple):
    """How processes share the work, and why."""

    name: StrategyName
    reason: str


class Steps(NamedTuple):
    """Optimizer steps, and why."""

    total: int
    reason: str


def make_plan(spec: QLoRAJobSpec, prepared: Prepared, inventory: GpuInventory = ()) -> Plan:
    """Choose device, strategy, micro-batch and number of steps; sized where GPUs and model are known.

    Raises DoesNotFitError where no GPU of the offer can hold the run.
    """
    if spec.resources.gpus_per_node and (sized := _size(spec, prepared, inventory)) is not None:
        return _plan_of(sized, spec, prepared)
    return _default_plan(spec, prepared)


def _size(spec: QLoRAJobSpec, prepared: Prepared, inventory: GpuInventory) -> tuple[TrainingWorkload, Sizing] | None:
    """Return how a run fits the offer; None where model or offer are unknown, or too few GPUs are offered."""
    try:
        shape = read_shape(json.loads(prepared.model.config or "{}"))
        work = TrainingWorkload(spec, shape, sequence_lengths(prepared.dataset, spec.training))
        found = size_run(work, inventory)
    except UnknownModelError:
        return None
    if isinstance(found, Misfit):
        raise DoesNotFitError(describe_misfit(work, inventory, found))
    return None if found is None else (work, found)


def sequence_lengths(dataset: DataStatus, training: TrainingSpec) -> SequenceLengths:
    """Return the lengths of the rows as they are trained on."""
    longest = max(1, min(dataset.longest_row_tokens, training.max_length))
    mean = dataset.row_lengths.mean if dataset.row_lengths else longest
    return SequenceLengths(longest, max(1.0, min(mean, longest)))


def _plan_of(sized: tuple[TrainingWorkload, Sizing], spec: QLoRAJobSpec, prepared: Prepared) -> Plan:
    work, sizing = sized
    room, layout = sizing.allocation, sizing.layout
    share = ceil(spec.training.global_batch_size / room.processes)
    steps = count_steps(spec.training, prepared.dataset.training_rows)
    return Plan(
        device=room.pool.accelerator.device,
        nodes=room.nodes,
        gpus_per_node=room.gpus_per_node,
        strategy=layout.strategy,
        micro_batch_size=layout.micro_batch,
        gradient_accumulation=ceil(share / layout.micro_batch),
        total_steps=steps.total,
        gradient_checkpointing=layout.checkpointing,
        gpu_product=room.pool.product or None,
        peak_bytes=sizing.estimate.peak,
        reasons=(
            *explain_sizing(work, sizing),
            describe_accumulation(spec.training.global_batch_size, share, layout.micro_batch, room.processes),
            steps.reason,
            *_explain_duration(work, sizing, steps.total),
        ),
    )


def _explain_duration(work: TrainingWorkload, sizing: Sizing, steps: int) -> tuple[str, ...]:
    """Say about how long it takes; what is known is known of adapters on a frozen base."""
    if work.spec.method == "full":
        return ()
    room, weights = sizing.allocation, work.shape.parameters - work.shape.embedding.parameters
    tokens = steps * work.spec.training.global_batch_size * work.rows.mean
    recomputed = bool(sizing.layout.checkpointing)
    return explain_duration(room.pool.product, room.processes, weights, tokens, recomputed=recomputed)


def _default_plan(spec: QLoRAJobSpec, prepared: Prepared) -> Plan:
    """Choose by the usual recipe, without sizes."""
    resources, training = spec.resources, spec.training
    device = usual_device(resources.gpus_per_node)
    strategy = choose_strategy(spec.distribution, resources.processes)
    share = ceil(training.global_batch_size / resources.processes)
    micro = choose_micro_batch(training, share, device)
    accumulation = ceil(share / micro.size)
    steps = count_steps(training, prepared.dataset.training_rows)
    return Plan(
        device=device,
        nodes=resources.nodes,
        gpus_per_node=resources.gpus_per_node,
        strategy=strategy.name,
        micro_batch_size=micro.size,
        gradient_accumulation=accumulation,
        total_steps=steps.total,
        reasons=(
            f"device {device}: spec.resources.gpusPerNode is {resources.gpus_per_node}",
            *([strategy.reason] if resources.processes > 1 else []),
            micro.reason,
            describe_accumulation(training.global_batch_size, share, micro.size, resources.processes),
            steps.reason,
        ),
    )


def choose_strategy(distribution: Distribution, processes: int) -> ChosenStrategy:
    """Say how the processes share the work."""
    if processes == 1:
        return ChosenStrategy(SINGLE.name, SINGLE.summary)
    if distribution != "auto":
        return ChosenStrategy(distribution, f"strategy {distribution}: spec.distribution, for {processes} processes")
    why = "an adapter's gradients and optimizer are small, so dividing them gains nothing"
    return ChosenStrategy(DDP.name, f"strategy {DDP.name} for {processes} processes: {why}")


def choose_micro_batch(training: TrainingSpec, share: int, device: DeviceName) -> MicroBatch:
    """Take the given micro-batch, or the largest divisor of a process's rows within the device's bound."""
    if training.micro_batch_size is not None:
        return MicroBatch(training.micro_batch_size, f"micro-batch {training.micro_batch_size}: given in the spec")
    bound, why = (
        (MICRO_BATCH_CPU, "a CPU pays for dequantisation per forward pass, whatever its rows")
        if device == "cpu"
        else (MICRO_BATCH_GPU, "the usual recipe")
    )
    size = largest_divisor(share, bound)
    whole = training.global_batch_size
    of_what = f"globalBatchSize {whole}" if share == whole else f"the {share} rows of a process"
    return MicroBatch(size, f"micro-batch {size}: the largest divisor of {of_what} up to {bound}; {why}")


def describe_accumulation(whole: int, share: int, micro: int, processes: int) -> str:
    """Write the sentence for the passes of a step."""
    passes = ceil(share / micro)
    if processes == 1:
        return f"gradient accumulation {passes}: {micro} x {passes} = globalBatchSize {whole}"
    what = "=" if micro * passes * processes == whole else "for"
    return f"gradient accumulation {passes}: {micro} x {passes} x {processes} processes {what} globalBatchSize {whole}"


def largest_divisor(number: int, bound: int) -> int:
    """Return the largest divisor of a number that is at most the bound."""
    return next(size for size in range(min(number, bound), 0, -1) if number % size == 0)


def count_steps(training: TrainingSpec, rows: int) -> Steps:
    """Count optimizer steps."""
    per_epoch, total = steps_per_epoch(training, rows), total_steps(training, rows)
    epochs = f"{training.epochs:g} epochs x {per_epoch} steps ({rows} rows / {training.global_batch_size})"
    if total < steps_of_epochs(training, rows):
        return Steps(total, f"steps {total}: spec.training.maxSteps, before {epochs} end")
    return Steps(total, f"steps {total}: {epochs}")
