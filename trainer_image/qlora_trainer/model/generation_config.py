"""Generation settings in files: checked, used as far as they are simple, written as they are with given stop tokens."""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from transformers import GenerationConfig

from qlora_api.foreign_files import read_object
from qlora_api.model_config import MAX_CONFIG_BYTES
from qlora_api.reasons import Reason
from qlora_trainer.errors import RunError

GENERATION_CONFIG: Final = "generation_config.json"
"""In the folder of an adapter, a full model or a merged one; transformers, vLLM and TGI read it."""
_MODEL_CONFIG: Final = "config.json"
_MAX_TOKEN_ID: Final = 2**31 - 1
"""Token ids are 32-bit integers in every tokenizer of the libraries."""
_SHOWN_CHARACTERS: Final = 300

log = logging.getLogger(__name__)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_TOKEN_ID


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_count, value))


def is_stop_tokens(value: Any) -> bool:
    """Return whether a value is a token id, a list of some, or null."""
    return value is None or _is_count(value) or _are_tokens(value)


_TOKENS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
_SETTINGS: Final[Mapping[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_TOKENS, is_stop_tokens),
    **dict.fromkeys(("repetition_penalty", "temperature"), _is_positive),
    **dict.fromkeys(("min_p", "top_p"), _is_share),
    **dict.fromkeys(("min_new_tokens", "no_repeat_ngram_size", "top_k"), _is_count),
    **dict.fromkeys(("do_sample", "remove_invalid_values", "renormalize_logits", "use_cache"), _is_flag),
    **dict.fromkeys(("begin_suppress_tokens", "suppress_tokens"), _are_tokens),
}
"""What a model's settings may change of its answers here, and their values. All others are for servers, which read the
file: some load code of the hub (force_words_ids), need a tokenizer (stop_strings) or take any memory (num_beams)."""
_NO_SETTINGS: Final = frozenset({"_from_model_config", "max_length", "max_new_tokens", "transformers_version"})
"""What describes the file, and limits that each call has of its own."""


def check_generation_config(folder: Path, field: str) -> None:
    """Refuse generation settings of a model that transformers cannot read, and log those that are not used here.

    Raises:
        RunError: MODEL_UNSUPPORTED with the setting.

    """
    file = folder / GENERATION_CONFIG
    if not file.exists():
        return
    try:
        content = read_object(file, MAX_CONFIG_BYTES)
        _check_settings(content)
        GenerationConfig.from_dict(content)
    # Whatever transformers raises for the types that the file may have.
    except Exception as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)[:_SHOWN_CHARACTERS]
        raise RunError(
            Reason.MODEL_UNSUPPORTED, f"{field}: {GENERATION_CONFIG} {cause}; correct it, or remove it"
        ) from error
    unused = vars(GenerationConfig()).keys() & _without_nulls(content).keys() - _simple(content).keys() - _NO_SETTINGS
    if unused:
        log.info("%s: answers are generated without %s", GENERATION_CONFIG, ", ".join(sorted(unused)))


def _check_settings(content: Mapping[str, Any]) -> None:
    """Raise ValueError for what are no token ids, and for the name of a method: each name becomes an attribute."""
    settings = vars(GenerationConfig())
    for name, value in content.items():
        if name not in settings and hasattr(GenerationConfig, name):
            raise ValueError(f"has {name}, which is no setting")
        if name in _TOKENS and not is_stop_tokens(value):
            raise ValueError(f"has {name}: {json.dumps(value)[:_SHOWN_CHARACTERS]}, which are no token ids")


def _without_nulls(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _simple(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = _without_nulls(settings).items()
    return {name: value for name, value in found if name in _SETTINGS and _SETTINGS[name](value)}


@contextlib.contextmanager
def simple_settings(model: Any) -> Iterator[None]:
    """Let a model generate with those of its own settings that are simple; afterwards it has all of them."""
    own = model.generation_config
    model.generation_config = GenerationConfig(**_simple(vars(own)))
    try:
        yield
    finally:
        model.generation_config = own


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
        content = read_object(file, MAX_CONFIG_BYTES) if file.is_file() else {}
        _check_settings(content)
    except ValueError as error:
        message = f"the adapter's {GENERATION_CONFIG} {error}; use the adapter as it was published"
        raise RunError(Reason.INVALID_SPEC, message) from error
    tokens: int | list[int] | None = content.get("eos_token_id")
    return tokens


def _write(file: Path, content: dict[str, Any], tokens: int | list[int] | None) -> None:
    file.write_text(json.dumps(content | {"eos_token_id": tokens}, indent=2, sort_keys=True) + "\n")
