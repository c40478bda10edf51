"""Input and settings of a forward pass: everything besides the model's shape that its memory depends on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from qlora_api.accelerators import NVIDIA, DeviceName

FP32: Final = 4
"""Bytes per element."""
HALF: Final = 2
"""Bytes per element of bf16 and fp16."""

Kernel = Literal["sdpa", "eager", "flash_attention_2"]


@dataclass(frozen=True)
class BatchShape:
    """The rows of one forward pass."""

    rows: int
    longest: int
    """Tokens of the longest row."""
    tokens: int
    """Tokens of all rows: with padding, unless they are packed."""
    labels: int
    """Labeled tokens."""
    packing: bool
    equal_length: bool = False
    """All rows have the same length, so nothing is padded."""


@dataclass(frozen=True)
class ForwardConfig:
    """Settings of a forward pass."""

    batch: BatchShape
    device: DeviceName = NVIDIA.device
    attention: Kernel = "sdpa"
    compute: int = HALF
    """Bytes per element in matrix products: 2 under autocast, 4 in fp32."""
    bits: int = 4
    """Bits per quantized weight; 16 for an unquantized base."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Rank of the adapter by path of the linear layer in its block, such as self_attn.q_proj."""
    dropout: bool = False
    dora: bool = False
    full_finetune: bool = False
    """All weights are trained, in fp32 (method full)."""
    checkpointing: bool = False
    neftune: bool = False
    """NEFTune adds noise to the embeddings."""

    @property
    def autocast(self) -> bool:
        """Return whether the pass runs under autocast."""
        return self.compute != FP32

    @property
    def weight_width(self) -> int:
        """Return the bytes per element of unquantized weights."""
        return FP32 if self.full_finetune else self.compute

    @property
    def upcasts_adapter_input(self) -> bool:
        """Return whether peft casts the input of an adapter to fp32.

        Layers on quantized weights leave that to autocast, but only check CUDA's (peft 0.21, tuners/lora/bnb.py:
        torch.is_autocast_enabled() without a device); layers on 16-bit weights always cast.
        """
        return self.bits == 16 or self.device == "cpu" or not self.autocast
