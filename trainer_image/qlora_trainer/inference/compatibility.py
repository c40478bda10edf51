"""Checks that an adapter fits a base, before any weight is loaded.

peft itself silently skips the weights of layers that the base does not have.
"""

import json
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from qlora_api.foreign_files import read_object, read_start
from qlora_api.model_config import MAX_CONFIG_BYTES
from qlora_api.reasons import Reason
from qlora_api.units import MIB
from qlora_api.untrusted_json import InvalidJsonError
from qlora_trainer.errors import RunError
from qlora_trainer.inference.published_adapter import PublishedAdapter
from qlora_trainer.inference.vllm_limits import Shapes, read_shapes
from qlora_trainer.model.architecture import build_empty
from qlora_trainer.model.weight_check import reading_model

_CONFIG: Final = "adapter_config.json"
_WEIGHTS: Final = "adapter_model.safetensors"
_MAX_HEADER_BYTES: Final = 16 * MIB
"""Of the weights: 100,000 tensors, as many as adapters of all experts of a large mixture have; parsed, ten times it."""
_DTYPES: Final = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_SHOWN_CHARACTERS: Final = 200
_MAX_NUMBER: Final = 2**20
"""Far above every rank and alpha of a spec (LoraSpec), PiSSA's doubled ones too, and within torch's sizes."""


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= _MAX_NUMBER


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and _is_positive(value)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


_WRITTEN: Final[Mapping[str, Callable[[Any], bool]]] = {
    "r": _is_rank,
    "lora_alpha": _is_positive,
    "lora_dropout": lambda value: value == 0 or (_is_positive(value) and value < 1),
    "task_type": lambda value: value in (None, "CAUSAL_LM"),
    **dict.fromkeys(("base_model_name_or_path", "peft_version", "revision"), _is_text),
    **dict.fromkeys(
        ("ensure_weight_tying", "fan_in_fan_out", "inference_mode", "use_dora", "use_rslora"),
        lambda value: isinstance(value, bool),
    ),
}
"""Settings that the trainer chooses, or PEFT for it, and their values, as PEFT does not check their types; names of
modules and the initialization are checked apart."""
_MODULE: Final = re.compile(r"[\w.-]+")
"""PEFT takes other text for a regular expression, which may take for ever."""
_FUSED: Final = re.compile(r"\.\*\\\.(\w|\\[.-])+")
"""The pattern that PEFT itself writes for experts that transformers stacks in one weight: `.*\\.gate_up_proj`."""


def check_adapter_config(folder: Path) -> None:
    """Refuse settings that the trainer never writes: PEFT imports modules, loads models and reads files that they name.

    Such as a peft_type that loads a model of the hub, megatron_core (a module) or cache files of initializations.

    Raises:
        RunError: INVALID_SPEC with the setting.

    """
    try:
        content = read_object(folder / _CONFIG, MAX_CONFIG_BYTES)
    except (InvalidJsonError, OSError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or error
        message = f"the adapter's {_CONFIG} {cause}; use the adapter as it was published"
        raise RunError(Reason.INVALID_SPEC, message) from error
    defaults = LoraConfig().to_dict()
    foreign = [name for name in sorted({*content, "peft_type"}) if not _is_expected(name, content.get(name), defaults)]
    if foreign:
        shown = json.dumps(content.get(foreign[0]))[:100]
        raise RunError(
            Reason.INVALID_SPEC,
            f"the adapter's {_CONFIG}: {foreign[0]} is {shown}, which the trainer never writes; use the adapter as it "
            "was published",
        )


def _is_expected(name: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    """Return whether the trainer may have written a setting; PEFT itself ignores those that it does not know."""
    match name:
        case "target_modules" | "modules_to_save" | "exclude_modules":
            return value in (None, "all-linear") or (isinstance(value, list) and all(map(_is_module, value)))
        case "target_parameters":  # PEFT writes an empty list, or the experts, for models that stack them
            return value is None or (isinstance(value, list) and all(map(_is_module, value)))
        case "rank_pattern" | "alpha_pattern":
            is_value = _is_rank if name == "rank_pattern" else _is_positive
            names = isinstance(value, dict) and all(_is_module(key) or _FUSED.fullmatch(key) for key in value)
            return names and all(map(is_value, value.values()))
        case "init_lora_weights":
            return value in (True, False, "gaussian")
        case _:
            return _WRITTEN[name](value) if name in _WRITTEN else name not in defaults or value == defaults[name]


def _is_module(name: Any) -> bool:
    return isinstance(name, str) and _MODULE.fullmatch(name) is not None


def check_adapter_weights(folder: Path) -> None:
    """Refuse weights that are no complete safetensors file of finite numbers, which PEFT loads without a look.

    Raises:
        RunError: INVALID_SPEC with the cause.

    """
    path = folder / _WEIGHTS
    try:
        _check_header(read_start(path, 8))
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                _check_finite(name, tensors.get_tensor(name))
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error)[:_SHOWN_CHARACTERS]
        message = f"the adapter's {_WEIGHTS}: {cause}; use the adapter as it was published"
        raise RunError(Reason.INVALID_SPEC, message) from error


def _check_header(start: bytes) -> None:
    """Check the length of a header: the library takes ten times as much memory before it finds a mistake."""
    (length,) = struct.unpack("<Q", start.ljust(8, b"\0"))
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"has a header of {length:,} bytes, more than {_MAX_HEADER_BYTES:,}")


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in _DTYPES or not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name[:_SHOWN_CHARACTERS]} has values that are no finite floating-point numbers")


def check_compatible(adapter: PublishedAdapter, base: Path, field: str) -> None:
    """Raise RunError if the adapter does not fit the base; `field` names the option that gave the base."""
    check_adapter_config(adapter.folder)
    model = build_empty(base, field)
    difference = _count_difference(adapter, model) or _shape_difference(adapter, model)
    if difference:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"{field}: the adapter {adapter.record.job} does not fit this model: {difference}; use "
            f"{adapter.record.base}, which it was trained on",
        )


def _count_difference(adapter: PublishedAdapter, model: Any) -> str:
    actual, expected = sum(weight.numel() for weight in model.parameters()), adapter.record.parameters
    if expected in {None, actual}:
        return ""
    return f"it has {actual:,} weights, but the adapter's base has {expected:,}"


def _shape_difference(adapter: PublishedAdapter, model: Any) -> str:
    actual, expected = read_shapes(adapter.folder), _shapes_on(model, adapter.folder)
    name = next((name for name in sorted({*actual, *expected}) if actual.get(name) != expected.get(name)), None)
    if name is None:
        return ""
    return f"{name} is {_format_shape(actual, name)} in the adapter and would be {_format_shape(expected, name)} here"


def _shapes_on(model: Any, adapter: Path) -> Shapes:
    """Return the shapes that an adapter with these settings would have on a model; none if its modules are missing."""
    with reading_model("the adapter", "PEFT cannot read it"):
        settings = PeftConfig.from_pretrained(str(adapter))
    settings.init_lora_weights, settings.base_model_name_or_path = False, None
    try:
        with torch.device("meta"):
            peft = get_peft_model(model, settings)
    except ValueError:  # no module has a name in target_modules
        return {}
    tensors = get_peft_model_state_dict(peft, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _format_shape(shapes: Shapes, name: str) -> str:
    return " x ".join(map(str, shapes[name])) if name in shapes else "missing"
