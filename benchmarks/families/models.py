"""A tiny model with random weights of every architecture, with a tokenizer and rows."""

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from qlora_trainer.model.shrunk_model import MAX_PARAMETERS, shrink

_VOCABULARY: Final = 512
_POSITIONS: Final = 256
_TOKENS: Final = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_DIVISORS: Final = (64, 32, 16, 8, 4, 2, 1)
"""By how much the widths of the default configuration are divided: the first with which a model can be trained."""
_SMALL: Final[Mapping[str, Any]] = {"vocab_size": _VOCABULARY, "max_position_embeddings": _POSITIONS} | _TOKENS
_INDEXER: Final = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
SETTINGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1},
    "gemma3n_text": {"vocab_size_per_layer_input": 512},
    "hunyuan_v1_dense": {"head_dim": 64},
    "qwen4_exp_text": _INDEXER | {"ngram_vocab_size_base": 512, "split_ngram_parts": 4},
}
"""What the default configuration of an architecture lacks, or has that makes its model large, by model_type."""
ROWS: Final = 24


class NoTinyModelError(Exception):
    """No tiny model of the architecture can be built and trained by transformers itself."""


def architectures() -> tuple[str, ...]:
    """Return the model_type of everything that transformers trains to continue text, and of what has such a decoder."""
    return tuple(sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}))


def write_model(model_type: str, folder: Path) -> None:
    """Write a tiny model with weights in bf16, and a tokenizer; only a configuration if it has no causal class."""
    write_tokenizer(folder)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        AutoConfig.for_model(model_type).save_pretrained(folder)
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
        return
    errors: list[str] = []
    for divisor, repeats in product(_DIVISORS, (1, 2)):
        try:
            model = _build(model_type, divisor, repeats)
        # transformers raises whatever Python and torch raise for widths that do not go together.
        except Exception as error:
            errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        model.save_pretrained(folder)
        return
    raise NoTinyModelError(errors[0])


def _build(model_type: str, divisor: int, repeats: int) -> Any:
    config = shrink(AutoConfig.for_model(model_type, **SETTINGS.get(model_type, {})), divisor, repeats)
    for part in [config, *(value for name, value in vars(config).items() if name.endswith("_config"))]:
        for name, value in _SMALL.items():
            if isinstance(getattr(part, name, None), int) or (name in _TOKENS and hasattr(part, name)):
                setattr(part, name, value)
    with torch.device("meta"):
        empty = _from_config(config)
    if sum(weight.numel() for weight in empty.parameters()) > MAX_PARAMETERS:
        raise ValueError("too many weights")
    torch.manual_seed(0)
    model = _from_config(config, dtype=torch.bfloat16)
    _check_trains(model)
    return model


def _from_config(config: Any, **options: Any) -> Any:
    """Build the class that a run loads."""
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)


def _check_trains(model: Any) -> None:
    ids = torch.arange(2, 14)[None]
    loss = model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean()
    loss.backward()
    model.zero_grad()
    if not torch.isfinite(loss):
        raise ValueError(f"its loss is {float(loss)}")


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(row.values()) for row in _rows()], trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_rows(path: Path) -> None:
    """Write rows of different lengths."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in _rows()))


def _rows() -> list[dict[str, str]]:
    return [
        {"instruction": f"What is {number} times {number % 5}?", "output": f"It is {number * (number % 5)}."}
        for number in range(ROWS)
    ]
