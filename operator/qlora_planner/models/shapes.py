"""What a model is made of, as far as its size goes; families.py reads it from a config.json.

Parameters are exact: the sum is what transformers counts in the class that it builds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

SET_GPUS_EXPLICITLY: Final = (
    "set spec.resources.gpusPerNode and spec.training.microBatchSize yourself; the run is then not sized in advance"
)
"""What to do about a model or an adapter whose size is not known."""


class UnknownModelError(ValueError):
    """The size of this kind of model is not known; the user must ask for GPUs explicitly."""


class MismatchError(ValueError):
    """The manifest asks for what this model does not have."""


@dataclass(frozen=True)
class Linear:
    """A linear layer, [outputs, inputs], that an adapter may be put on."""

    path: str
    """Where it is below its block, as in self_attn.q_proj."""
    inputs: int
    outputs: int
    bias: bool = False
    quantizable: bool = True
    """It is a torch.nn.Linear itself: bitsandbytes replaces no subclass of it (Falcon's)."""

    @property
    def weights(self) -> int:
        """Return the size of the matrix."""
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """Return the size of matrix and bias."""
        return self.weights + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class Module:
    """Any other module with weights of its own: an embedding, a norm, stacked experts."""

    path: str
    parameters: int


@dataclass(frozen=True)
class StackedExperts:
    """Matrices of a mixture of experts in one parameter: no linear layer, but peft's all-linear adapts it as one."""

    path: str
    count: int
    inputs: int
    outputs: int
    fused_projections: int = 1
    """Projections in each matrix; peft gives it as many times the rank."""


@dataclass(frozen=True)
class Block:
    """A stack of equal layers."""

    path: str
    """Where the stack is; its layers are path.0, path.1 and so on."""
    count: int
    linears: tuple[Linear, ...]
    others: tuple[Module, ...]
    stacked: tuple[StackedExperts, ...] = ()
    """Which of the others all-linear means too."""

    @property
    def parameters(self) -> int:
        """Return the weights of all layers."""
        linears = sum(linear.parameters for linear in self.linears)
        return self.count * (linears + sum(module.parameters for module in self.others))

    def named_linears(self) -> Iterator[tuple[str, Linear]]:
        """Yield every linear layer with its whole path."""
        for number in range(self.count):
            yield from ((f"{self.path}.{number}.{linear.path}", linear) for linear in self.linears)

    def named_others(self) -> Iterator[tuple[str, int]]:
        """Yield the other modules with their whole paths and parameters."""
        for number in range(self.count):
            yield from ((f"{self.path}.{number}.{module.path}", module.parameters) for module in self.others)


@dataclass(frozen=True)
class Attention:
    """How tokens look at each other."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    """Dimensions of a head that are rotated by position; 0 where positions are told otherwise (ALiBi)."""
    qk_norm: bool = False
    """Queries and keys are normalised per head."""
    softcapped: bool = False
    """Scores are capped (Gemma 2), which only eager attention does."""
    window: int | None = None
    """Tokens that a sliding layer looks back; None where no layer slides."""
    sliding_layers: int = 0


@dataclass(frozen=True)
class Mlp:
    """What each token goes through alone."""

    intermediate: int
    """Width of one expert."""
    gated: bool
    activation: str
    """As transformers names it: silu, gelu_pytorch_tanh, gelu, gelu_new."""
    experts: int = 1
    experts_per_token: int = 1
    """Experts that a token goes through."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only language model, with the vision tower that some have beside it."""

    family: str
    """The model type of the language part."""
    hidden: int
    vocabulary: int
    tied: bool
    """Embedding and output layer are one weight."""
    decoder: Block
    attention: Attention
    mlp: Mlp
    norm: Literal["rms", "layer"]
    embedding: Module
    head: Linear
    """The output layer; it is never quantised and gets no adapter from all-linear."""
    outside: tuple[Module, ...]
    """Modules of no layer: the last norm, and what joins a vision tower."""
    parallel: bool = False
    """Attention and MLP read the same input, and their outputs are added (GPT-NeoX, Phi-2, Falcon)."""
    plain_head: bool = True
    """Logits are the output layer's; Gemma 2 caps them, so that they cannot be computed in parts."""
    supports_packing: bool = True
    """Its rows may be joined in one sequence; where they would see each other, the trainer pads them."""
    vision_tower: Block | None = None
    """Layers that no text goes through, but which lie in memory and get adapters like the others."""

    @property
    def layers(self) -> int:
        """Return how many layers a token goes through."""
        return self.decoder.count

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Return every stack of layers."""
        return (self.decoder, *((self.vision_tower,) if self.vision_tower else ()))

    @property
    def parameters(self) -> int:
        """Return all weights; a tied one counts once."""
        outside = self.embedding.parameters + sum(module.parameters for module in self.outside)
        # A tied output layer may still have a bias of its own.
        head = self.head.parameters - (self.head.weights if self.tied else 0)
        return outside + head + sum(block.parameters for block in self.blocks)

    @property
    def quantizable(self) -> int:
        """Return the weights that bitsandbytes stores in 4 or 8 bits."""
        return sum(
            block.count * sum(linear.weights for linear in block.linears if linear.quantizable) for block in self.blocks
        )

    def named_linears(self) -> Iterator[tuple[str, Linear]]:
        """Yield the linear layers that can get an adapter, with their whole paths."""
        for block in self.blocks:
            yield from block.named_linears()

    def named_modules(self) -> Iterator[tuple[str, int]]:
        """Yield every module with weights, with its whole path and parameters; a tied weight twice."""
        yield self.head.path, self.head.parameters
        yield from ((module.path, module.parameters) for module in (self.embedding, *self.outside))
        for block in self.blocks:
            yield from ((name, linear.parameters) for name, linear in block.named_linears())
            yield from block.named_others()
