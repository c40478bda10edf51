"""The modules of a model with their sizes, as a short text: written by prepare, read by the plan.

`model.layers.0-27:self_attn.q_proj=3072x3072qa,mlp.gate_proj|mlp.up_proj=8192x3072qa,input_layernorm=3072;:lm_head=…`:
groups of modules that the same layers have, each with the weights of its matrix (outputs x inputs) or their number.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby, product
from math import prod
from typing import Final

MAX_MODULES: Final = 20_000
"""Modules with weights of one model; the largest of transformers, which stacks experts, have 2,000."""

_BIAS: Final = "b"
_QUANTIZABLE: Final = "q"
_ADAPTABLE: Final = "a"
_SHARED: Final = "t"
_NAMES: Final = r"[\w.|]*"
_NAME: Final = r"[A-Za-z_]\w*"
# No text matches both kinds of parts: else a regular expression tries each combination of them.
_PART: Final = rf"(?:\d[\d+-]*|{_NAME})"
_STEP: Final = rf"(?:0|[1-9]\d{{0,5}}|{_NAME})"
_PATH: Final = re.compile(rf"{_STEP}(?:\.{_STEP})*", re.ASCII)
_GROUP: Final = re.compile(rf"((?:{_PART}(?:\.{_PART})*)?):(.+)", re.ASCII)
_ENTRY: Final = re.compile(rf"({_NAMES})=(\d{{1,14}})(?:x(\d{{1,14}}))?([bqat]*)", re.ASCII)
_RANGE: Final = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)


class ModuleTableError(ValueError):
    """A text is not a module table of this version, or the model cannot be written as one; the message says why."""


@dataclass(frozen=True, order=True)
class SizedModule:
    """A module with weights of its own."""

    name: str
    """Path in the model, or below its layer."""
    outputs: int
    """Rows of a matrix, or the number of weights of any other module."""
    inputs: int = 0
    """Columns of a matrix; 0 for any other module."""
    bias: bool = False
    """A matrix has a bias besides."""
    quantizable: bool = False
    """bitsandbytes stores the matrix in 4 or 8 bits."""
    adaptable: bool = False
    """LoRA can adapt the matrix."""
    shared: bool = False
    """The matrix is that of another module, such as a tied output layer."""


@dataclass(frozen=True)
class ModuleGroup:
    """Modules that each of several layers has."""

    layers: tuple[str, ...]
    """Paths of the layers; the empty path is the model itself."""
    modules: tuple[SizedModule, ...]


def join_path(layer: str, name: str) -> str:
    """Return the path of a module; either part can be empty."""
    return ".".join(filter(None, (layer, name)))


def write_module_table(modules: Iterable[SizedModule]) -> str:
    """Return modules, given by their full paths, as text.

    Raises:
        ModuleTableError: A name has characters that the text uses itself.

    """
    return ";".join(
        f"{prefix}:{','.join(_write_entries(entries))}" for prefix, entries in sorted(_group(modules).items())
    )


def read_module_table(text: str) -> tuple[ModuleGroup, ...]:
    """Return the groups of modules that a text describes.

    Raises:
        ModuleTableError: It is not a module table, or describes more than any model has.

    """
    groups = tuple(_read_group(group) for group in text.split(";"))
    if sum(len(group.layers) * len(group.modules) for group in groups) > MAX_MODULES:
        raise ModuleTableError(f"it has more than {MAX_MODULES:,} modules")
    return groups


def _group(modules: Iterable[SizedModule]) -> Mapping[str, list[SizedModule]]:
    """Return the modules by the layers that have them; a layer's path ends with the last number in a module's path."""
    numbers: dict[tuple[tuple[str, ...], SizedModule], list[tuple[int, ...]]] = {}
    for module in modules:
        if not _PATH.fullmatch(module.name):
            raise ModuleTableError(f"it has a module named {module.name!r}")
        parts = module.name.split(".")
        end = max((index + 1 for index, part in enumerate(parts) if part.isdigit()), default=0)
        layer = tuple("" if part.isdigit() else part for part in parts[:end])
        relative = replace(module, name=".".join(parts[end:]))
        numbers.setdefault((layer, relative), []).append(tuple(int(part) for part in parts[:end] if part.isdigit()))
    groups: dict[str, list[SizedModule]] = {}
    for (layer, relative), found in numbers.items():
        for ranges in _as_products(found):
            remaining = iter(ranges)
            prefix = ".".join(part or _write_range(next(remaining)) for part in layer)
            groups.setdefault(prefix, []).append(relative)
    return groups


def _as_products(found: list[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yield products of sets of numbers that have exactly the given tuples, which are all of one length."""
    if not found[0]:
        yield ()
        return
    rests: dict[int, list[tuple[int, ...]]] = {}
    for numbers in sorted(found):
        rests.setdefault(numbers[0], []).append(numbers[1:])
    firsts: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first, rest in rests.items():
        firsts.setdefault(tuple(rest), []).append(first)
    for common, alike in firsts.items():
        yield from ((tuple(alike), *others) for others in _as_products(list(common)))


def _write_range(numbers: tuple[int, ...]) -> str:
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return "+".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _write_entries(modules: Iterable[SizedModule]) -> Iterator[str]:
    names: dict[SizedModule, list[str]] = {}
    for module in modules:
        names.setdefault(replace(module, name=""), []).append(module.name)
    for size, alike in names.items():
        flags = {_BIAS: size.bias, _QUANTIZABLE: size.quantizable, _ADAPTABLE: size.adaptable, _SHARED: size.shared}
        matrix = f"x{size.inputs}" if size.inputs else ""
        yield f"{'|'.join(alike)}={size.outputs}{matrix}{''.join(flag for flag, is_set in flags.items() if is_set)}"


def _read_group(text: str) -> ModuleGroup:
    found = _GROUP.fullmatch(text)
    if found is None:
        raise ModuleTableError(f"it has a group {text[:40]!r}")
    return ModuleGroup(_read_layers(found[1]), tuple(_read_entries(found[2])))


def _read_layers(prefix: str) -> tuple[str, ...]:
    parts = [_read_range(part) if part[:1].isdigit() else (part,) for part in prefix.split(".")]
    if prod(map(len, parts)) > MAX_MODULES:
        raise ModuleTableError(f"it has more than {MAX_MODULES:,} layers")
    return tuple(".".join(path) for path in product(*parts))


def _read_range(text: str) -> tuple[str, ...]:
    runs = [_RANGE.fullmatch(run) for run in text.split("+")]
    numbers = [range(int(run[1]), int(run[2] or run[1]) + 1) for run in runs if run is not None]
    if None in runs or sum(map(len, numbers)) > MAX_MODULES:
        raise ModuleTableError(f"it has layers {text[:40]!r}")
    return tuple(str(number) for run in numbers for number in run)


def _read_entries(text: str) -> Iterator[SizedModule]:
    for entry in text.split(","):
        found = _ENTRY.fullmatch(entry)
        if found is None:
            raise ModuleTableError(f"it has a module {entry[:40]!r}")
        names, outputs, inputs, flags = found.groups()
        is_set = [flag in flags for flag in (_BIAS, _QUANTIZABLE, _ADAPTABLE, _SHARED)]
        yield from (SizedModule(name, int(outputs), int(inputs or 0), *is_set) for name in names.split("|"))
