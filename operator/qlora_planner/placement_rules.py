"""Rules on spec.resources that the API server would apply to the pods of a run, after its preparation; pure."""

from typing import Final

from qlora_api.units import MIB, TIB
from qlora_api.v1alpha1 import QLoRAJobSpec, Toleration
from qlora_api.v1alpha1.spec import MAX_MEMORY, MIN_MEMORY
from qlora_planner.quantities import parse_quantity

_MEMORY_RANGE: Final = range(MIN_MEMORY * MIB, MAX_MEMORY * TIB + 1)


def memory_is_plausible(spec: QLoRAJobSpec) -> str | None:
    """Memory is in whole bytes, enough for the libraries of the trainer, and less than any machine has."""
    memory = spec.resources.memory
    if memory.endswith("m"):
        unit = memory.removesuffix("m")
        return f"spec.resources.memory is {memory}, in thousandths of a byte; write {unit}Mi, or another unit"
    if parse_quantity(memory) in _MEMORY_RANGE:
        return None
    return (
        f"spec.resources.memory is {memory}, and a training pod takes from {MIN_MEMORY}Mi to {MAX_MEMORY}Ti; write a "
        "number and a unit, such as 16Gi"
    )


def cpu_is_positive(spec: QLoRAJobSpec) -> str | None:
    """A training pod requests CPU, in cores or thousandths of a core."""
    cpu = spec.resources.cpu
    if cpu.removesuffix("m").strip("0.") == "":
        return f"spec.resources.cpu is {cpu}, and training needs a CPU; write 2 or 500m"
    if cpu.removesuffix("m")[-1].isalpha():
        return (
            f"spec.resources.cpu is {cpu}, with a unit of memory; write cores, such as 2, or thousandths, such as 500m"
        )
    return None


def tolerations_are_valid(spec: QLoRAJobSpec) -> str | None:
    """Tolerations are those that Kubernetes accepts in a pod."""
    for index, toleration in enumerate(spec.resources.tolerations):
        if problem := _toleration_problem(toleration):
            return f"spec.resources.tolerations[{index}].{problem}"
    return None


def _toleration_problem(toleration: Toleration) -> str | None:
    if toleration.operator == "Exists" and toleration.value:
        return f"value is {toleration.value}, but operator Exists matches every value; leave value out, or write Equal"
    if toleration.operator == "Equal" and toleration.key is None:
        return (
            "key is missing, and operator Equal needs one; add the taint's key, or write operator Exists for all taints"
        )
    if toleration.toleration_seconds is not None and toleration.effect != "NoExecute":
        effect = toleration.effect or "not set"
        return (
            f"tolerationSeconds is set, but effect is {effect}; write effect NoExecute, or leave tolerationSeconds out"
        )
    return None
