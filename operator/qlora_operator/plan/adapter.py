"""Which weights learn, and how many: an adapter's matrices, DoRA's magnitudes, modules that are trained whole."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from qlora_api.v1alpha1 import LoraSpec, QLoRAJobSpec
from qlora_operator.plan.shapes import ModelShape

ALL_LINEAR: Final = "all-linear"


@dataclass(frozen=True)
class Trainable:
    """Weights that learn; all of them are fp32."""

    matrices: int = 0
    """A and B of every adapted layer."""
    magnitudes: int = 0
    """DoRA's, one for each output."""
    whole: int = 0
    """Of modules that are trained and saved whole; with method full, of the model."""

    @property
    def adapter(self) -> int:
        """Return what peft calls the adapter's parameters."""
        return self.matrices + self.magnitudes

    @property
    def parameters(self) -> int:
        """Return all of them."""
        return self.adapter + self.whole


def count_trainable(shape: ModelShape, spec: QLoRAJobSpec) -> Trainable:
    """Count what a run trains."""
    if spec.method == "full":
        return Trainable(whole=shape.parameters)
    ranks = _ranks(shape, spec.lora)
    linears = {name: linear for name, linear in shape.named_linears() if name in ranks}
    return Trainable(
        matrices=sum(rank * (linears[name].inputs + linears[name].outputs) for name, rank in ranks.items())
        + _stacked(shape, spec.lora),
        magnitudes=sum(linear.outputs for linear in linears.values()) if spec.lora.dora else 0,
        whole=_count_whole(shape, spec.lora.modules_to_save),
    )


def ranks_of_layer(shape: ModelShape, lora: LoraSpec) -> dict[str, int]:
    """Return each adapted layer's rank by its path below its block; of layers that differ, the largest."""
    found: dict[str, int] = {}
    ranks = _ranks(shape, lora)
    for name, linear in shape.decoder.named_linears():
        if name in ranks:
            found[linear.path] = max(found.get(linear.path, 0), ranks[name])
    return found


def _ranks(shape: ModelShape, lora: LoraSpec) -> dict[str, int]:
    """Return the rank of every adapted layer; of two words that mean one, the longer counts."""
    adapted = [name for name, _ in shape.named_linears() if _is_target(name, lora.targets)]
    ranks = dict.fromkeys(adapted, lora.rank)
    for word in sorted(lora.rank_pattern, key=len):
        ranks |= dict.fromkeys(_meant(adapted, [word]), lora.rank_pattern[word])
    return ranks


def _is_target(name: str, targets: Iterable[str]) -> bool:
    words = tuple(targets)
    return words == (ALL_LINEAR,) or bool(_meant([name], words))


def _meant(modules: Iterable[str], words: Iterable[str]) -> list[str]:
    """Return the modules that a manifest's words mean: names, or ends of paths."""
    wanted = tuple(words)
    return [name for name in modules if any(name == word or name.endswith(f".{word}") for word in wanted)]


def _stacked(shape: ModelShape, lora: LoraSpec) -> int:
    """Count adapters on stacked experts, which peft makes for all-linear only."""
    if lora.targets != (ALL_LINEAR,):
        return 0
    return sum(
        block.count * matrix.count * matrix.joined * lora.rank * (matrix.inputs + matrix.outputs)
        for block in shape.blocks
        for matrix in block.stacked
    )


def _count_whole(shape: ModelShape, words: Iterable[str]) -> int:
    sizes = dict(shape.named_modules())
    chosen = _meant(sizes, words)
    ends = {shape.embedding.path, shape.head.path}
    # peft keeps a tied embedding and output layer one weight when either is trained.
    twice = shape.head.weights if shape.tied and ends <= set(chosen) else 0
    return sum(sizes[name] for name in chosen) - twice
