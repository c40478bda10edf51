"""How a run is executed, each choice with its reason."""

from typing import Final, Literal, NamedTuple

from qlora_api.prepared import Prepared
from qlora_api.steps import steps_of_epochs, steps_per_epoch, total_steps
from qlora_api.v1alpha1 import Plan, QLoRAJobSpec, TrainingSpec

Device = Literal["cpu", "cuda"]

MICRO_BATCH_CUDA: Final = 4
"""Rows per forward pass on a GPU: the usual QLoRA recipe for 24 GB cards and up."""
MICRO_BATCH_CPU: Final = 16
"""Rows per forward pass on a CPU: dequantising the base is paid per pass, so more rows share its cost."""


class MicroBatch(NamedTuple):
    """Rows per forward pass, and why."""

    size: int
    reason: str


class Steps(NamedTuple):
    """Optimizer steps, and why."""

    total: int
    reason: str


def make_plan(spec: QLoRAJobSpec, prepared: Prepared) -> Plan:
    """Choose device, micro-batch and number of steps."""
    device: Device = "cuda" if spec.resources.gpus_per_node else "cpu"
    micro = choose_micro_batch(spec.training, device)
    accumulation = spec.training.global_batch_size // micro.size
    steps = count_steps(spec.training, prepared.dataset.training_rows)
    return Plan(
        device=device,
        nodes=1,
        gpus_per_node=spec.resources.gpus_per_node,
        micro_batch_size=micro.size,
        gradient_accumulation=accumulation,
        total_steps=steps.total,
        reasons=(
            f"device {device}: spec.resources.gpusPerNode is {spec.resources.gpus_per_node}",
            micro.reason,
            f"gradient accumulation {accumulation}: {micro.size} x {accumulation} = globalBatchSize "
            f"{spec.training.global_batch_size}",
            steps.reason,
        ),
    )


def choose_micro_batch(training: TrainingSpec, device: Device) -> MicroBatch:
    """Take the given micro-batch, or the largest divisor of the global batch within the device's bound."""
    if training.micro_batch_size is not None:
        return MicroBatch(training.micro_batch_size, f"micro-batch {training.micro_batch_size}: given in the spec")
    bound, why = (
        (MICRO_BATCH_CUDA, "the usual recipe")
        if device == "cuda"
        else (MICRO_BATCH_CPU, "a CPU pays for dequantisation per forward pass, whatever its rows")
    )
    whole = training.global_batch_size
    size = largest_divisor(whole, bound)
    return MicroBatch(size, f"micro-batch {size}: the largest divisor of globalBatchSize {whole} up to {bound}; {why}")


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
