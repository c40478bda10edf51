"""LoRA adapters: PEFT configuration, initialization and publishing format."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file

from qlora_api.foreign_files import read_object
from qlora_api.model_config import MAX_CONFIG_BYTES
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import LoraSpec
from qlora_trainer.errors import RunError
from qlora_trainer.model.architecture import excluded_linear_modules, linear_modules, modules_with_weights
from qlora_trainer.model.loftq import ADAPTER_NAME, init_from_quantization_error
from qlora_trainer.model.target_modules import ALL_LINEAR, expand_pattern, match_modules

_PISSA: Final = "pissa_niter_16"
"""PiSSA by a randomized SVD of 16 iterations: seconds, where the exact SVD takes minutes (PiSSA paper)."""
_INIT_LORA_WEIGHTS: Final[Mapping[str, Any]] = {"default": True, "gaussian": "gaussian", "pissa": _PISSA, "loftq": True}
"""Values of PEFT's init_lora_weights; LoftQ overwrites the default initialization."""


def make_peft_model(base: Any, lora: LoraSpec, seed: int) -> Any:
    """Attach a new fp32 adapter to the base; the same seed gives the same adapter."""
    torch.manual_seed(seed)
    peft = get_peft_model(base, lora_config(lora, base))
    if lora.init == "loftq":
        init_from_quantization_error(peft, Path(base.name_or_path))
    _train_in_fp32(peft)
    return peft


def lora_config(lora: LoraSpec, base: Any) -> Any:
    """Return PEFT's LoraConfig."""
    linears = linear_modules(base)
    # PEFT matches 'norm' with every name that ends in it, such as input_layernorm; a full path matches one module.
    modules_to_save = match_modules(modules_with_weights(base), lora.modules_to_save)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        rank_pattern=expand_pattern(linears, lora.rank_pattern),
        alpha_pattern=expand_pattern(linears, lora.alpha_pattern),
        lora_dropout=lora.dropout,
        # An adapter there would get no gradient, or change the shape of what the module returns.
        exclude_modules=list(excluded_linear_modules(base)) or None,
        target_modules=ALL_LINEAR if lora.targets == (ALL_LINEAR,) else sorted(lora.targets),
        modules_to_save=list(modules_to_save) or None,
        ensure_weight_tying=trains_tied_weight(base, modules_to_save),
        init_lora_weights=_INIT_LORA_WEIGHTS[lora.init],
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def resolve_adapter(empty: Any, lora: LoraSpec) -> dict[str, Any]:
    """Resolve an adapter's settings with PEFT on a model without weights, module by module, for the result digest.

    Settings that PEFT rejects end the run here, in prepare, before a GPU is allocated.
    """
    # PiSSA and LoftQ are checked elsewhere (target_modules): without weights there is nothing to decompose.
    config = lora_config(lora.model_copy(update={"init": "default"}), empty)
    try:
        modules = dict(get_peft_model(empty, config).named_modules())
    except (ValueError, NotImplementedError) as error:
        raise RunError(Reason.MODEL_UNSUPPORTED, _why_refused(type(empty).__name__, error)) from error
    adapted = {name: module for name, module in modules.items() if isinstance(module, LoraLayer)}
    return {
        "modules": {name: (module.r[ADAPTER_NAME], module.scaling[ADAPTER_NAME]) for name, module in adapted.items()},
        "whole": [name for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)],
    }


def _why_refused(name: str, error: Exception) -> str:
    if "lora_dropout" in str(error):
        return (
            f"spec.lora.dropout: all-linear includes the experts of {name}, which are stacked in one weight and "
            "support no dropout; set it to 0, or name the linear modules in targets"
        )
    return f"spec.lora.targets: PEFT cannot adapt these modules of {name}: {error}; choose others"


def trains_tied_weight(base: Any, modules_to_save: tuple[str, ...]) -> bool:
    """Return whether a module of modulesToSave is a tied embedding or output layer."""
    embedding, output = base.get_input_embeddings(), base.get_output_embeddings()
    tied = output is not None and output.weight is embedding.weight
    return tied and any(base.get_submodule(name) in {embedding, output} for name in modules_to_save)


def _train_in_fp32(peft: Any) -> None:
    """Convert all trainable weights to fp32, those of modulesToSave too: in bf16 most updates round to zero."""
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def initial_adapter_weights(peft: Any, lora: LoraSpec) -> dict[str, torch.Tensor]:
    """Return the initial adapter weights by name for PiSSA, which subtracts them from the base; otherwise none."""
    if lora.init != "pissa":
        return {}
    return {name: weight.detach().clone() for name, weight in peft.named_parameters() if "lora_" in name}


@contextlib.contextmanager
def adapter_disabled(peft: Any, initial_weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Make the model equal to its base: without the adapter, or for PiSSA with the initial adapter weights."""
    if not isinstance(peft, PeftModel):  # method full: the model is the base until it is trained
        yield
        return
    if not initial_weights:
        with peft.disable_adapter():
            yield
        return
    weights = dict(peft.named_parameters())
    trained = {name: weights[name].data for name in initial_weights}
    try:
        for name, weight in initial_weights.items():
            weights[name].data = weight
        yield
    finally:
        for name, weight in trained.items():
            weights[name].data = weight


def rewrite_for_original_base(folder: Path, initial_weights: Mapping[str, torch.Tensor]) -> None:
    """Rewrite a saved PiSSA adapter as a LoRA adapter for the original base."""
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    known = {name.replace(f".{ADAPTER_NAME}.", "."): weight for name, weight in initial_weights.items()}
    save_file(convert_pissa_weights(load_file(file), known), file, metadata={"format": "pt"})
    config.write_text(json.dumps(convert_pissa_config(read_object(config, MAX_CONFIG_BYTES))))


def convert_pissa_weights(
    weights: Mapping[str, torch.Tensor], initial_weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the weights for the original base: BA - B0 A0 = [B, -B0] [A; A0], so the rank doubles."""
    converted = dict(weights)
    for name, initial in initial_weights.items():
        weight = weights[name]
        parts = [weight, initial.cpu()] if "lora_A" in name else [weight, -initial.cpu()]
        converted[name] = torch.cat(parts, dim=0 if "lora_A" in name else 1)
    return converted


def convert_pissa_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the matching adapter_config.json: twice the rank at the same scale."""
    doubled = {name: 2 * config[name] for name in ("r", "lora_alpha")}
    patterns = {
        name: {module: 2 * number for module, number in config[name].items()}
        for name in ("rank_pattern", "alpha_pattern")
    }
    return config | doubled | patterns | {"init_lora_weights": True}
