"""A tiny model on disk, and an adapter that changes its answers."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from qlora_api.report import AdapterRecord
from qlora_api.runconfig import Platform
from qlora_api.v1alpha1 import LoraSpec, MergeBase, QuantizationSpec
from qlora_trainer.model.base_model import TrainableModel, attach_lora, load_base
from qlora_trainer.model.runtime_settings import RuntimeSettings
from qlora_trainer.publishing.merge_weights import MergeTask
from qlora_trainer.publishing.publish import write_weights
from qlora_trainer.storage.credentials import environment_secrets
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import MODEL_FIELD
from tests.unit.trainer.tiny import make_tokenizer, write_model
from tests.unit.trainer.tuned import SETTINGS, token_rows

RESOLVER: Final = SourceResolver(Platform(), environment_secrets())
PLAIN: Final = LoraSpec(rank=4, alpha=8, dropout=0.0, targets=("all-linear",))


def make_record(quantization: QuantizationSpec, base: str = "hf://o/m") -> AdapterRecord:
    return AdapterRecord(
        job="colours",
        digest="0123456789abcdef",
        base=base,
        commit="c0ffee",
        method="qlora",
        quantization=quantization,
        dtype="float32",
        attention="sdpa",
        format="instruction",
    )


def load_with_adapter(
    folder: Path, lora: LoraSpec, quantization: QuantizationSpec, settings: RuntimeSettings = SETTINGS, seed: int = 3
) -> TrainableModel:
    """The model of a folder with an adapter whose weights are far from their initial values."""
    trainable = attach_lora(load_base(folder, quantization, torch.float32, "sdpa", "cpu"), lora, 1, settings)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in trainable.wrapped.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.05
        if "modules_to_save" in name:
            weight.data = weight.data + torch.randn(weight.shape, generator=generator) * 0.05
    return trainable


def write_published(
    folder: Path, model: Path, lora: LoraSpec, quantization: QuantizationSpec, seed: int = 3, **record: Any
) -> Path:
    """Write an adapter for the model of a folder, with a record that names this folder as its base."""
    base = f"file://{model}"
    commit = RESOLVER.resolve(base, "main", MODEL_FIELD).commit
    adapter_record = make_record(quantization, base).model_copy(update={"commit": commit, **record})
    return write_weights(
        load_with_adapter(model, lora, quantization, seed=seed), make_tokenizer(), adapter_record, folder
    )


def write_trained(folder: Path, lora: LoraSpec, quantization: QuantizationSpec, **model: Any) -> MergeTask:
    """Write a model and an adapter, and return the task of merging them."""
    uri = write_model(folder / "model", **model)
    record = make_record(quantization, uri)
    adapter = write_weights(load_with_adapter(folder / "model", lora, quantization), make_tokenizer(), record, folder)
    return MergeTask(folder / "model", adapter, "original", record, token_rows(4))


def with_base(task: MergeTask, base: MergeBase) -> MergeTask:
    return replace(task, base=base)
