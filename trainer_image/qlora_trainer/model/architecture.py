"""Class, parameters and modules of a model, from its configuration; no weights are loaded."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import NoneType
from typing import Any, Final

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from qlora_api.foreign_files import read_file, read_object
from qlora_api.model_config import MAX_CONFIG_BYTES, MAX_PARAMETERS, MAX_TOKENIZER_CONFIG_BYTES
from qlora_api.reasons import Reason
from qlora_api.units import GIB, MIB
from qlora_api.untrusted_json import InvalidJsonError, TooManyValuesError, check_values
from qlora_trainer.errors import RunError
from qlora_trainer.model.model_files import check_model_files, check_no_special
from qlora_trainer.model.quantization import QuantizableWeights, count_quantizable
from qlora_trainer.runtime.resource_limits import call_native, cpu_time_limit, memory_limit
from qlora_trainer.storage.snapshots import MAX_TEXT_FILE_BYTES, text_files

_BUILD_BYTES: Final = GIB
"""Memory of a model without weights: its modules take kilobytes each, whatever their size."""
_BUILD_SECONDS: Final = 60.0
"""CPU time to build it: seconds for the largest ones; a config.json may ask for a billion layers."""

_LOAD_SECONDS: Final = 120.0
"""To load a tokenizer: seconds, and half a minute where merges are derived from a SentencePiece model."""
_LOAD_BYTES: Final = 2560 * MIB
"""Memory to load a tokenizer, of the prepare pod's 4 GiB."""
_MAX_TOKENIZER_VALUES: Final = 10_000_000
"""Values in a tokenizer's JSON, 640 MiB as empty lists. Gemma 3's has 262,144 tokens and 514,906 merges of two texts,
some two million."""
_MAX_EXPANSION: Final = 10_000
"""Characters that a tokenizer may make of one: published ones replace one by three at most, in a few steps, and add two
or three tokens to a text."""
_TEMPLATE_NAME: Final = re.compile(r"\w[\w.-]*")
_POSITION_TABLE: Final = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|pos_encoding)(\.weight)?$")
"""Names of tables of positions in transformers."""
_INDEXER: Final = re.compile(r"(^|\.)(indexer|lightning_indexer)\.")
"""Modules of sparse attention (DeepSeek V3.2): they choose positions by topk, through which no gradient flows."""
_ADDED_TOKENS: Final = tuple("single pair ids".split())  # noqa: SIM905 (the name of a strategy otherwise)
"""Fields of a post-processor in tokenizer.json that name tokens for one text, for two, and their ids."""


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
    vocabulary: int
    """Rows of the embedding: every token id is below it."""
    positions: int | None
    """Tokens of the longest row that learned or tabulated positions allow; None if positions are computed."""


def load_architecture(folder: Path, field: str = "spec.model.uri") -> Architecture:
    """Build the model without weights and describe it."""
    return describe(build_empty(folder, field))


def build_empty(folder: Path, field: str = "spec.model.uri") -> Any:
    """Return the model on the meta device: modules and shapes without weights."""
    content = read_config(folder, field)
    try:
        with memory_limit(_BUILD_BYTES), cpu_time_limit(_BUILD_SECONDS):
            check_model_files(folder, field)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except RunError:
        raise
    # transformers raises whatever Python or torch raise for the numbers and types that a config.json may have.
    except Exception as error:
        raise RunError(Reason.MODEL_UNSUPPORTED, f"{field}: {_why_not(content, error)}") from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > MAX_PARAMETERS:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"{field}: config.json describes a model with {parameters:,} weights, more than "
            f"{MAX_PARAMETERS:,}; correct it",
        )
    return model


def read_config(folder: Path, field: str = "spec.model.uri") -> Mapping[str, Any]:
    """Return the content of config.json, or raise ModelUnsupported if it is no JSON object of a reasonable size."""
    try:
        content = read_object(folder / "config.json", MAX_CONFIG_BYTES)
    except FileNotFoundError as error:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"{field}: there is no config.json; use the folder of a model in the Hugging Face format",
        ) from error
    except OSError as error:
        raise RunError(Reason.MODEL_UNSUPPORTED, f"{field}: config.json: {error.strerror}; correct it") from error
    except InvalidJsonError as error:
        raise RunError(Reason.MODEL_UNSUPPORTED, f"{field}: config.json {error}; correct it") from error
    if problem := _problem_of(content):
        raise RunError(Reason.MODEL_UNSUPPORTED, f"{field}: config.json has {problem}; remove it")
    return content


def _problem_of(content: Mapping[str, Any]) -> str:
    """Return which field transformers would stumble over long after it read the file; empty if there is none."""
    for name, value in content.items():
        if callable(getattr(PreTrainedConfig, name, None)):  # each field becomes an attribute, and hides the method
            return f"the field {name}, which is none of a configuration"
        if name == "quantization_config" and not isinstance(value, (Mapping, NoneType)):
            return f"a {name} that is no object"
        if isinstance(value, Mapping) and (problem := _problem_of(value)):
            return problem
    return ""


def _why_not(content: Mapping[str, Any], error: Exception) -> str:
    if "auto_map" in content:
        return (
            f"model type '{content.get('model_type')}' needs code from its repository (auto_map), which is never run; "
            "choose an architecture that the trainer's transformers release knows"
        )
    if "Unrecognized configuration class" in str(error):
        return (
            f"transformers has no causal language model of the type '{content.get('model_type')}', so that its text "
            "decoder cannot be trained alone; use a model that generates text"
        )
    cause = f"{type(error).__name__}: {str(error)[:500]}"
    return f"the trainer's transformers release cannot build it: {cause}; use another model"


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
        vocabulary=embedding.weight.shape[0],
        positions=_position_limit(model),
    )


def _position_limit(model: Any) -> int | None:
    """Return the rows of the smallest table of positions, of learned ones (GPT-2, OPT) or computed ones (GPT-J)."""
    limit, decoder = getattr(model.config.get_text_config(), "max_position_embeddings", None), _decoder_prefix(model)
    tables = [
        tensor.shape[0]
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.dim() == 2 and name.startswith(decoder) and _POSITION_TABLE.search(name)
    ]
    # OPT's table has two rows that stand for no position.
    return min([limit, *tables]) if tables and limit else min(tables, default=None)


def linear_modules(model: Any) -> dict[str, Any]:
    """Return the linear modules of the language model that can have an adapter by name; its output layer cannot."""
    decoder = _decoder_prefix(model)
    return {
        name: module
        for name, module in _all_linear_modules(model)
        if name.startswith(decoder) and not _INDEXER.search(name) and _computes_as_linear(module)
    }


def excluded_linear_modules(model: Any) -> tuple[str, ...]:
    """Return the other linear modules: those of a vision tower, which text never reaches, of indexers, and routers."""
    adaptable = linear_modules(model)
    return tuple(sorted(name for name, _ in _all_linear_modules(model) if name not in adaptable))


def _all_linear_modules(model: Any) -> Iterator[tuple[str, Any]]:
    output = model.get_output_embeddings()
    return ((name, each) for name, each in model.named_modules() if _is_linear(each) and each is not output)


def _computes_as_linear(module: Any) -> bool:
    """Return whether a layer maps rows of features to rows of features, to which PEFT adds those of an adapter.

    Routers of Llama 4 and PhiMoE are a linear layer that returns a tuple, and DeepSeek V4 has one of blocks.
    """
    is_plain = not isinstance(module, torch.nn.Linear) or type(module).forward is torch.nn.Linear.forward
    if is_plain or type(module).__module__.startswith("bitsandbytes."):
        return True
    weights = {name: torch.empty_like(weight, device="meta") for name, weight in module.named_parameters()}
    rows = torch.empty(1, 2, module.in_features, dtype=module.weight.dtype, device="meta")
    try:
        output = torch.func.functional_call(module, weights, (rows,))
    # Whatever torch raises for an input that the layer was not made for.
    except Exception:
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, 2, module.out_features)


def _decoder_prefix(model: Any) -> str:
    """Return the path of the text decoder with a dot at its end; empty for a model that has no other part."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")


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
    check_no_special(folder, field)
    try:
        _check_tokenizer_files(folder)
        _check_tokenizer_class(folder)
        tokenizer = call_native(
            lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False), _LOAD_SECONDS, _LOAD_BYTES
        )
        check_expansion(getattr(tokenizer, "backend_tokenizer", None))
        _check_templates(tokenizer.chat_template)
    # The tokenizers library raises plain Exception for a file that it cannot read.
    except Exception as error:
        raise RunError(
            Reason.MODEL_UNSUPPORTED, f"{field}: its tokenizer cannot be loaded: {str(error)[:500]}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise RunError(Reason.MODEL_UNSUPPORTED, f"{field}: its tokenizer has no end-of-text token (eos_token)")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def _check_templates(found: Any) -> None:
    """Raise ValueError if the chat template is neither text nor several texts, with names that become files."""
    named = found if isinstance(found, dict) else {"default": "" if found is None else found}
    for name, text in named.items():
        if not isinstance(text, str) or not _TEMPLATE_NAME.fullmatch(str(name)):
            raise ValueError(f"its chat_template {str(name)[:100]!r} is no text, or has no name; correct it")


def check_expansion(backend: Any) -> None:
    """Raise ValueError if a tokenizer makes gigabytes of a short text before it splits it, or of a few tokens.

    Its steps are the model author's: replacements multiply, and a template adds tokens to each text.
    """
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        step = getattr(backend, part, None)
        factor = _expansion_of(json.loads(step.__getstate__())) if step is not None else 1
        if factor > _MAX_EXPANSION:
            raise ValueError(
                f"its {part} may make a text {factor:,} times as long, more than {_MAX_EXPANSION:,} times; use another "
                "tokenizer"
            )


def _expansion_of(step: Any) -> int:
    """Return by how much a step of a tokenizer, as its library writes it, may lengthen a character or a text."""
    if isinstance(step, list):
        return prod(map(_expansion_of, step))
    if not isinstance(step, Mapping):
        return 1
    added = [step.get("prepend", ""), *(part for name in _ADDED_TOKENS for part in step.get(name) or ())]
    own = max(len(str(step.get("content", ""))), len(str(added[0])) + len(added) - 1, 1)
    return own * prod(_expansion_of(part) for part in step.values() if isinstance(part, (list, Mapping)))


def _check_tokenizer_files(folder: Path) -> None:
    """Raise ValueError if a file is larger than any tokenizer's, or takes a multiple of its size."""
    paths = {path.name: path for path in folder.iterdir() if path.is_file()}
    for name in text_files(paths):
        if paths[name].stat().st_size > MAX_TEXT_FILE_BYTES:
            raise ValueError(f"{name} has more than {MAX_TEXT_FILE_BYTES:,} bytes; use another tokenizer")
        if not name.endswith(".json"):
            continue
        try:
            check_values(read_file(paths[name], MAX_TEXT_FILE_BYTES), maximum=_MAX_TOKENIZER_VALUES)
        except TooManyValuesError as error:
            raise ValueError(f"{name} {error}; use another tokenizer") from error


def _check_tokenizer_class(folder: Path) -> None:
    """Raise ValueError if the class is none of a tokenizer: transformers loads any class that it exports.

    Such as AutoProcessor, to which AutoTokenizer does not pass trust_remote_code on: it asks whether to run code.
    """
    for file in ("tokenizer_config.json", "config.json"):
        path = folder / file
        name = read_object(path, MAX_TOKENIZER_CONFIG_BYTES).get("tokenizer_class") if path.is_file() else None
        if isinstance(name, str) and not _is_tokenizer_class(name):
            raise ValueError(f"tokenizer_class in {file} is {name[:100]!r}, which is no tokenizer; correct it")


def _is_tokenizer_class(name: str) -> bool:
    """Return whether transformers would load a tokenizer; it ignores unknown names, and every `Fast` at the end."""
    found = getattr(transformers, name, None)
    if found is None:
        return not name.endswith("Fast") or _is_tokenizer_class(name.removesuffix("Fast"))
    is_placeholder = hasattr(found, "_backends")  # of a tokenizer whose library is not installed; it raises ImportError
    return is_placeholder or (isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase))
