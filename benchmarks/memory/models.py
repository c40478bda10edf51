"""Random models of a combination's shape, loaded and prepared by the trainer's own code."""

from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory.combinations import Combination
from qlora_api.v1alpha1 import LoraSpec, QuantizationSpec, TrainingSpec
from qlora_trainer.data.batching import sample_step, split_micro_batches
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.distributed.world import World
from qlora_trainer.model.base_model import TrainableModel, attach_lora, load_base, prepare_full_finetune
from qlora_trainer.model.optimizer import OptimizerKind
from qlora_trainer.model.runtime_settings import RuntimeSettings
from qlora_trainer.training.loop import Schedule, TrainingLoop, make_loop

CPU: Final = torch.device("cpu")
EAGER: Final = frozenset({"gemma2"})
"""Families that cap attention scores, which SDPA does not support (qlora_trainer.model.attention)."""
_EXTRA: Final[Mapping[str, Mapping[str, Any]]] = {
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 64, "initializer_range": 0.2},
    "gemma3_text": {"sliding_window": 64, "query_pre_attn_scalar": 64},
    "mistral": {"sliding_window": 64},
}
ACCUMULATION: Final = 2
"""Micro-batches per step: in the second one the gradients are already allocated, as in most."""


def model_config(combination: Combination) -> dict[str, Any]:
    """Return the config.json of a combination's model."""
    config = AutoConfig.for_model(combination.family, **_settings(combination))
    settings: dict[str, Any] = config.to_dict()
    return settings


def _settings(combination: Combination) -> dict[str, Any]:
    head_dim = {"head_dim": combination.head_dim} if combination.head_dim else {}
    return {
        "vocab_size": combination.vocabulary,
        "hidden_size": combination.hidden,
        "intermediate_size": combination.intermediate,
        "num_hidden_layers": combination.layers,
        "num_attention_heads": combination.heads,
        "num_key_value_heads": combination.kv_heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": combination.tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        **head_dim,
        **_EXTRA.get(combination.family, {}),
    }


def write_model(combination: Combination, folder: Path) -> None:
    """Write the model with weights in bf16."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(combination.family, **_settings(combination))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.save_pretrained(folder)


def settings_of(combination: Combination) -> RuntimeSettings:
    """Return the settings that the trainer would choose."""
    return RuntimeSettings(
        dtype=getattr(torch, combination.dtype),
        attention="eager" if combination.family in EAGER else "sdpa",
        gradient_checkpointing=combination.checkpointing,
        packing=combination.packing,
        optimizer=OptimizerKind.ADAMW,
        reasons={},
    )


def load_trainable(combination: Combination, folder: Path) -> TrainableModel:
    """Load the model and attach the adapter or unfreeze it, as in qlora_trainer.stages."""
    settings, is_full = settings_of(combination), combination.method == "full"
    dtype = torch.float32 if is_full else settings.dtype
    base = load_base(folder, QuantizationSpec(bits=combination.bits), dtype, settings.attention, "cpu")
    if is_full:
        return prepare_full_finetune(base, settings)
    lora = LoraSpec(
        rank=combination.rank, dropout=combination.dropout, targets=combination.targets, dora=combination.dora
    )
    return attach_lora(base, lora, 1, settings)


def token_rows(combination: Combination) -> tuple[TokenRow, ...]:
    """Return the rows of one micro-batch."""
    generator = torch.Generator().manual_seed(0)
    return tuple(_token_row(combination, length, generator) for length in combination.lengths())


def _token_row(combination: Combination, length: int, generator: torch.Generator) -> TokenRow:
    ids = torch.randint(2, combination.vocabulary, (length,), generator=generator).tolist()
    first = max(1, length - round(length * combination.learned))
    return TokenRow(tuple(ids), ((first, length),))


def rows_of_steps(combination: Combination) -> tuple[TokenRow, ...]:
    """Return the rows of a step: those of a micro-batch, repeated for each accumulated micro-batch."""
    return token_rows(combination) * ACCUMULATION


def measured_step(combination: Combination) -> int:
    """Return the first step after step 0 whose last micro-batch is its largest: there gradients are allocated."""

    def size(rows: Sequence[TokenRow]) -> tuple[int, int]:
        tokens = sum(len(row.input_ids) for row in rows)
        width = len(rows) * max(len(row.input_ids) for row in rows)
        return (tokens if combination.packing else width, sum(row.label_count for row in rows))

    steps = ((step, [size(rows) for rows in micro_batches_of_step(combination, step)]) for step in count(1))
    return next(step for step, sizes in steps if sizes[-1] == max(sizes))


def micro_batches_of_step(combination: Combination, step: int) -> list[Sequence[TokenRow]]:
    """Return the micro-batches into which the trainer splits a step's shuffled rows."""
    rows = rows_of_steps(combination)
    order = sample_step(step, len(rows), len(rows), TrainingSpec().seed)
    return split_micro_batches([rows[number] for number in order], combination.rows, packing=combination.packing)


def make_measured_loop(combination: Combination, trainable: TrainableModel) -> TrainingLoop:
    """Return the trainer's own loop."""
    rows = rows_of_steps(combination)
    training = TrainingSpec(global_batch_size=len(rows), learning_rate=1e-4, warmup_ratio=0.0)
    trainable.wrapped.train()
    return make_loop(trainable, rows, Schedule(training, combination.rows, 8), settings_of(combination), World(CPU))
