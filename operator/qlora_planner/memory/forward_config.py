"""What a forward pass is given and how it computes: everything beside the model's shape that decides its memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from qlora_api.accelerators import NVIDIA, DeviceName

FP32: Final = 4
"""Bytes per element, as is HALF."""
HALF: Final = 2

Kernel = Literal["sdpa", "eager", "flash_attention_2"]


@dataclass(frozen=True)
class BatchShape:
    """The rows of one forward pass, as they are laid out."""

    rows: int
    longest: int
    """Tokens of the longest row."""
    tokens: int
    """Of all rows together: without padding if they are joined, with it if they are not."""
    labels: int
    """Tokens that are learned."""
    packing: bool
    equal_length: bool = False
    """All rows are equally long, so that nothing is padded."""


@dataclass(frozen=True)
class ForwardConfig:
    """How it computes."""

    batch: BatchShape
    device: DeviceName = NVIDIA.device
    attention: Kernel = "sdpa"
    compute: int = HALF
    """Bytes per element of what is multiplied: 16 bits under autocast, or fp32."""
    bits: int = 4
    """Per quantised weight; 16 is a base that is not quantised."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Adapters: path of a linear layer in its block, as in self_attn.q_proj, to its rank."""
    dropout: bool = False
    dora: bool = False
    full_finetune: bool = False
    """Every weight learns, in fp32 (method full)."""
    checkpointing: bool = False
    neftune: bool = False
    """NEFTune adds noise to the embeddings."""

    @property
    def autocast(self) -> bool:
        """Return whether matrices are multiplied in another dtype than weights may have."""
        return self.compute != FP32

    @property
    def weight_width(self) -> int:
        """Return the bytes per element of weights that are not quantised."""
        return FP32 if self.full_finetune else self.compute

    @property
    def upcasts_adapter_input(self) -> bool:
        """Return whether peft casts an adapter's input to fp32 before it.

        Its layers on quantised weights leave that to autocast, but ask CUDA's alone (peft 0.21,
        tuners/lora/bnb.py: torch.is_autocast_enabled() without a device); its layer on 16-bit weights always casts.
        """
        return self.bits == 16 or self.device == "cpu" or not self.autocast
