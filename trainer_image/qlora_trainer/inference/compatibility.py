"""Whether an adapter and a base belong together, told before any weight is read.

peft itself leaves out, without a word, the weights of layers that a base does not have.
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
    """Refuse a base that the adapter was not made for; field is where the base was given."""
    model = build_empty(base, field)
    difference = _count_difference(adapter, model) or _shape_difference(adapter, model)
    if difference:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"{field}: the adapter {adapter.record.job} does not fit this model: {difference}; give "
            f"{adapter.record.base}, which it was trained on",
        )


def _count_difference(adapter: PublishedAdapter, model: Any) -> str:
    found, wanted = sum(weight.numel() for weight in model.parameters()), adapter.record.parameters
    if wanted in {None, found}:
        return ""
    return f"it has {found:,} weights, and the adapter's base {wanted:,}"


def _shape_difference(adapter: PublishedAdapter, model: Any) -> str:
    found, wanted = read_shapes(adapter.folder), _shapes_on(model, adapter.folder)
    misfit = next((name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)), None)
    if misfit is None:
        return ""
    return (
        f"{misfit} is {_format_shape(found, misfit)} in the adapter and would be {_format_shape(wanted, misfit)} here"
    )


def _shapes_on(model: Any, adapter: Path) -> Shapes:
    """Return the shapes that an adapter with these settings has on a model; none where its modules are missing."""
    settings = PeftConfig.from_pretrained(str(adapter))
    settings.init_lora_weights, settings.base_model_name_or_path = False, None
    try:
        with torch.device("meta"):
            peft = get_peft_model(model, settings)
    except ValueError:  # no module has a name that the settings ask for
        return {}
    tensors = get_peft_model_state_dict(peft, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _format_shape(shapes: Shapes, name: str) -> str:
    return " x ".join(map(str, shapes[name])) if name in shapes else "missing"
