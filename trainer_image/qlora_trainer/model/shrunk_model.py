"""A copy of a model's architecture that fits in any pod: few layers, narrow ones if need be, random weights."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

MAX_PARAMETERS: Final = 48_000_000
"""Weights of the copy: 192 MB in fp32, next to torch in a prepare pod with 4 GiB. A vocabulary of 262,144 takes 17
million with the narrowest layers."""
_LEAST_LAYERS: Final = 2
_MOST_LAYERS: Final = 8
"""Layers of the copy, if the architecture mixes kinds of layers; one period of all known mixtures has at most eight."""
_DIVISORS: Final = (1, 2, 4, 8, 16, 32, 64)
"""By how much the widths are divided, the least that fits."""
_WIDTHS: Final = (
    *("hidden_size", "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_embd", "n_inner", "d_model", "d_ff"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "word_embed_proj_dim"),
    *("intermediate_size_mlp", "dim_feedforward", "embedding_size", "hidden_dim", "embedding_dim", "lru_width"),
    *("attention_hidden_size", "mamba_d_ssm", "q_lora_rank", "kv_lora_rank", "o_lora_rank", "hidden_size_global"),
)
"""Settings that are the width of a layer."""
_HEADS: Final = (
    *("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads", "kv_n_heads"),
    *("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_key_heads", "linear_num_value_heads"),
    *("index_n_heads", "indexer_n_heads"),
)
"""Dividing widths and heads alike keeps the size of a head."""
_WIDTH_UNIT: Final = 64
"""Widths are multiples of it: NF4 quantizes in blocks of 64, and kernels want rows of 16 bytes."""
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_MOST_EXPERTS: Final = 8
_CHOSEN: Final = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "num_selected_experts")
_GROUPS: Final = ("n_group", "topk_group", "first_k_dense_replace")
"""Settings that are 1 in the copy if the model has them at all."""
_SHARED_LAYERS: Final = ("num_kv_shared_layers",)
"""Settings of how many of the last layers use what earlier ones computed: none in the copy, which has too few."""
_KINDS: Final = ("layer_types", "layers_block_type")
"""Lists with the kind of each layer, which a configuration may compute from a shorter one."""


class CannotShrinkError(Exception):
    """No copy of the architecture can be built."""


def write_shrunk_model(folder: Path, target: Path) -> None:
    """Write a copy with random weights of a model of which only config.json is needed.

    Args:
        folder: Has config.json.
        target: The folder to write, in the Hugging Face format.

    Raises:
        CannotShrinkError: No divisor of its widths gives a model that can be built and is small enough.

    """
    config, errors = AutoConfig.from_pretrained(folder, trust_remote_code=False), []
    # Layers of some kinds share the weights of others of their kind, of which there must be two (Zamba).
    for divisor, repeats in product(_DIVISORS, (1, 2)):
        try:
            shrunk = shrink(config, divisor, repeats)
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(shrunk, trust_remote_code=False)
            if sum(weight.numel() for weight in empty.parameters()) > MAX_PARAMETERS:
                continue
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(shrunk, trust_remote_code=False, dtype=torch.bfloat16)
        # Whatever torch and transformers raise for widths that do not go together; the next ones may.
        except Exception as error:
            errors.append(error)
            continue
        model.save_pretrained(target)
        return
    raise CannotShrinkError(str(errors[-1]) if errors else "its narrowest copy is too large")


def shrink(config: Any, divisor: int, repeats: int = 1) -> Any:
    """Return the configuration with few layers and experts, and with its widths divided.

    Args:
        config: Of any model.
        divisor: Of the widths.
        repeats: How many layers of each kind the copy has at least.

    """
    shrunk = deepcopy(config)
    for part in _parts(shrunk):
        varying = part.to_dict().get("per_layer_config") or {}
        part.per_layer_config = None
        _shrink_depth(part, repeats)
        for name in _WIDTHS:
            value = getattr(part, name, None)
            if type(value) is int and divisor > 1:
                setattr(part, name, max(value // divisor // _WIDTH_UNIT, 1) * _WIDTH_UNIT)
        for name in _HEADS:
            value = getattr(part, name, None)
            if type(value) is int:
                setattr(part, name, max(value // divisor, 1))
        for name in _EXPERTS:
            _cap(part, name, _MOST_EXPERTS)
        for name in _CHOSEN:
            _cap(part, name, 2)
        for name in _GROUPS:
            _cap(part, name, 1)
        for name in _SHARED_LAYERS:
            _cap(part, name, 0)
        if varying:
            layers = {int(layer): settings for layer, settings in varying.items()}
            part.per_layer_config = {layer: layers[layer] for layer in layers if layer < part.num_hidden_layers}
    return shrunk


def _parts(config: Any) -> Iterator[Any]:
    """Yield a configuration and those in it, such as of its modalities."""
    yield config
    for name, part in list(vars(config).items()):  # getattr refuses settings that vary between layers
        if isinstance(part, PreTrainedConfig) and name.endswith("_config"):
            yield part


def _shrink_depth(part: Any, repeats: int) -> None:
    """Keep as many layers as it takes to have one of each kind, and shorten the lists with an entry per layer."""
    depth = getattr(part, "num_hidden_layers", None)
    if type(depth) is not int or depth <= _LEAST_LAYERS:
        return
    lists = {
        name: value for name, value in vars(part).items() if isinstance(value, list | tuple) and len(value) == depth
    }
    kinds = [getattr(part, name, None) for name in _KINDS]
    every = [*lists.values(), *(value for value in kinds if isinstance(value, list | tuple) and len(value) == depth)]
    layers = min(max([_LEAST_LAYERS, *(_first_of_each(value, repeats) for value in every)]), _MOST_LAYERS)
    part.num_hidden_layers = layers
    for name, value in lists.items():
        setattr(part, name, value[:layers])


def _first_of_each(kinds: Sequence[Any], repeats: int) -> int:
    """Return how many entries there are up to the last one that is among the first `repeats` of its kind."""
    seen = [str(kind) for kind in kinds]
    positions = {kind: [index for index, each in enumerate(seen) if each == kind] for kind in set(seen)}
    return max(indices[:repeats][-1] for indices in positions.values()) + 1


def _cap(part: Any, name: str, most: int) -> None:
    value = getattr(part, name, None)
    if type(value) is int and value > most:
        setattr(part, name, most)
