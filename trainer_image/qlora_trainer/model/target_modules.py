"""Resolves targets, patterns and modulesToSave to modules of the model, and checks them before a GPU is allocated."""

from collections.abc import Iterable, Mapping
from typing import Final

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import LoraSpec, QLoRAJobSpec
from qlora_trainer.errors import RunError
from qlora_trainer.model.architecture import Architecture

ALL_LINEAR: Final = "all-linear"
_TIED_BY_PEFT: Final = frozenset({"embed_tokens", "lm_head"})
"""Names by which PEFT recognizes embedding and output layer, and keeps their weights tied in training."""


def matches(module: str, name: str) -> bool:
    """Return whether a name of the manifest, full or the end of a path, selects a module."""
    return module == name or module.endswith(f".{name}")


def match_modules(modules: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """Return the modules that any of the names selects, sorted."""
    selected = tuple(names)
    return tuple(sorted(module for module in modules if any(matches(module, name) for name in selected)))


def adapted_modules(architecture: Architecture, lora: LoraSpec) -> tuple[str, ...]:
    """Return the linear modules that get an adapter; the output layer never does."""
    linears = architecture.linears
    return tuple(sorted(linears)) if lora.targets == (ALL_LINEAR,) else match_modules(linears, lora.targets)


def check_modules(architecture: Architecture, spec: QLoRAJobSpec) -> None:
    """Raise ModelUnsupported for unknown names, and for modules that cannot be trained as requested."""
    _check_targets(architecture, spec.lora)
    adapted = adapted_modules(architecture, spec.lora)
    _check_pattern("rankPattern", spec.lora.rank_pattern, adapted)
    _check_pattern("alphaPattern", spec.lora.alpha_pattern, adapted)
    _check_ranks(architecture, spec.lora, adapted)
    _check_modules_to_save(architecture, spec, adapted)


def _check_targets(architecture: Architecture, lora: LoraSpec) -> None:
    if lora.targets == (ALL_LINEAR,):
        return
    unknown = [target for target in lora.targets if not match_modules(architecture.linears, [target])]
    if unknown:
        available = ", ".join(sorted({name.rpartition(".")[2] for name in architecture.linears}))
        raise _refusal(
            f"targets: {architecture.name} has no linear module {', '.join(unknown)} to adapt; choose among "
            f"{available}, or write all-linear"
        )


def _check_pattern(field: str, pattern: Mapping[str, int], adapted: tuple[str, ...]) -> None:
    unknown = [name for name in pattern if not match_modules(adapted, [name])]
    if unknown:
        raise _refusal(
            f"{field}: no module with an adapter is named {', '.join(unknown)}; use names that spec.lora.targets covers"
        )


def _check_ranks(architecture: Architecture, lora: LoraSpec, adapted: tuple[str, ...]) -> None:
    """PiSSA and LoftQ initialize from singular vectors, so the rank cannot exceed that of the weight."""
    if lora.init not in {"pissa", "loftq"}:
        return
    ranks = expand_pattern(adapted, lora.rank_pattern)
    for module in adapted:
        rank, maximum = ranks.get(module, lora.rank), architecture.linears[module]
        if rank > maximum:
            raise _refusal(f"init: {lora.init} needs rank {maximum} or less for {module}, and the spec sets {rank}")


def expand_pattern(modules: Iterable[str], pattern: Mapping[str, int]) -> dict[str, int]:
    """Return the value of a pattern for each module that it matches; the longest matching name wins."""
    found: dict[str, int] = {}
    for name in sorted(pattern, key=len):
        found |= dict.fromkeys(match_modules(modules, [name]), pattern[name])
    return found


def _check_modules_to_save(architecture: Architecture, spec: QLoRAJobSpec, adapted: tuple[str, ...]) -> None:
    for name in spec.lora.modules_to_save:
        saved = match_modules(architecture.modules_with_weights, [name])
        if not saved:
            raise _refusal(f"modulesToSave: {architecture.name} has no module {name} with weights of its own")
        if duplicates := match_modules(adapted, saved):
            raise _refusal(f"modulesToSave: {duplicates[0]} already has an adapter; remove it here or from targets")
        if spec.quantization.bits != 16 and (quantized := match_modules(architecture.linears, saved)):
            raise _refusal(
                f"modulesToSave: {quantized[0]} is quantized and cannot be in modulesToSave; name it in targets, or "
                "set spec.method to lora and spec.quantization.bits to 16"
            )
        if (tied := architecture.tied & set(saved)) and not _TIED_BY_PEFT & {path.rpartition(".")[2] for path in tied}:
            raise _refusal(
                f"modulesToSave: {architecture.name} uses one weight as embedding and output layer under names that "
                f"PEFT does not know ({', '.join(sorted(architecture.tied))}), so it would train a copy; remove {name}"
            )


def _refusal(sentence: str) -> RunError:
    return RunError(Reason.MODEL_UNSUPPORTED, f"spec.lora.{sentence}")
