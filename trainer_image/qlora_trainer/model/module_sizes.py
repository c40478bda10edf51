"""Sizes of all modules of a model without weights, for the plan's estimate of memory."""

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

from qlora_api.model_config import SIZED_TYPES, TRACED_VERSION, record_sizes, reduce_config
from qlora_api.module_table import ModuleTableError, SizedModule, write_module_table
from qlora_trainer.model.architecture import linear_modules
from qlora_trainer.model.quantization import quantizable_modules

_LAYER: Final = re.compile(r"(\w+\.)*\d+(?=\.|$)", re.ASCII)
"""Path of a layer in that of a module: up to the last number."""
_UNNAMED: Final = "others"
"""Path of the modules outside of layers whose names are left out; no architecture has a module of this name."""
_MATRIX: Final = ({"weight"}, {"weight", "bias"})
"""Own weights of a linear module; one with more is described by their number."""


def describe_size(model: Any, config: Mapping[str, Any]) -> str:
    """Return what the plan needs to know of a model's size, as JSON of at most MAX_CONFIG characters.

    Args:
        model: The model on the meta device, without an adapter.
        config: Its config.json.

    """
    if config.get("model_type") in SIZED_TYPES:
        return reduce_config(config)
    try:
        return record_sizes(config, trace_modules(model))
    except ModuleTableError:
        return reduce_config(config)


def trace_modules(model: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the sizes of a model's modules in decreasing detail; nothing for a model without an output layer.

    Raises:
        ModuleTableError: It has a module with a name that cannot be written.

    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if id(embedding) not in names or id(head) not in names:
        return
    ends = {"embedding": names[id(embedding)], "head": names[id(head)]}
    modules, rest = tuple(_sized_modules(model)), {**_stacked_table(model), "fp32": _count_kept_in_fp32(model)}
    for described in (modules, tuple(_without_names(modules, set(ends.values())))):
        yield {"version": TRACED_VERSION, **ends, "modules": write_module_table(described), **rest}


def _without_names(modules: Iterable[SizedModule], named: Container[str]) -> Iterator[SizedModule]:
    """Yield the modules, with one instead of all below a layer, or the model, that have no matrix."""
    unnamed: dict[str, int] = {}
    for module in modules:
        if module.inputs or module.name in named:
            yield module
        else:
            layer = _LAYER.match(module.name)
            path = layer[0] if layer else _UNNAMED
            unnamed[path] = unnamed.get(path, 0) + module.outputs
    yield from (SizedModule(path, size) for path, size in unnamed.items())


def _sized_modules(model: Any) -> Iterator[SizedModule]:
    """Yield every module with weights of its own; one of several modules counts with the embedding, or the first."""
    adaptable, quantizable, embedding = linear_modules(model), quantizable_modules(model), model.get_input_embeddings()
    seen = set[int]()
    for name, module in sorted(model.named_modules(), key=lambda pair: pair[1] is not embedding):
        weights = dict(module.named_parameters(recurse=False))
        new = {key: weight for key, weight in weights.items() if id(weight) not in seen}
        seen |= {id(weight) for weight in new.values()}
        if _is_matrix(module, weights):
            outputs, inputs = _matrix_shape(module)
            yield SizedModule(
                name, outputs, inputs, "bias" in new, name in quantizable, name in adaptable, "weight" not in new
            )
        elif size := sum(weight.numel() for weight in new.values()):
            yield SizedModule(name, size)


def _is_matrix(module: Any, weights: Mapping[str, Any]) -> bool:
    is_linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    return is_linear and set(weights) in _MATRIX and module.weight.dim() == 2


def _matrix_shape(module: Any) -> tuple[int, int]:
    """Return outputs and inputs; GPT-2's Conv1D stores its weight transposed."""
    rows, columns = module.weight.shape
    return (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)


def _stacked_table(model: Any) -> Mapping[str, str]:
    """Return the weights of stacked experts that peft adapts for all-linear, and the linear modules that it then skips.

    A and B of one have rank times as many numbers as its columns and its rows, times experts and fused projections.
    """
    config = LoraConfig(r=1, target_modules="all-linear")
    convert_peft_config_for_transformers(config, model, conversions=None)
    if not config.target_parameters:
        return {}
    found = []
    for name, weight in model.named_parameters():
        if name.endswith(tuple(f".{target}" for target in config.target_parameters)):
            experts = weight.shape[0] if weight.dim() > 2 else 1
            rank = next((rank for key, rank in config.rank_pattern.items() if re.fullmatch(key, name)), 1)
            found.append(SizedModule(name, *(experts * rank * side for side in weight.shape[-2:])))
    linears = {name.rpartition(".")[2] for name in linear_modules(model)}
    skipped = sorted(linears - config.target_modules)
    return {"experts": write_module_table(found)} | ({"skipped": " ".join(skipped)} if skipped else {})


def _count_kept_in_fp32(model: Any) -> int:
    """Return the weights that transformers loads in fp32 where the others are in 16 bits."""
    keys = [re.escape(key) for key in model._keep_in_fp32_modules_strict or ()]
    kept = re.compile(rf"(^|\.)({'|'.join(keys)})(\.|$)") if keys else None
    return sum(weight.numel() for name, weight in model.named_parameters() if kept is not None and kept.search(name))
