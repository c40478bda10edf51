"""Generation settings in files: written as they are, with the stop tokens that they are given."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from transformers import GenerationConfig

from qlora_api.foreign_files import read_object
from qlora_api.model_config import MAX_CONFIG_BYTES
from qlora_api.reasons import Reason
from qlora_api.untrusted_json import InvalidJsonError
from qlora_trainer.errors import RunError

GENERATION_CONFIG: Final = "generation_config.json"
"""In the folder of an adapter, a full model or a merged one; transformers, vLLM and TGI read it."""
_MODEL_CONFIG: Final = "config.json"


def save_model(model: Any, target: Path) -> None:
    """Save a model whose generation settings may conflict, as transformers refuses to save such ones.

    temperature beside do_sample=False is a conflict that many bases have (huggingface/transformers#24785), and no
    reason to lose a trained model.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(target)
    finally:
        model.generation_config = own
    write_generation_config(own, own.eos_token_id, target)


def write_generation_config(own: Any, stops: int | Sequence[int] | None, target: Path) -> None:
    """Write the base's generation settings with these stop tokens, in the model's own config.json too if it has one."""
    tokens = list(stops) if isinstance(stops, Sequence) else stops
    _write(target / GENERATION_CONFIG, json.loads(own.to_json_string(ignore_metadata=True)), tokens)
    if (target / _MODEL_CONFIG).is_file():  # which converters to other formats read
        _write(target / _MODEL_CONFIG, read_object(target / _MODEL_CONFIG, MAX_CONFIG_BYTES), tokens)


def read_stop_tokens(folder: Path) -> int | list[int] | None:
    """Return the stop tokens in a folder's generation settings; None if it has none, as adapters of old releases."""
    file = folder / GENERATION_CONFIG
    try:
        tokens: int | list[int] | None = (
            read_object(file, MAX_CONFIG_BYTES).get("eos_token_id") if file.is_file() else None
        )
    except InvalidJsonError as error:
        message = f"the adapter's {GENERATION_CONFIG} {error}; use the adapter as it was published"
        raise RunError(Reason.INVALID_SPEC, message) from error
    return tokens


def _write(file: Path, content: dict[str, Any], tokens: int | list[int] | None) -> None:
    file.write_text(json.dumps(content | {"eos_token_id": tokens}, indent=2, sort_keys=True) + "\n")
