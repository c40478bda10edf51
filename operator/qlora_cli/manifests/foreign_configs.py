"""Recognizes files of other tools that are given as manifests, and says how to begin."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qlora_api import names
from qlora_api.escapes import escape_line, shell_command
from qlora_cli.manifests.local_paths import DATA_FILE


@dataclass(frozen=True)
class ForeignConfig:
    """A kind of file, and the keys by which it is recognized."""

    name: str
    all_of: frozenset[str]
    any_of: frozenset[str] = frozenset()

    def matches(self, keys: frozenset[str]) -> bool:
        """Return whether a mapping with these keys is such a file."""
        return self.all_of <= keys and (not self.any_of or bool(self.any_of & keys))


def _config(name: str, all_of: str, any_of: str = "") -> ForeignConfig:
    return ForeignConfig(name, frozenset(all_of.split()), frozenset(any_of.split()))


ROW_OF_DATA: Final = "a row of data"
_CONFIGS: Final = (
    _config(
        "a configuration of axolotl",
        "base_model",
        "datasets adapter sequence_len micro_batch_size lora_r val_set_size sample_packing load_in_4bit output_dir",
    ),
    _config(
        "a configuration of LLaMA-Factory",
        "model_name_or_path",
        "stage finetuning_type cutoff_len dataset_dir do_train",
    ),
    _config("an argument file of TRL", "model_name_or_path"),
    _config("an argument file of TRL", "dataset_name", "output_dir learning_rate max_length"),
    _config("arguments of transformers", "output_dir", "per_device_train_batch_size num_train_epochs learning_rate"),
    _config("a configuration of AutoTrain", "base_model", "task backend project_name"),
    _config("a configuration of torchtune", "model tokenizer", "_component_ optimizer loss dataset"),
    _config("a request of a fine-tuning API", "model training_file"),
    _config("the adapter_config.json of an adapter", "peft_type"),
    _config("the config.json of a model", "architectures"),
    _config("a configuration of accelerate", "compute_environment"),
    _config("a configuration of DeepSpeed", "zero_optimization"),
    _config("a Helm values file", "replicaCount", "image"),
    _config(ROW_OF_DATA, "messages"),
    _config(ROW_OF_DATA, "instruction", "output response"),
    _config(ROW_OF_DATA, "prompt completion"),
)
_SPEC_KEYS: Final = frozenset({"model", "dataset", "output", "lora", "training", "quantization", "method", "resources"})
_MODEL_KEYS: Final = ("base_model", "model_name_or_path", "model", "model_name", "model_id")
_DATA_KEYS: Final = ("datasets", "dataset", "dataset_name", "training_file", "train_file", "data_path", "data_files")
EXAMPLE_MODEL: Final = "hf://ORGANIZATION/NAME"
EXAMPLE_DATA: Final = "my.jsonl"


def describe_foreign(value: Any) -> str | None:
    """Return what a document is instead of a QLoRAJob, and how to begin; None: a Kubernetes object of another kind."""
    if isinstance(value, list):
        return _describe_list(value)
    return _describe_mapping(value) if isinstance(value, dict) else None


def _describe_mapping(value: Mapping[str, Any]) -> str | None:
    keys = frozenset(map(str, value))
    if found := next((config for config in _CONFIGS if config.matches(keys)), None):
        return f"is {found.name}, not a QLoRAJob; {_begin({} if found.name == ROW_OF_DATA else value)}"
    if keys & {"kind", "apiVersion"}:
        return None
    if "spec" in keys:
        return f"has no apiVersion and no kind; write apiVersion: {names.API_VERSION} and kind: {names.KIND} above spec"
    if keys & _SPEC_KEYS:
        return (
            f"has fields of a spec at the top; indent them below spec:, and write apiVersion: {names.API_VERSION}, "
            f"kind: {names.KIND} and metadata: {{name: NAME}} above"
        )
    return f"has no kind, so it is no QLoRAJob; {_begin(value)}"


def _describe_list(value: list[Any]) -> str:
    first = value[0] if value else None
    if isinstance(first, dict) and "apiVersion" in first:
        return "is a list without a kind; write kind: List, apiVersion: v1 and items: above it, or separate with ---"
    what = "a list of rows" if isinstance(first, dict) else "a list"
    return f"is {what}, not a QLoRAJob; {_begin({})}"


def _begin(value: Mapping[str, Any]) -> str:
    model = next((text for key in _MODEL_KEYS if isinstance(text := value.get(key), str)), None)
    data = next((text for key in _DATA_KEYS if (text := _first_path(value.get(key)))), None)
    command = shell_command("qlora", "init", "--model", _model_uri(model), "--data", data or EXAMPLE_DATA)
    return f"begin with {escape_line(command)}; qlora validate explains the names of other tools field by field"


def _model_uri(model: str | None) -> str:
    if model is None:
        return EXAMPLE_MODEL
    return f"hf://{model}" if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) else model


def _first_path(value: Any) -> str | None:
    """Return the path of a data file that a configuration names."""
    first = value[0] if isinstance(value, list) and value else value
    text = first.get("path") if isinstance(first, dict) else first
    return text if isinstance(text, str) and DATA_FILE.search(text) else None
