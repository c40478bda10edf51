"""The shape of a model: its modules and their sizes; families.py reads it from a config.json.

Parameter counts are exact: they equal those of the class that transformers builds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

SET_GPUS_EXPLICITLY: Final = (
    "set spec.resources.gpusPerNode and spec.training.microBatchSize yourself; the run is then not sized in advance"
)
"""The fix for a model or an adapter of unknown size."""


class UnknownModelError(ValueError):
    """The memory of this kind of model is not known; the user must set GPUs and micro-batch explicitly."""


class MismatchError(ValueError):
    """The manifest does not match the model, such as a target module that it does not have."""


@dataclass(frozen=True)
class Linear:
    """A linear layer with a weight [outputs, inputs], which can have an adapter."""

    path: str
    """Path below its block, such as self_attn.q_proj."""
    inputs: int
    outputs: int
    bias: bool = False
    quantizable: bool = True
    """Whether its class is torch.nn.Linear: bitsandbytes does not replace subclasses, such as Falcon's."""

    @property
    def weights(self) -> int:
        """Return the elements of the matrix."""
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """Return the elements of matrix and bias."""
        return self.weights + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class Module:
    """Any other module with parameters: an embedding, a norm, stacked experts."""

    path: str
    parameters: int


@dataclass(frozen=True)
class StackedExperts:
    """Expert matrices stacked in one parameter: not a linear layer, but all-linear includes it in peft."""

    path: str
    count: int
    inputs: int
    outputs: int
    fused_projections: int = 1
    """Projections fused in each matrix; peft multiplies the rank by it."""


@dataclass(frozen=True)
class Block:
    """A stack of identical layers."""

    path: str
    """Path of the stack; its layers are path.0, path.1 and so on."""
    count: int
    linears: tuple[Linear, ...]
    others: tuple[Module, ...]
    stacked: tuple[StackedExperts, ...] = ()
    """Those of `others` that all-linear includes."""

    @property
    def parameters(self) -> int:
        """Return the parameters of all layers."""
        linears = sum(linear.parameters for linear in self.linears)
        return self.count * (linears + sum(module.parameters for module in self.others))

    def named_linears(self) -> Iterator[tuple[str, Linear]]:
        """Yield every linear layer with its full path."""
        for number in range(self.count):
            yield from ((f"{self.path}.{number}.{linear.path}", linear) for linear in self.linears)

    def named_others(self) -> Iterator[tuple[str, int]]:
        """Yield the full path and parameters of every other module."""
        for number in range(self.count):
            yield from ((f"{self.path}.{number}.{module.path}", module.parameters) for module in self.others)


@dataclass(frozen=True)
class Attention:
    """The attention of a layer."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    """Dimensions of a head with rotary position embeddings; 0 for other position encodings (ALiBi)."""
    qk_norm: bool = False
    """Queries and keys are normalized per head."""
    softcapped: bool = False
    """Scores are soft-capped (Gemma 2), which only eager attention supports."""
    window: int | None = None
    """Window of sliding layers in tokens; None if there are none."""
    sliding_layers: int = 0


@dataclass(frozen=True)
class Mlp:
    """The MLP of a layer."""

    intermediate: int
    """Width of one expert."""
    gated: bool
    activation: str
    """Name in transformers: silu, gelu_pytorch_tanh, gelu, gelu_new."""
    experts: int = 1
    experts_per_token: int = 1
    """Experts that a token is routed to."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only language model, with the vision tower of multimodal ones."""

    family: str
    """model_type of the language model."""
    hidden: int
    vocabulary: int
    tied: bool
    """Embedding and output layer share one weight."""
    decoder: Block
    attention: Attention
    mlp: Mlp
    norm: Literal["rms", "layer"]
    embedding: Module
    head: Linear
    """The output layer; never quantized, and not included in all-linear."""
    outside: tuple[Module, ...]
    """Modules outside of layers: the final norm, and the projector of a vision tower."""
    parallel: bool = False
    """Attention and MLP run in parallel on the same input (GPT-NeoX, Phi-2, Falcon)."""
    plain_head: bool = True
    """Logits are the plain output of the head; Gemma 2 caps them, so they cannot be computed in chunks."""
    supports_packing: bool = True
    """Rows can be packed; if their attention would mix, the trainer pads them instead."""
    vision_tower: Block | None = None
    """Layers that text does not pass through: they are loaded and quantized like the others, but get no adapter."""

    @property
    def layers(self) -> int:
        """Return the number of decoder layers."""
        return self.decoder.count

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Return every stack of layers."""
        return (self.decoder, *((self.vision_tower,) if self.vision_tower else ()))

    @property
    def parameters(self) -> int:
        """Return all parameters; a tied weight counts once."""
        outside = self.embedding.parameters + sum(module.parameters for module in self.outside)
        # A tied output layer may still have its own bias.
        head = self.head.parameters - (self.head.weights if self.tied else 0)
        return outside + head + sum(block.parameters for block in self.blocks)

    @property
    def quantizable(self) -> int:
        """Return the weights that bitsandbytes stores in 4 or 8 bits."""
        return sum(
            block.count * sum(linear.weights for linear in block.linears if linear.quantizable) for block in self.blocks
        )

    def named_linears(self) -> Iterator[tuple[str, Linear]]:
        """Yield the linear layers that can have an adapter, with their full paths."""
        yield from self.decoder.named_linears()

    def named_modules(self) -> Iterator[tuple[str, int]]:
        """Yield every module with parameters, with its full path and their number; a tied weight twice."""
        yield self.head.path, self.head.parameters
        yield from ((module.path, module.parameters) for module in (self.embedding, *self.outside))
        for block in self.blocks:
            yield from ((name, linear.parameters) for name, linear in block.named_linears())
            yield from block.named_others()
