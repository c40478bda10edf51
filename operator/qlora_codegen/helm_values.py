"""Generates the chart's values schema, and the table in its README, from the comments in values.yaml.

`# -- ` starts the description of the value below it, as in helm-docs; `# @schema {…}` adds JSON Schema to the type of
its default. A mapping in block style is a group of values, one in flow style is a value.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from qlora_api.base import ApiModel
from qlora_api.pod_profile import PodProfile

_COMMENT: Final = re.compile(r"^ *# ?(?P<text>.*)$")
_KEY: Final = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z]\w*):(?P<rest>.*)$")
_DESCRIPTION: Final = "-- "
_SCHEMA: Final = "@schema "
_MODELS: Final[Mapping[str, type[ApiModel]]] = {"pods": PodProfile}
"""Groups of values whose types are those of a model."""
_KEPT: Final = (
    "type", "enum", "pattern", "not", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems",
    "required", "patternProperties",
)  # fmt: skip
_TYPES: Final = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}


class ValuesError(Exception):
    """A comment in values.yaml is missing or incomplete."""


@dataclass(frozen=True)
class Value:
    """One key of values.yaml that a user may set."""

    path: tuple[str, ...]
    default: Any
    description: str
    schema: Mapping[str, Any]


@dataclass
class _Comments:
    """The comments above a key."""

    description: list[str] = field(default_factory=list)
    schema: dict[str, Any] = field(default_factory=dict)

    def add(self, text: str) -> None:
        if text.startswith(_SCHEMA):
            self.schema |= yaml.safe_load(text.removeprefix(_SCHEMA))
        elif text.startswith(_DESCRIPTION):
            self.description = [text.removeprefix(_DESCRIPTION)]
        elif self.description:
            self.description.append(text)


def read_values(text: str) -> Iterator[Value]:
    """Yield every value in the order of the file; ValuesError if one has no description."""
    defaults = yaml.safe_load(text)
    comments, path = _Comments(), [""] * 0
    for line in text.splitlines():
        if comment := _COMMENT.match(line):
            comments.add(comment["text"])
            continue
        if key := _KEY.match(line):
            path = [*path[: len(key["indent"]) // 2], key["key"]]
            default = _look_up(defaults, path)
            if key["rest"].strip() or not isinstance(default, dict):
                yield _make_value(tuple(path), default, comments)
        comments = _Comments()


def _look_up(defaults: Any, path: list[str]) -> Any:
    for key in path:
        defaults = defaults[key]
    return defaults


def _make_value(path: tuple[str, ...], default: Any, comments: _Comments) -> Value:
    if not comments.description:
        raise ValuesError(f"{'.'.join(path)} has no description: write `# -- …` above it")
    return Value(path, default, " ".join(comments.description), comments.schema)


def build_values_schema(values: Iterator[Value]) -> dict[str, Any]:
    """Return a schema that rejects unknown values; `global` is reserved by Helm."""
    root = _group()
    for value in values:
        group = root
        for key in value.path[:-1]:
            group = group["properties"].setdefault(key, _group())
        group["properties"][value.path[-1]] = _leaf(value)
    root["properties"]["global"] = {"type": "object"}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of qlora-operator", **root}


def _group() -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": {}}


def _leaf(value: Value) -> dict[str, Any]:
    inferred = {"type": _TYPES[type(value.default)]} if value.default is not None else {}
    modeled = _schema_of_model(value.path) if value.path[0] in _MODELS else {}
    leaf = {"description": value.description, "default": value.default, **inferred, **modeled, **value.schema}
    if "type" not in leaf:
        raise ValuesError(f"{'.'.join(value.path)} has no default: write its type into `# @schema {{…}}`")
    return leaf


def _schema_of_model(path: tuple[str, ...]) -> dict[str, Any]:
    """Return the schema of a value whose type a model has, without references; ValuesError if the model lacks it."""
    root = _MODELS[path[0]].model_json_schema(by_alias=True)
    schema = _resolve(root, root["$defs"])
    for key in path[1:]:
        if key not in schema["properties"]:
            raise ValuesError(f"{'.'.join(path)} is no field of {_MODELS[path[0]].__name__}")
        schema = schema["properties"][key]
    return schema


def _resolve(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Replace references by their targets; keep what restricts a value, and that null leaves a default out."""
    for member in schema.get("anyOf", ()):
        if member.get("type") != "null":
            resolved = _resolve(member, definitions)
            choices = {"enum": [*resolved["enum"], None]} if "enum" in resolved else {}
            return resolved | {"type": [resolved["type"], "null"]} | choices
    if "$ref" in schema:
        return _resolve(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    result = {key: schema[key] for key in _KEPT if key in schema}
    if "items" in schema:
        result["items"] = _resolve(schema["items"], definitions)
    if "properties" in schema:
        result["properties"] = {name: _resolve(field, definitions) for name, field in schema["properties"].items()}
    if "additionalProperties" in schema:
        result["additionalProperties"] = schema["additionalProperties"]
    return result


def render_values_table(values: Iterator[Value]) -> Iterator[str]:
    """Yield the lines of a table as helm-docs renders it."""
    yield "| Key | Type | Default | Description |"
    yield "|-----|------|---------|-------------|"
    for value in values:
        leaf = _leaf(value)
        default = json.dumps(value.default, ensure_ascii=False)
        choices = f" One of {', '.join(f'`{choice}`' for choice in leaf['enum'])}." if "enum" in leaf else ""
        cells = (".".join(value.path), _kind_of(leaf), f"`{default}`", value.description + choices)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _kind_of(leaf: Mapping[str, Any]) -> str:
    """Return the name of a type in helm-docs."""
    names = {"boolean": "bool", "integer": "int", "array": "list"}
    kinds = [leaf["type"]] if isinstance(leaf["type"], str) else leaf["type"]
    return " or ".join(names.get(kind, kind) for kind in kinds)
