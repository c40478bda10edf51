"""Reference losses of the same training run by TRL's SFTTrainer and transformers' Trainer.

All settings that could differ are set to ours; a comment explains each one that is not obvious.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from trl import SFTConfig, SFTTrainer

from qlora_api.v1alpha1 import TrainingSpec
from qlora_trainer.data.batching import sample_step
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.model.base_model import TrainableModel
from tests.unit.trainer.tiny import make_tokenizer

IGNORED: Final = -100
"""The label that every Hugging Face loss ignores."""


@dataclass(frozen=True)
class RunSettings:
    """Settings of a training run, in terms common to all three trainers."""

    training: TrainingSpec
    micro_batch: int
    steps: int
    bf16: bool

    def order(self, rows: int) -> list[int]:
        """Return the row indices of all steps in sequence: an oracle reads a dataset that is already in order."""
        batch, seed = self.training.global_batch_size, self.training.seed
        return [row for step in range(self.steps) for row in sample_step(step, rows, batch, seed)]


class Losses(TrainerCallback):
    """Records the loss of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        if "loss" in logs:
            self.seen.append(logs["loss"])


def labels_of(row: TokenRow) -> list[int]:
    """Return the row's tokens at its labels and IGNORED elsewhere; the oracles shift labels themselves."""
    label_positions = {position for start, end in row.label_spans for position in range(start, end)}
    return [token if position in label_positions else IGNORED for position, token in enumerate(row.input_ids)]


def dataset_of(rows: Sequence[TokenRow], settings: RunSettings) -> Dataset:
    """Return the tokenized rows in training order."""
    ordered = [rows[number] for number in settings.order(len(rows))]
    return Dataset.from_list([{"input_ids": list(row.input_ids), "labels": labels_of(row)} for row in ordered])


def arguments_of(settings: RunSettings, folder: Path) -> dict[str, Any]:
    """Return the settings in the names of transformers and TRL, with their extra defaults disabled."""
    training = settings.training
    return {
        "output_dir": str(folder),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": training.global_batch_size // settings.micro_batch,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.scheduler,
        # transformers starts a warm-up at learning rate 0, so its first step changes nothing; ours is one step ahead.
        # The test of the learning rate in test_parity.py compares them.
        "warmup_steps": 0,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_torch",
        "bf16": settings.bf16,
        # The dataset is in order already.
        "train_sampling_strategy": "sequential",
        # Gradient checkpointing is exact but slow; TRL enables it by default.
        "activation_checkpointing": False,
        # By default transformers logs the last finite loss in place of a NaN or infinite one (trap 26).
        "logging_nan_inf_filter": False,
        "logging_steps": 1,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": training.seed,
    }


class PlainHeadSFTTrainer(SFTTrainer):
    """TRL's trainer with the loss that transformers computes from the model's own logits.

    TRL 1.16 computes the output layer in its own tiles, whose gradient is rounded to 16 bits at other points than
    torch's. Loop, collator, normalization and optimizer remain TRL's.
    """

    compute_loss = Trainer.compute_loss


def losses_of_trl(
    trainable: TrainableModel, rows: Sequence[TokenRow], settings: RunSettings, folder: Path
) -> list[float]:
    """Train with TRL's unmodified SFTTrainer, and return its losses."""
    return _losses_of_sft(SFTTrainer, trainable, rows, settings, folder)


def losses_of_trl_with_plain_head(
    trainable: TrainableModel, rows: Sequence[TokenRow], settings: RunSettings, folder: Path
) -> list[float]:
    """Train with TRL's SFTTrainer and the model's own output layer, and return its losses."""
    return _losses_of_sft(PlainHeadSFTTrainer, trainable, rows, settings, folder)


def _losses_of_sft(
    sft: type[SFTTrainer], trainable: TrainableModel, rows: Sequence[TokenRow], settings: RunSettings, folder: Path
) -> list[float]:
    losses, initial_weights = Losses(), [parameter.detach().clone() for parameter in trainable.parameters()]
    trainer = sft(
        model=trainable.wrapped,
        # max_length would truncate rows, and padding to a multiple would change the width of a batch.
        args=SFTConfig(**arguments_of(settings, folder), max_length=None, pad_to_multiple_of=None),
        train_dataset=dataset_of(rows, settings),
        processing_class=make_tokenizer(),
        callbacks=[losses],
    )
    # On a quantized base TRL casts the adapter to bf16 (finding 6 of section 0); restore the fp32 adapter with its
    # values before the cast.
    for parameter, value in zip(trainable.parameters(), initial_weights, strict=True):
        parameter.data = value
    trainer.train()
    return losses.seen


def losses_of_transformers(
    trainable: TrainableModel, rows: Sequence[TokenRow], settings: RunSettings, folder: Path
) -> list[float]:
    """Train with transformers' Trainer and return its losses."""
    losses = Losses()
    trainer = Trainer(
        model=trainable.wrapped,
        args=TrainingArguments(**arguments_of(settings, folder)),
        train_dataset=dataset_of(rows, settings),
        data_collator=pad_right,
        callbacks=[losses],
    )
    trainer.train()
    return losses.seen


def pad_right(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad rows to the longest; padding is marked in the mask and the labels, never by its token (trap 3)."""
    width = max(len(row["input_ids"]) for row in rows)
    return default_data_collator(
        [
            {
                "input_ids": row["input_ids"] + [0] * (width - len(row["input_ids"])),
                "labels": row["labels"] + [IGNORED] * (width - len(row["input_ids"])),
                "attention_mask": [1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])),
            }
            for row in rows
        ]
    )
