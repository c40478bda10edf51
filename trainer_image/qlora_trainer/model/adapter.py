"""The adapter: what peft is told, how it starts, and what of it is published."""

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

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import LoraSpec
from qlora_trainer.errors import RunError
from qlora_trainer.model.architecture import linear_modules, modules_with_weights
from qlora_trainer.model.loftq import ADAPTER_NAME, init_from_quantization_error
from qlora_trainer.model.target_modules import ALL_LINEAR, expand_pattern, match_modules

_PISSA: Final = "pissa_niter_16"
"""PiSSA by a randomised decomposition of 16 iterations: seconds, where the exact one takes minutes (its paper)."""
_INIT_LORA_WEIGHTS: Final[Mapping[str, Any]] = {"default": True, "gaussian": "gaussian", "pissa": _PISSA, "loftq": True}
"""init_lora_weights; LoftQ's start replaces the default one."""


def make_peft_model(base: Any, lora: LoraSpec, seed: int) -> Any:
    """Put a fresh fp32 adapter on the base; the same seed gives the same adapter."""
    torch.manual_seed(seed)
    peft = get_peft_model(base, lora_config(lora, base))
    if lora.init == "loftq":
        init_from_quantization_error(peft, Path(base.name_or_path))
    _train_in_fp32(peft)
    return peft


def lora_config(lora: LoraSpec, base: Any) -> Any:
    """Return peft's settings."""
    linears = linear_modules(base)
    # peft takes 'norm' for every name that ends so, input_layernorm too; a whole path means one module.
    whole = match_modules(modules_with_weights(base), lora.modules_to_save)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        rank_pattern=expand_pattern(linears, lora.rank_pattern),
        alpha_pattern=expand_pattern(linears, lora.alpha_pattern),
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if lora.targets == (ALL_LINEAR,) else sorted(lora.targets),
        modules_to_save=list(whole) or None,
        ensure_weight_tying=trains_tied_weight(base, whole),
        init_lora_weights=_INIT_LORA_WEIGHTS[lora.init],
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def resolve_adapter(empty: Any, lora: LoraSpec) -> dict[str, Any]:
    """Return what peft makes of an adapter's settings on a model without weights: module by module, however written.

    What it refuses ends here, and not when a GPU waits.
    """
    # Starts from the base's weights are checked by their own rules: here there is nothing to decompose.
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
            f"spec.lora.dropout: all-linear means the experts of {name} too, which are stacked in one weight and take "
            "no dropout; set it to 0, or name the linear modules in targets"
        )
    return f"spec.lora.targets: peft puts no adapter on these modules of {name}: {error}; choose others"


def trains_tied_weight(base: Any, modules_to_save: tuple[str, ...]) -> bool:
    """Return whether a module that is trained whole shares its weight with the embedding or the output layer."""
    embedding, output = base.get_input_embeddings(), base.get_output_embeddings()
    tied = output is not None and output.weight is embedding.weight
    return tied and any(base.get_submodule(name) in {embedding, output} for name in modules_to_save)


def _train_in_fp32(peft: Any) -> None:
    """Keep modules that are trained whole in fp32 as well: in bf16 most updates round to nothing."""
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def initial_adapter_weights(peft: Any, lora: LoraSpec) -> dict[str, torch.Tensor]:
    """Return what the adapter starts as where that was taken out of the base (PiSSA), by name; else nothing."""
    if lora.init != "pissa":
        return {}
    return {name: weight.detach().clone() for name, weight in peft.named_parameters() if "lora_" in name}


@contextlib.contextmanager
def adapter_disabled(peft: Any, initial_weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let the model be its base again: without its adapter, or as it was when that was taken out of the base."""
    if not isinstance(peft, PeftModel):  # method full, which is its base until it is trained
        yield
        return
    if not initial_weights:
        with peft.disable_adapter():
            yield
        return
    weights = dict(peft.named_parameters())
    learned = {name: weights[name].data for name in initial_weights}
    try:
        for name, weight in initial_weights.items():
            weights[name].data = weight
        yield
    finally:
        for name, weight in learned.items():
            weights[name].data = weight


def rewrite_for_original_base(folder: Path, initial_weights: Mapping[str, torch.Tensor]) -> None:
    """Rewrite a saved PiSSA adapter as one for the base as its publisher has it."""
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    known = {name.replace(f".{ADAPTER_NAME}.", "."): weight for name, weight in initial_weights.items()}
    save_file(convert_pissa_weights(load_file(file), known), file, metadata={"format": "pt"})
    config.write_text(json.dumps(convert_pissa_config(json.loads(config.read_text()))))


def convert_pissa_weights(
    weights: Mapping[str, torch.Tensor], initial_weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return an adapter's weights for the base as it was: BA - B0 A0 is [B, -B0] times [A, A0]."""
    converted = dict(weights)
    for name, first in initial_weights.items():
        weight = weights[name]
        parts = [weight, first.cpu()] if "lora_A" in name else [weight, -first.cpu()]
        converted[name] = torch.cat(parts, dim=0 if "lora_A" in name else 1)
    return converted


def convert_pissa_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that go with it: twice the rank at the same scale."""
    doubled = {name: 2 * config[name] for name in ("r", "lora_alpha")}
    patterns = {
        name: {word: 2 * number for word, number in config[name].items()} for name in ("rank_pattern", "alpha_pattern")
    }
    return config | doubled | patterns | {"init_lora_weights": True}
