"""Trainable weights of a run: the matrices of the adapter, DoRA's magnitudes, and fully trained modules."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from qlora_api.v1alpha1 import LoraSpec, QLoRAJobSpec, QuantizationSpec
from qlora_planner.models.shapes import SET_GPUS_EXPLICITLY, MismatchError, ModelShape, ModelWeights, UnknownModelError

ALL_LINEAR: Final = "all-linear"


@dataclass(frozen=True)
class Trainable:
    """Number of elements of each trainable tensor; all are fp32."""

    matrices: tuple[int, ...] = ()
    """A and B of every adapted layer."""
    magnitudes: tuple[int, ...] = ()
    """DoRA's magnitude vectors, one per adapted layer."""
    full_weights: tuple[int, ...] = ()
    """Fully trained modules (spec.lora.modulesToSave); with method full, the full model."""

    @property
    def tensors(self) -> tuple[int, ...]:
        """Return the sizes of all trainable tensors."""
        return self.matrices + self.magnitudes + self.full_weights

    @property
    def adapter(self) -> int:
        """Return how many weights the adapter has, without fully trained modules."""
        return sum(self.matrices) + sum(self.magnitudes)

    @property
    def parameters(self) -> int:
        """Return how many weights are trainable."""
        return sum(self.tensors)


def find_trainable(shape: ModelWeights, spec: QLoRAJobSpec) -> Trainable:
    """Return what a run trains.

    Raises:
        MismatchError: spec.lora.targets do not match the model.
        UnknownModelError: The sizes of what they match are not known.

    """
    if spec.method == "full":
        return Trainable(full_weights=tuple(size for size in _every_tensor(shape) if size))
    check_targets(shape, spec.lora)
    check_remapped(shape, spec.lora)
    ranks, linears = _ranks(shape, spec.lora), dict(shape.named_linears())
    return Trainable(
        matrices=(
            *(rank * side for name, rank in ranks.items() for side in (linears[name].inputs, linears[name].outputs)),
            *_stacked_experts(shape, spec.lora),
        ),
        magnitudes=tuple(linears[name].outputs for name in ranks) if spec.lora.dora else (),
        full_weights=tuple(size for size in _modules_to_save(shape, spec.lora.modules_to_save) if size),
    )


def check_base(shape: ModelWeights, quantization: QuantizationSpec) -> None:
    """Raise MismatchError for a quantized base without quantizable layers, as prepare does."""
    if quantization.bits != 16 and not shape.quantizable:
        raise MismatchError(
            f"spec.quantization.bits: a model of type {shape.family} has no layer that bitsandbytes can store in "
            f"{quantization.bits} bits; set spec.method to lora and spec.quantization.bits to 16"
        )


def check_targets(shape: ModelWeights, lora: LoraSpec) -> None:
    """Raise MismatchError for targets that match no module, as prepare does."""
    names = [name for name, _ in shape.named_linears()]
    if lora.targets != (ALL_LINEAR,):
        unknown = ", ".join(target for target in lora.targets if not _matching_modules(names, [target]))
        if unknown:
            available = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise MismatchError(
                f"spec.lora.targets: a model of type {shape.family} has no linear module {unknown} to adapt; choose "
                f"among {available}, or write {ALL_LINEAR}"
            )
    elif lora.dropout and any(block.stacked for block in shape.blocks):
        raise MismatchError(
            f"spec.lora.targets: {ALL_LINEAR} means the stacked experts of {shape.family} too, and peft has no dropout "
            "for those; name the projections of attention instead, or set spec.lora.dropout to 0"
        )


def check_remapped(shape: ModelWeights, lora: LoraSpec) -> None:
    """Raise UnknownModelError for targets that peft takes for stacked experts of the same name too."""
    remapped = sorted(
        name for name in shape.not_in_all_linear if any(name == target.rpartition(".")[2] for target in lora.targets)
    )
    if remapped:
        raise UnknownModelError(
            f"spec.lora.targets: {remapped[0]} names the stacked experts of {shape.family} too, and the memory of "
            f"their adapters is not known; name the projections of attention, or {SET_GPUS_EXPLICITLY}"
        )


def ranks_of_layer(shape: ModelShape, lora: LoraSpec) -> dict[str, int]:
    """Return the rank of each adapted layer by its path below its block; if blocks differ, the largest."""
    largest: dict[str, int] = {}
    ranks = _ranks(shape, lora)
    for name, linear in shape.decoder.named_linears():
        if name in ranks:
            largest[linear.path] = max(largest.get(linear.path, 0), ranks[name])
    return largest


def _ranks(shape: ModelWeights, lora: LoraSpec) -> dict[str, int]:
    """Return the rank of every adapted layer; if several rankPattern keys match, the longest counts."""
    names = [name for name, _ in shape.named_linears()]
    if lora.targets == (ALL_LINEAR,):
        adapted = [name for name in names if name.rpartition(".")[2] not in shape.not_in_all_linear]
    else:
        adapted = _matching_modules(names, lora.targets)
    ranks = dict.fromkeys(adapted, lora.rank)
    for pattern in sorted(lora.rank_pattern, key=len):
        ranks |= dict.fromkeys(_matching_modules(adapted, [pattern]), lora.rank_pattern[pattern])
    return ranks


def _matching_modules(modules: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return the modules that match a manifest's patterns: names, or suffixes of paths."""
    suffixes = tuple(f".{pattern}" for pattern in patterns)
    return [name for name in modules if f".{name}".endswith(suffixes)]


def _stacked_experts(shape: ModelWeights, lora: LoraSpec) -> Iterator[int]:
    """Yield the sizes of adapters on stacked experts, which peft adds for all-linear only."""
    if lora.targets != (ALL_LINEAR,):
        return
    for block in shape.blocks:
        for matrix in block.stacked * block.count:
            rank = matrix.count * matrix.fused_projections * lora.rank
            yield from (rank * matrix.inputs, rank * matrix.outputs)


def _modules_to_save(shape: ModelWeights, patterns: Sequence[str]) -> Iterator[int]:
    sizes = dict(shape.named_modules())
    matched = _matching_modules(sizes, patterns)
    if unknown := next((pattern for pattern in patterns if not _matching_modules(sizes, [pattern])), None):
        raise UnknownModelError(
            f"spec.lora.modulesToSave: a model of type {shape.family} has no module {unknown} of a known size; correct "
            f"the name, or {SET_GPUS_EXPLICITLY}"
        )
    # peft keeps tied embedding and output layer as one weight if either is trained.
    counted_twice = shape.tied and {shape.embedding.path, shape.head.path} <= set(matched)
    for name in matched:
        yield sizes[name] - (shape.head.weights if counted_twice and name == shape.head.path else 0)


def _every_tensor(shape: ModelWeights) -> Iterator[int]:
    yield shape.embedding.parameters
    yield shape.head.parameters - (shape.head.weights if shape.tied else 0)
    yield from (module.parameters for module in shape.outside)
    for block in shape.blocks:
        for linear in block.linears * block.count:
            yield linear.weights
            yield linear.parameters - linear.weights
        yield from (module.parameters for module in block.others * block.count)
