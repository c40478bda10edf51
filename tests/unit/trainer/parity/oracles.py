"""The same training by two independent trainers: TRL's SFTTrainer and transformers' Trainer.

Everything that could differ is set to be the same, and what has to be set for that is said beside it.
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
"""The label that every Hugging Face loss leaves out."""


@dataclass(frozen=True)
class RunSettings:
    """A training run, in words that all three trainers understand."""

    training: TrainingSpec
    micro_batch: int
    steps: int
    bf16: bool

    def order(self, rows: int) -> list[int]:
        """Return the rows of all steps, one after the other: an oracle reads a dataset that is already in order."""
        batch, seed = self.training.global_batch_size, self.training.seed
        return [row for step in range(self.steps) for row in sample_step(step, rows, batch, seed)]


class Losses(TrainerCallback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        if "loss" in logs:
            self.seen.append(logs["loss"])


def labels_of(row: TokenRow) -> list[int]:
    """Return the row's tokens where they are learned; the oracles shift labels by themselves."""
    learned = {position for start, end in row.label_spans for position in range(start, end)}
    return [token if place in learned else IGNORED for place, token in enumerate(row.input_ids)]


def dataset_of(rows: Sequence[TokenRow], fingerprint: RunSettings) -> Dataset:
    """Return the rows in the order in which they are learned, already tokenised."""
    ordered = [rows[number] for number in fingerprint.order(len(rows))]
    return Dataset.from_list([{"input_ids": list(row.input_ids), "labels": labels_of(row)} for row in ordered])


def arguments_of(fingerprint: RunSettings, folder: Path) -> dict[str, Any]:
    """Return what transformers and TRL call the settings of a course, and what they do unasked switched off."""
    training = fingerprint.training
    return {
        "output_dir": str(folder),
        "max_steps": fingerprint.steps,
        "per_device_train_batch_size": fingerprint.micro_batch,
        "gradient_accumulation_steps": training.global_batch_size // fingerprint.micro_batch,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.scheduler,
        # transformers starts a warm-up at rate 0, so that its first step learns nothing; ours starts one step further.
        # test_our_warm_up_is_one_step_ahead compares them.
        "warmup_steps": 0,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_torch",
        "bf16": fingerprint.bf16,
        # The dataset is in order already.
        "train_sampling_strategy": "sequential",
        # Recomputation is exact but slow; TRL has it on.
        "activation_checkpointing": False,
        # transformers would log the last finite loss in place of one that is not (trap 26).
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

    TRL 1.16 computes the output layer in tiles of its own, whose gradient is rounded to 16 bits elsewhere than torch's.
    The loop, the collator, the normalisation and the optimizer stay TRL's.
    """

    compute_loss = Trainer.compute_loss


def losses_of_trl(
    trainable: TrainableModel, rows: Sequence[TokenRow], fingerprint: RunSettings, folder: Path
) -> list[float]:
    """Train with TRL's SFTTrainer as it is, and return its losses."""
    return _losses_of_sft(SFTTrainer, trainable, rows, fingerprint, folder)


def losses_of_trl_with_plain_head(
    trainable: TrainableModel, rows: Sequence[TokenRow], fingerprint: RunSettings, folder: Path
) -> list[float]:
    """Train with TRL's SFTTrainer and the model's own output layer, and return its losses."""
    return _losses_of_sft(PlainHeadSFTTrainer, trainable, rows, fingerprint, folder)


def _losses_of_sft(
    sft: type[SFTTrainer], trainable: TrainableModel, rows: Sequence[TokenRow], fingerprint: RunSettings, folder: Path
) -> list[float]:
    losses, started = Losses(), [parameter.detach().clone() for parameter in trainable.parameters()]
    trainer = sft(
        model=trainable.wrapped,
        # max_length would cut rows, and padding to a multiple would change the width of a batch.
        args=SFTConfig(**arguments_of(fingerprint, folder), max_length=None, pad_to_multiple_of=None),
        train_dataset=dataset_of(rows, fingerprint),
        processing_class=make_tokenizer(),
        callbacks=[losses],
    )
    # On a quantised base TRL makes the adapter bf16 (finding 6 of section 0); this is the fp32 adapter again, from its
    # values before the rounding.
    for parameter, value in zip(trainable.parameters(), started, strict=True):
        parameter.data = value
    trainer.train()
    return losses.seen


def losses_of_transformers(
    trainable: TrainableModel, rows: Sequence[TokenRow], fingerprint: RunSettings, folder: Path
) -> list[float]:
    """Train with transformers' Trainer and return its losses."""
    losses = Losses()
    trainer = Trainer(
        model=trainable.wrapped,
        args=TrainingArguments(**arguments_of(fingerprint, folder)),
        train_dataset=dataset_of(rows, fingerprint),
        data_collator=pad_right,
        callbacks=[losses],
    )
    trainer.train()
    return losses.seen


def pad_right(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Fill rows up to the longest; known by its place in the mask and the labels, never by its token (trap 3)."""
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
