"""Which of a model's modules a manifest names, as its adapter's or to be trained whole; checked before any GPU."""

from collections.abc import Iterable, Mapping
from typing import Final

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import LoraSpec, QLoRAJobSpec
from qlora_trainer.errors import RunError
from qlora_trainer.model.architecture import Architecture

ALL_LINEAR: Final = "all-linear"
_TIED_BY_PEFT: Final = frozenset({"embed_tokens", "lm_head"})
"""Names by which peft knows an embedding and its output layer, and keeps them one weight when they are trained."""


def matches(module: str, wanted: str) -> bool:
    """Return whether a manifest's word, a name or the end of a path, means a module."""
    return module == wanted or module.endswith(f".{wanted}")


def match_modules(modules: Iterable[str], wanted: Iterable[str]) -> tuple[str, ...]:
    """Return the modules that any of the words means."""
    words = tuple(wanted)
    return tuple(sorted(module for module in modules if any(matches(module, word) for word in words)))


def adapted_modules(architecture: Architecture, lora: LoraSpec) -> tuple[str, ...]:
    """Return the linear modules that get an adapter; the output layer is none of them."""
    linears = architecture.linears
    return tuple(sorted(linears)) if lora.targets == (ALL_LINEAR,) else match_modules(linears, lora.targets)


def check_modules(architecture: Architecture, spec: QLoRAJobSpec) -> None:
    """Refuse names that the model does not have, and modules that cannot be trained as asked."""
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
    unknown = [word for word in pattern if not match_modules(adapted, [word])]
    if unknown:
        raise _refusal(
            f"{field}: no module with an adapter is named {', '.join(unknown)}; use names that spec.lora.targets covers"
        )


def _check_ranks(architecture: Architecture, lora: LoraSpec, adapted: tuple[str, ...]) -> None:
    """A start from singular vectors needs as many of them as the rank says."""
    if lora.init not in {"pissa", "loftq"}:
        return
    own = expand_pattern(adapted, lora.rank_pattern)
    for module in adapted:
        rank, most = own.get(module, lora.rank), architecture.linears[module]
        if rank > most:
            raise _refusal(f"init: {lora.init} needs rank {most} or less for {module}, which has rank {rank}")


def expand_pattern(modules: Iterable[str], pattern: Mapping[str, int]) -> dict[str, int]:
    """Return the number that a pattern gives to each module it means; of two words that mean one the longer counts."""
    found: dict[str, int] = {}
    for word in sorted(pattern, key=len):
        found |= dict.fromkeys(match_modules(modules, [word]), pattern[word])
    return found


def _check_modules_to_save(architecture: Architecture, spec: QLoRAJobSpec, adapted: tuple[str, ...]) -> None:
    for word in spec.lora.modules_to_save:
        whole = match_modules(architecture.modules_with_weights, [word])
        if not whole:
            raise _refusal(f"modulesToSave: {architecture.name} has no module {word} with weights of its own")
        if twice := match_modules(adapted, whole):
            raise _refusal(f"modulesToSave: {twice[0]} has an adapter already; leave it out here or in targets")
        if spec.quantization.bits != 16 and (quantised := match_modules(architecture.linears, whole)):
            raise _refusal(
                f"modulesToSave: {quantised[0]} is quantised and cannot be trained whole; name it in targets, or set "
                "spec.method to lora and spec.quantization.bits to 16"
            )
        if (one := architecture.tied & set(whole)) and not _TIED_BY_PEFT & {part.rpartition(".")[2] for part in one}:
            raise _refusal(
                f"modulesToSave: {architecture.name} uses one weight as embedding and output layer under names that "
                f"peft does not know ({', '.join(sorted(architecture.tied))}), and would train a copy; leave {word} out"
            )


def _refusal(sentence: str) -> RunError:
    return RunError(Reason.MODEL_UNSUPPORTED, f"spec.lora.{sentence}")
