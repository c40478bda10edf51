"""Class, parameters and modules of a model, from its configuration; no weights are loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_api.reasons import Reason
from qlora_trainer.errors import RunError
from qlora_trainer.model.model_files import check_model_files
from qlora_trainer.model.quantization import QuantizableWeights, count_quantizable


@dataclass(frozen=True)
class Architecture:
    """Class, size and modules of a model."""

    name: str
    parameters: int
    linears: Mapping[str, int]
    """Linear modules by name, without the output layer, and the maximum rank of each weight."""
    modules_with_weights: frozenset[str]
    """Names of all modules with own weights."""
    tied: frozenset[str]
    """Names of the embedding and the output layer if their weights are tied."""
    quantizable: QuantizableWeights


def load_architecture(folder: Path, field: str = "spec.model.uri") -> Architecture:
    """Build the model without weights and describe it."""
    return describe(build_empty(folder, field))


def build_empty(folder: Path, field: str = "spec.model.uri") -> Any:
    """Return the model on the meta device: modules and shapes without weights."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_model_files(folder, field)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise RunError(Reason.MODEL_UNSUPPORTED, f"{field}: {_why_not(folder, error)}") from error


def _why_not(folder: Path, error: Exception) -> str:
    config = folder / "config.json"
    if not config.is_file():
        return "there is no config.json; use the folder of a model in the Hugging Face format"
    content = json.loads(config.read_text())
    if "auto_map" in content:
        return (
            f"model type '{content.get('model_type')}' needs code from its repository (auto_map), which is never run; "
            "choose an architecture that the trainer's transformers release knows"
        )
    return f"the trainer's transformers release cannot build it: {type(error).__name__}: {str(error)[:500]}"


def describe(model: Any) -> Architecture:
    """Describe a model, which may be on the meta device."""
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    modules = dict(model.named_modules())
    tied = output is not None and output.weight is embedding.weight
    return Architecture(
        name=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linears={name: min(module.weight.shape) for name, module in linear_modules(model).items()},
        modules_with_weights=modules_with_weights(model),
        tied=frozenset(name for name, module in modules.items() if tied and module in {output, embedding}),
        quantizable=count_quantizable(model),
    )


def linear_modules(model: Any) -> dict[str, Any]:
    """Return the linear modules of a model by name, without its output layer."""
    output = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if _is_linear(module) and module is not output}


def modules_with_weights(model: Any) -> frozenset[str]:
    """Return the names of the modules that have own weights."""
    return frozenset(name for name, module in model.named_modules() if any(True for _ in module.parameters(False)))


def _is_linear(module: torch.nn.Module) -> bool:
    # GPT-2's Conv1D is a linear layer with its weight transposed.
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def load_tokenizer(folder: Path, chat_template: str | None = None, field: str = "spec.model.uri") -> Any:
    """Load the tokenizer, which must have an end-of-text token: without one the adapter never learns to stop.

    A given chat template replaces the model's own, also in the published tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise RunError(
            Reason.MODEL_UNSUPPORTED, f"{field}: its tokenizer cannot be loaded: {str(error)[:500]}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise RunError(Reason.MODEL_UNSUPPORTED, f"{field}: its tokenizer has no end-of-text token (eos_token)")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer
