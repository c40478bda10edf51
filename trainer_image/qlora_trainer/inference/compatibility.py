"""Checks that an adapter fits a base, before any weight is loaded.

peft itself silently skips the weights of layers that the base does not have.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

from qlora_api.reasons import Reason
from qlora_trainer.errors import RunError
from qlora_trainer.inference.published_adapter import PublishedAdapter
from qlora_trainer.inference.vllm_limits import Shapes, read_shapes
from qlora_trainer.model.architecture import build_empty


def check_compatible(adapter: PublishedAdapter, base: Path, field: str) -> None:
    """Raise RunError if the adapter does not fit the base; `field` names the option that gave the base."""
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
