"""Tiny random models of the supported families, with the properties that tests expect of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.unit.trainer.tiny import SMALL

SEPARATE: Final = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True)
class Family:
    """One architecture: the settings of its tiny model, and the expected properties."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    linears: frozenset[str] = SEPARATE
    plain_head: bool = True
    packing_is_exact: bool = True
    """Whether packed rows are isolated from each other; if not, packing is disabled."""
    bits: tuple[int, ...] = (4, 16)
    """Supported values of spec.quantization.bits."""


FAMILIES: Final[dict[str, Family]] = {
    "llama": Family(),
    "mistral": Family({"sliding_window": 8}),
    "qwen2": Family(),
    "qwen3": Family({"head_dim": 16}),
    "gemma": Family({"head_dim": 16}),
    "gemma2": Family(
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}, attention="eager", plain_head=False
    ),
    "gemma3_text": Family({"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    # Its vision tower has linear modules of the same names, which text never reaches.
    "gemma3": Family(
        {
            "text_config": SMALL | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": 14,
                "vision_use_head": False,  # as in the public models
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 380,
            "eoi_token_index": 381,
            "image_token_index": 382,
        }
    ),
    "phi": Family(linears=frozenset({"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"})),
    "phi3": Family(linears=frozenset({"qkv_proj", "o_proj", "gate_up_proj", "down_proj"})),
    "gpt_neox": Family(linears=frozenset({"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"})),
    # transformers 5.23 builds Falcon's mask without position_ids, so packed rows attend to each other; and its layers
    # are of a custom class that bitsandbytes does not quantize.
    "falcon": Family(
        linears=frozenset({"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        packing_is_exact=False,
        bits=(16,),
    ),
}


def family_config(name: str) -> Any:
    """The configuration of a tiny model of a family, or of another architecture."""
    settings = FAMILIES.get(name, Family()).settings
    # A model of several modalities has the sizes of each in a block of its own.
    return AutoConfig.for_model(name, **({} if "text_config" in settings else SMALL) | dict(settings))


def write_family(name: str, folder: Path) -> None:
    """Write a tiny random model of a family, or of another architecture, with weights in bf16."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(family_config(name), dtype=torch.bfloat16).save_pretrained(folder)
