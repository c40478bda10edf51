"""Reads the shape of a model of any architecture from the sizes of its modules, which prepare recorded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_api.model_config import MAX_PARAMETERS, TRACED, TRACED_VERSION
from qlora_api.module_table import ModuleGroup, ModuleTableError, SizedModule, read_module_table
from qlora_planner.models.shapes import (
    SET_GPUS_EXPLICITLY,
    Block,
    Linear,
    ModelWeights,
    Module,
    StackedExperts,
    UnknownModelError,
)

_MODEL: Final = ("",)
"""Path of the model itself: modules outside of layers are below it."""


@dataclass(frozen=True, kw_only=True)
class TracedShape(ModelWeights):
    """A model whose modules are known, but not what its layers compute."""

    adaptable: tuple[Block, ...]
    """Linear layers that can have an adapter."""
    others: tuple[Block, ...]
    """All other modules of layers."""

    @property
    def adaptable_blocks(self) -> tuple[Block, ...]:
        """Return the blocks whose linear layers can have an adapter."""
        return self.adaptable

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Return all blocks."""
        return self.adaptable + self.others


class _Traced(BaseModel):
    """What prepare records; keys of a later release are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    embedding: str
    head: str
    modules: str
    experts: str = ""
    skipped: str = ""
    fp32: int = Field(default=0, ge=0, le=MAX_PARAMETERS)


def read_traced(config: Mapping[str, Any]) -> TracedShape:
    """Return the shape of the model that prepare recorded.

    Raises:
        UnknownModelError: It was recorded in another version, or is damaged.

    """
    recorded, family = config.get(TRACED), str(config.get("model_type"))
    version = recorded.get("version") if isinstance(recorded, dict) else None
    if version != TRACED_VERSION or isinstance(version, bool):
        raise UnknownModelError(
            f"the recorded sizes of a model of type '{family}' have version {str(version)[:20]}, and this operator "
            f"reads {TRACED_VERSION}; {SET_GPUS_EXPLICITLY}"
        )
    try:
        return _shape(family, _Traced.model_validate(recorded))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        cause = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except ModuleTableError as error:
        cause = str(error)
    raise UnknownModelError(
        f"the recorded sizes of a model of type '{family}' cannot be read: {cause}; {SET_GPUS_EXPLICITLY}"
    )


def _shape(family: str, traced: _Traced) -> TracedShape:
    groups = read_module_table(traced.modules)
    outside = [module for group in groups if group.layers == _MODEL for module in group.modules]
    embedding, head = _find(outside, traced.embedding), _find(outside, traced.head)
    if embedding.inputs or not head.inputs:
        raise ModuleTableError(f"{embedding.name!r} is no embedding, or {head.name!r} no output layer")
    shape = TracedShape(
        family=family,
        tied=head.shared,
        embedding=Module(embedding.name, embedding.outputs),
        head=Linear(head.name, head.inputs, head.outputs, head.bias, quantizable=False),
        outside=tuple(Module(each.name, each.outputs) for each in outside if not each.inputs and each is not embedding),
        kept_in_fp32=traced.fp32,
        not_in_all_linear=frozenset(traced.skipped.split()),
        adaptable=_adaptable(groups),
        others=(*_other(groups, head.name), *_experts(traced.experts)),
    )
    if not traced.fp32 <= shape.parameters <= MAX_PARAMETERS:
        raise ModuleTableError(f"a model of {shape.parameters:,} weights cannot be")
    return shape


def _find(modules: Iterable[SizedModule], name: str) -> SizedModule:
    found = next((module for module in modules if module.name == name), None)
    if found is None:
        raise ModuleTableError(f"it has no module {name[:40]!r} outside of layers")
    return found


def _adaptable(groups: Iterable[ModuleGroup]) -> tuple[Block, ...]:
    blocks = ((group.layers, tuple(_linear(each) for each in group.modules if each.adaptable)) for group in groups)
    return tuple(Block(layers, linears, ()) for layers, linears in blocks if linears)


def _other(groups: Iterable[ModuleGroup], head: str) -> tuple[Block, ...]:
    blocks = []
    for group in groups:
        in_model = group.layers == _MODEL
        linears = tuple(
            _linear(each)
            for each in group.modules
            if each.inputs and not each.adaptable and not (in_model and each.name == head)
        )
        others = tuple(Module(each.name, each.outputs) for each in group.modules if not each.inputs and not in_model)
        blocks.append(Block(group.layers, linears, others))
    return tuple(block for block in blocks if block.linears or block.others)


def _experts(table: str) -> tuple[Block, ...]:
    groups = read_module_table(table) if table else ()
    return tuple(
        Block(
            group.layers,
            (),
            (),
            tuple(StackedExperts(each.name, 1, each.inputs, each.outputs) for each in group.modules),
        )
        for group in groups
    )


def _linear(module: SizedModule) -> Linear:
    return Linear(
        module.name,
        module.inputs,
        module.outputs,
        bias=module.bias,
        quantizable=module.quantizable and not module.shared,
        shared=module.shared,
    )
