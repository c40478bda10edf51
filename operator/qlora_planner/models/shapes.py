"""The shape of a model: its modules and their sizes; families.py reads it from a config.json, traced.py from prepare.

Parameter counts are exact: they equal those of the class that transformers builds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from qlora_api.module_table import join_path

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
    shared: bool = False
    """Whether its matrix is that of a module which is counted already."""

    @property
    def weights(self) -> int:
        """Return the elements of the matrix."""
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """Return the elements of matrix and bias; a shared matrix has none of its own."""
        return (0 if self.shared else self.weights) + (self.outputs if self.bias else 0)


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
    """Modules that several layers have alike."""

    layers: tuple[str, ...]
    """Paths of the layers, such as model.layers.0; the empty path is the model itself."""
    linears: tuple[Linear, ...]
    others: tuple[Module, ...]
    stacked: tuple[StackedExperts, ...] = ()
    """Those of `others` that all-linear includes."""

    @property
    def count(self) -> int:
        """Return the number of layers."""
        return len(self.layers)

    @property
    def parameters(self) -> int:
        """Return the parameters of all layers."""
        linears = sum(linear.parameters for linear in self.linears)
        return self.count * (linears + sum(module.parameters for module in self.others))

    def named_linears(self) -> Iterator[tuple[str, Linear]]:
        """Yield every linear layer with its full path."""
        for layer in self.layers:
            yield from ((join_path(layer, linear.path), linear) for linear in self.linears)

    def named_others(self) -> Iterator[tuple[str, int]]:
        """Yield the full path and parameters of every other module."""
        for layer in self.layers:
            yield from ((join_path(layer, module.path), module.parameters) for module in self.others)


def numbered_layers(path: str, count: int) -> tuple[str, ...]:
    """Return the paths of a stack of layers: path.0, path.1 and so on."""
    return tuple(f"{path}.{number}" for number in range(count))


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


@dataclass(frozen=True, kw_only=True)
class ModelWeights:
    """Modules of a decoder-only language model, also of its vision tower: all that the bytes of weights depend on."""

    family: str
    """model_type of the language model."""
    tied: bool
    """Embedding and output layer share one weight."""
    embedding: Module
    head: Linear
    """The output layer; never quantized, and not included in all-linear."""
    outside: tuple[Module, ...]
    """Modules outside of layers: the final norm, and the projector of a vision tower."""
    kept_in_fp32: int = 0
    """Parameters that transformers loads in fp32, whatever the others are in."""
    not_in_all_linear: frozenset[str] = frozenset()
    """Names of linear layers that peft leaves out of all-linear, since they are also those of stacked experts."""

    @property
    def vocabulary(self) -> int:
        """Return the logits of a position."""
        return self.head.outputs

    @property
    def adaptable_blocks(self) -> tuple[Block, ...]:
        """Return the blocks whose linear layers can have an adapter."""
        raise NotImplementedError

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Return all blocks."""
        raise NotImplementedError

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
        for block in self.adaptable_blocks:
            yield from block.named_linears()

    def named_modules(self) -> Iterator[tuple[str, int]]:
        """Yield every module with parameters, with its full path and their number; a tied weight twice."""
        yield self.head.path, self.head.parameters
        yield from ((module.path, module.parameters) for module in (self.embedding, *self.outside))
        for block in self.blocks:
            yield from ((name, linear.parameters) for name, linear in block.named_linears())
            yield from block.named_others()


@dataclass(frozen=True, kw_only=True)
class ModelShape(ModelWeights):
    """A model whose layers are known operation by operation."""

    hidden: int
    decoder: Block
    attention: Attention
    mlp: Mlp
    norm: Literal["rms", "layer"]
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
    def adaptable_blocks(self) -> tuple[Block, ...]:
        """Return the decoder."""
        return (self.decoder,)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Return every stack of layers."""
        return (self.decoder, *((self.vision_tower,) if self.vision_tower else ()))
