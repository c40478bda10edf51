"""Turns the pydantic models into a CustomResourceDefinition with a structural schema.

Kubernetes accepts less than JSON Schema: no references, no unions, no const, no null arms. What is dropped here is
either restated (exclusive bounds, integer formats) or has no meaning for an API server (titles, examples).
"""

from collections.abc import Iterable
from typing import Any, Final

from qlora_api import names
from qlora_api.v1alpha1 import QLoRAJobSpec, QLoRAJobStatus

Schema = dict[str, Any]

_STRUCTURAL_KEYS: Final = (
    "description", "type", "format", "enum", "pattern", "minLength", "maxLength", "minimum", "maximum", "minItems",
    "maxItems", "maxProperties", "x-kubernetes-validations",
)  # fmt: skip
_LIST_KEYS: Final = {"conditions": "type", "attempts": "number"}
"""Lists of the status, with the field that tells their entries apart."""
MAX_INT32: Final = 2_147_483_647

PRINTER_COLUMNS: Final = (
    ("Phase", "string", ".status.phase", 0),
    ("Progress", "string", ".status.progress", 0),
    ("ETA", "string", ".status.eta", 0),
    ("Loss", "string", ".status.loss", 0),
    ("GPUs", "integer", ".status.gpus", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Model", "string", ".spec.model.uri", 1),
    ("Step", "string", ".status.step", 1),
    ("Tok/s", "string", ".status.tokensPerSecond", 1),
    ("Attempt", "integer", ".status.attempt", 1),
    ("Adapter", "string", ".status.output.adapter", 1),
    ("Reason", "string", ".status.reason", 1),
)
"""Printer columns: name, type, JSON path, priority (1: with -o wide only)."""


def _resolve(schema: Schema, definitions: Schema) -> Schema:
    """Replace a reference by its target, and a union with null by its other arm."""
    if "anyOf" in schema:
        (arm,) = [arm for arm in schema["anyOf"] if arm.get("type") != "null"]
        return {**_resolve(arm, definitions), **{key: value for key, value in schema.items() if key != "anyOf"}}
    if "$ref" in schema:
        target = definitions[schema["$ref"].rsplit("/", 1)[1]]
        return {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def _bounds(schema: Schema) -> Schema:
    """Restate exclusive bounds in the boolean form of OpenAPI v3.0, and the width of integers."""
    bounds: Schema = {}
    for exclusive, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive in schema:
            bounds |= {inclusive: schema[exclusive], exclusive: True}
    if schema.get("type") == "integer" and "enum" not in schema:
        bounds["format"] = "int32" if schema.get("maximum", MAX_INT32 + 1) <= MAX_INT32 else "int64"
    return bounds


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _default(schema: Schema) -> Schema:
    """Keep a default, whole: CEL rules judge an object's default before its fields' defaults are filled in."""
    default = _without_none(schema.get("default"))
    return {} if default is None else {"default": default}


def to_structural(schema: Schema, definitions: Schema) -> Schema:
    """Return the structural form of one JSON schema."""
    schema = _resolve(schema, definitions)
    result = {key: schema[key] for key in _STRUCTURAL_KEYS if key in schema} | _bounds(schema) | _default(schema)
    if "items" in schema:
        result["items"] = to_structural(schema["items"], definitions)
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = to_structural(schema["additionalProperties"], definitions)
    if "properties" in schema:
        result["properties"] = {name: to_structural(field, definitions) for name, field in schema["properties"].items()}
        if schema.get("required"):
            result["required"] = schema["required"]
    return result


def _with_list_keys(status: Schema) -> Schema:
    for name, key in _LIST_KEYS.items():
        status["properties"][name] |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
    return status


def _without_defaults(schema: Schema) -> Schema:
    """Leave defaults to the writer: the operator writes the status whole."""
    bare = {key: value for key, value in schema.items() if key != "default"}
    if "items" in bare:
        bare["items"] = _without_defaults(bare["items"])
    if "properties" in bare:
        bare["properties"] = {name: _without_defaults(field) for name, field in bare["properties"].items()}
    return bare


def spec_schema() -> Schema:
    """Return the structural schema of spec."""
    schema = QLoRAJobSpec.model_json_schema(by_alias=True)
    return to_structural(schema, schema.get("$defs", {}))


def status_schema() -> Schema:
    """Return the structural schema of status.

    The default -1 is what kstatus reads as in progress before the operator's first write. The operator writes it all
    at once, so the API server need not note for every field who wrote it: a quarter of a finished QLoRAJob.
    """
    schema = QLoRAJobStatus.model_json_schema(by_alias=True)
    structural = _with_list_keys(_without_defaults(to_structural(schema, schema.get("$defs", {}))))
    return structural | {"x-kubernetes-map-type": "atomic", "default": {"observedGeneration": -1}}


def root_schema() -> Schema:
    """Return the structural schema of a whole QLoRAJob."""
    return {
        "type": "object",
        "description": "One QLoRA fine-tuning run: from a base model and a dataset to a verified adapter.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"Always {names.API_VERSION}."},
            "kind": {"type": "string", "description": f"Always {names.KIND}."},
            "metadata": {"type": "object"},
            "spec": spec_schema(),
            "status": status_schema(),
        },
        "x-kubernetes-validations": [
            {
                "rule": f"size(self.metadata.name) <= {names.MAX_JOB_NAME}",
                "message": f"metadata.name may have {names.MAX_JOB_NAME} characters: its pods need room for a suffix",
            },
            {
                "rule": "!self.metadata.name.contains('.')",
                "message": "metadata.name may not contain a dot: it becomes a label and a host name; use hyphens",
            },
        ],
    }


def _printer_columns(columns: Iterable[tuple[str, str, str, int]]) -> list[Schema]:
    return [
        {"name": name, "type": kind, "jsonPath": path} | ({"priority": priority} if priority else {})
        for name, kind, path, priority in columns
    ]


def build_crd() -> Schema:
    """Return the CustomResourceDefinition."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": names.KIND.lower(),
                "shortNames": ["qlj", "qlora"],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": names.VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": _printer_columns(PRINTER_COLUMNS),
                    "schema": {"openAPIV3Schema": root_schema()},
                }
            ],
        },
    }
