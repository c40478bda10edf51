"""The part of a model's config.json that decides its size: recorded by prepare, read by the plan."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from qlora_api.base import check_numbers
from qlora_api.units import MIB

SIZE_KEYS: Final = frozenset(
    {
        "activation",
        "alibi",
        "attention_bias",
        "attn_logit_softcapping",
        "bias",
        "ffn_hidden_size",
        "final_logit_softcapping",
        "head_dim",
        "hidden_act",
        "hidden_activation",
        "hidden_size",
        "image_size",
        "intermediate_size",
        "max_window_layers",
        "mlp_bias",
        "model_type",
        "multi_query",
        "new_decoder_architecture",
        "num_attention_heads",
        "num_channels",
        "num_experts_per_tok",
        "num_hidden_layers",
        "num_key_value_heads",
        "num_kv_heads",
        "num_ln_in_parallel_attn",
        "num_local_experts",
        "parallel_attn",
        "partial_rotary_factor",
        "patch_size",
        "qk_layernorm",
        "rope_parameters",
        "rotary_pct",
        "sliding_window",
        "sliding_window_pattern",
        "text_config",
        "tie_word_embeddings",
        "use_parallel_residual",
        "use_sliding_window",
        "vision_config",
        "vision_use_head",
        "vocab_size",
    }
)
"""Keys that qlora_planner.models.families reads; layer_types is left out because it can be kilobytes long."""
MAX_CONFIG_BYTES: Final = 4 * MIB
"""Maximum size of a config.json; the longest have lists of modules that are not quantized, in hundreds of KiB."""
MAX_TOKENIZER_CONFIG_BYTES: Final = 16 * MIB
"""Maximum size of a tokenizer_config.json; the longest list 6,000 added tokens, in 1.2 MiB (Gemma 3)."""
MAX_PARAMETERS: Final = 10**13
"""Weights of a model, ten times as many as the largest published ones; more is a mistake or an attack."""
MAX_CONFIG: Final = 2048
"""Maximum characters of a reduced config.json: it is part of a pod's termination message, which has 4,096 bytes."""

SIZED_TYPES: Final = frozenset(
    {
        "falcon",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gpt_neox",
        "llama",
        "mistral",
        "mixtral",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
    }
)
"""model_type of the families whose size follows from SIZE_KEYS; prepare records the modules of all others instead."""
TRACED: Final = "traced"
"""Key of the sizes of a model's modules in what prepare records instead of SIZE_KEYS."""
TRACED_VERSION: Final = 1
"""Version of these sizes; the plan does not read those of another one."""

_MAX_ESCAPED_CONFIG: Final = MAX_CONFIG + 256
"""Maximum characters of it in that message, where quotes have backslashes; the other facts take up to 1,800 bytes."""


def reduce_config(config: Mapping[str, Any]) -> str:
    """Return the part of a config.json that decides the size, as JSON; empty if that is longer than MAX_CONFIG."""
    return _write(_reduced(config))


def record_sizes(config: Mapping[str, Any], traced: Iterable[Mapping[str, Any]]) -> str:
    """Return the first sizes of modules that fit into MAX_CONFIG, as JSON; if none does, what the config.json says.

    Args:
        config: The model's config.json.
        traced: The sizes in decreasing detail.

    """
    texts = (_write({"model_type": config.get("model_type"), TRACED: sizes}) for sizes in traced)
    return next(filter(None, texts), reduce_config(config))


def _write(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, separators=(",", ":"), sort_keys=True)
    return text if len(text) <= MAX_CONFIG and len(json.dumps(text)) <= _MAX_ESCAPED_CONFIG else ""


def _reduced(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key in SIZE_KEYS and value != {}}
    return {key: _reduced(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def check_config(text: str) -> str:
    """Return a reduced config.json; raise ValueError unless it is empty or a JSON object with usable numbers."""
    try:
        content = json.loads(text or "{}")
        check_numbers(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if isinstance(content, dict):
        return text
    raise ValueError("it is not a JSON object")
