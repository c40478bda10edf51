"""What a model is, told from its configuration alone: class, weights, modules; no weight is loaded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_api.names import Reason
from qlora_api.v1alpha1 import LoraSpec
from qlora_trainer.errors import RunError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Architecture:
    """Facts of a model's class."""

    name: str
    parameters: int
    linear_modules: frozenset[str]
    """Last components of the names of its linear modules, without the output layer."""
    output_module: str


def load_architecture(folder: Path, field: str = "spec.model.uri") -> Architecture:
    """Build the model on the meta device and count."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise RunError(Reason.MODEL_UNSUPPORTED, f"{field}: {_why_not(folder, error)}") from error
    return _describe(model)


def _why_not(folder: Path, error: Exception) -> str:
    config = folder / "config.json"
    if not config.is_file():
        return "there is no config.json; give the folder of a model in the Hugging Face format"
    content = json.loads(config.read_text())
    if "auto_map" in content:
        return (
            f"model type '{content.get('model_type')}' needs code from its repository (auto_map), which is never run; "
            "choose an architecture that the trainer's transformers release knows"
        )
    return f"the trainer's transformers release cannot build it: {type(error).__name__}: {str(error)[:500]}"


def _describe(model: Any) -> Architecture:
    output = model.get_output_embeddings()
    names = {name: module for name, module in model.named_modules() if _is_linear(module)}
    return Architecture(
        name=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear_modules=frozenset(name.rpartition(".")[2] for name, module in names.items() if module is not output),
        output_module=next((name for name, module in names.items() if module is output), ""),
    )


def _is_linear(module: torch.nn.Module) -> bool:
    # GPT-2's Conv1D is a linear layer with its weight transposed.
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def check_targets(architecture: Architecture, lora: LoraSpec) -> None:
    """Refuse targets that the model does not have, and the output layer, which no server loads an adapter for."""
    if lora.targets == (ALL_LINEAR,):
        return
    available = ", ".join(sorted(architecture.linear_modules))
    unknown = [target for target in lora.targets if target.rpartition(".")[2] not in architecture.linear_modules]
    if unknown:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"spec.lora.targets: {architecture.name} has no linear module {', '.join(unknown)} to adapt; choose among "
            f"{available}, or write all-linear",
        )


def load_tokenizer(folder: Path, field: str = "spec.model.uri") -> Any:
    """Load the tokenizer, which must have an end token: without one the adapter never learns to stop."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise RunError(
            Reason.MODEL_UNSUPPORTED, f"{field}: its tokenizer cannot be loaded: {str(error)[:500]}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise RunError(Reason.MODEL_UNSUPPORTED, f"{field}: its tokenizer has no end-of-text token (eos_token)")
    return tokenizer
