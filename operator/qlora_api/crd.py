"""Turns the pydantic models into a CustomResourceDefinition with a structural schema.

Kubernetes accepts a subset of JSON Schema: no references, no unions, no const, no null types. What is dropped here is
either restated (exclusive bounds, integer formats) or has no meaning for an API server (titles, examples).
"""

from collections.abc import Iterable
from typing import Any, Final

from qlora_api import names
from qlora_api.qlora_class import QLoRAClassSpec
from qlora_api.v1alpha1 import QLoRAJobSpec, QLoRAJobStatus
from qlora_api.v1alpha1.patterns import VALIDATIONS

Schema = dict[str, Any]

_STRUCTURAL_KEYS: Final = (
    "description", "type", "format", "enum", "pattern", "minLength", "maxLength", "minimum", "maximum", "minItems",
    "maxItems", "maxProperties", "x-kubernetes-validations",
)  # fmt: skip
_LIST_KEYS: Final = {"conditions": "type", "attempts": "number"}
"""Lists of the status, with the key of their entries (x-kubernetes-list-map-keys)."""
MAX_INT32: Final = 2_147_483_647

PRINTER_COLUMNS: Final = (
    ("Phase", "string", ".status.phase", 0),
    ("Progress", "string", ".status.progress", 0),
    ("ETA", "string", ".status.eta", 0),
    ("Loss", "string", ".status.loss", 0),
    ("GPUs", "integer", ".status.gpus", 0),
    ("Reason", "string", ".status.reason", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Model", "string", ".spec.model.uri", 1),
    ("Step", "string", ".status.step", 1),
    ("Tok/s", "string", ".status.tokensPerSecond", 1),
    ("Attempt", "integer", ".status.attempt", 1),
    ("GPU-hours", "string", ".status.usage.gpuHours", 1),
    ("Adapter", "string", ".status.output.adapter", 1),
    ("Message", "string", ".status.summary", 1),
)
"""Printer columns: name, type, JSON path, priority (1: with -o wide only)."""
CLASS_PRINTER_COLUMNS: Final = (
    ("Default", "string", r".metadata.annotations.qlora\.dev/is-default-class", 0),
    ("Queue", "string", ".spec.queue.name", 0),
    ("RuntimeClass", "string", ".spec.pods.train.runtimeClassName", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Namespaces", "string", ".spec.namespaces.names", 1),
)
"""The same of a QLoRAClass."""


def _resolve(schema: Schema, definitions: Schema) -> Schema:
    """Replace a reference by its target, and a union with null by its other member."""
    if "anyOf" in schema:
        (member,) = [member for member in schema["anyOf"] if member.get("type") != "null"]
        return {**_resolve(member, definitions), **{key: value for key, value in schema.items() if key != "anyOf"}}
    if "$ref" in schema:
        target = definitions[schema["$ref"].rsplit("/", 1)[1]]
        return {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def _bounds(schema: Schema) -> Schema:
    """Restate exclusive bounds in the boolean form of OpenAPI v3.0, and add the format of integers."""
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
    """Keep a default with all its fields: CEL validates an object's default before its fields' defaults are set."""
    default = _without_none(schema.get("default"))
    return {} if default is None else {"default": default}


def _values_of(schema: Schema) -> Schema | bool:
    """Return the schema of the values of a mapping, of which the keys have a pattern; True if they can be anything."""
    patterns = schema.get("patternProperties", {}).values()
    found: Schema | bool = next((values for values in patterns if values), schema.get("additionalProperties", False))
    return found


def to_structural(schema: Schema, definitions: Schema) -> Schema:
    """Return a JSON schema as a structural schema.

    Args:
        schema: A schema as pydantic generates it.
        definitions: Its `$defs`, by which references are resolved.

    """
    schema = _resolve(schema, definitions)
    result = {key: schema[key] for key in _STRUCTURAL_KEYS if key in schema} | _bounds(schema) | _default(schema)
    if "items" in schema:
        result["items"] = to_structural(schema["items"], definitions)
    values = _values_of(schema)
    if isinstance(values, dict):
        result["additionalProperties"] = to_structural(values, definitions)
    elif values:
        result["x-kubernetes-preserve-unknown-fields"] = True
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
    """Drop defaults: the operator always writes the complete status, and a class has only what somebody wrote.

    CEL rules of a block read its words, such as the operator of a toleration, so that these keep theirs.
    """
    bare = {key: value for key, value in schema.items() if key != "default"}
    kept = {
        name: {"default": field["default"]}
        for name, field in schema.get("properties", {}).items()
        if VALIDATIONS in schema and "enum" in field and "default" in field
    }
    if "items" in bare:
        bare["items"] = _without_defaults(bare["items"])
    if isinstance(bare.get("additionalProperties"), dict):
        bare["additionalProperties"] = _without_defaults(bare["additionalProperties"])
    if "properties" in bare:
        bare["properties"] = {
            name: _without_defaults(field) | kept.get(name, {}) for name, field in bare["properties"].items()
        }
    return bare


def spec_schema() -> Schema:
    """Return the structural schema of spec."""
    schema = QLoRAJobSpec.model_json_schema(by_alias=True)
    return to_structural(schema, schema.get("$defs", {}))


def status_schema() -> Schema:
    """Return the structural schema of status.

    Until the operator's first write, kstatus reads the default observedGeneration -1 as in progress. The map type is
    atomic because the operator always writes the complete status: otherwise managedFields would list each field, a
    quarter of the size of a finished QLoRAJob.
    """
    schema = QLoRAJobStatus.model_json_schema(by_alias=True)
    structural = _with_list_keys(_without_defaults(to_structural(schema, schema.get("$defs", {}))))
    return structural | {"x-kubernetes-map-type": "atomic", "default": {"observedGeneration": -1}}


def root_schema() -> Schema:
    """Return the structural schema of the QLoRAJob object."""
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
                "message": f"metadata.name may have {names.MAX_JOB_NAME} characters: names of its pods add a suffix",
            },
            {
                "rule": "!self.metadata.name.contains('.')",
                "message": "metadata.name must not contain a dot: it becomes a label and a host name; use hyphens",
            },
        ],
    }


def _printer_columns(columns: Iterable[tuple[str, str, str, int]]) -> list[Schema]:
    return [
        {"name": name, "type": kind, "jsonPath": path} | ({"priority": priority} if priority else {})
        for name, kind, path, priority in columns
    ]


def class_spec_schema() -> Schema:
    """Return the structural schema of the spec of a QLoRAClass."""
    schema = QLoRAClassSpec.model_json_schema(by_alias=True)
    return _without_defaults(to_structural(schema, schema["$defs"]))


def class_root_schema() -> Schema:
    """Return the structural schema of the QLoRAClass object."""
    return {
        "type": "object",
        "description": "What an installation keeps for the runs of a team: settings of their pods, a queue, a ttl.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"Always {names.API_VERSION}."},
            "kind": {"type": "string", "description": f"Always {names.CLASS_KIND}."},
            "metadata": {"type": "object"},
            "spec": class_spec_schema(),
        },
        "x-kubernetes-validations": [
            {
                "rule": "size(self.metadata.name) <= 63",
                "message": "metadata.name may have 63 characters: it becomes the value of a label",
            },
        ],
    }


def build_crd() -> Schema:
    """Return the CustomResourceDefinition of QLoRAJobs."""
    version = {
        "subresources": {"status": {}},
        "additionalPrinterColumns": _printer_columns(PRINTER_COLUMNS),
        "schema": {"openAPIV3Schema": root_schema()},
    }
    names_of_kind = _names(names.KIND, names.PLURAL, ["qlj", "qlora"]) | {"categories": ["all"]}
    return _build("Namespaced", names_of_kind, version)


def build_class_crd() -> Schema:
    """Return the CustomResourceDefinition of QLoRAClasses."""
    version = {
        "additionalPrinterColumns": _printer_columns(CLASS_PRINTER_COLUMNS),
        "schema": {"openAPIV3Schema": class_root_schema()},
    }
    return _build("Cluster", _names(names.CLASS_KIND, names.CLASS_PLURAL, ["qlc"]), version)


def _names(kind: str, plural: str, short_names: list[str]) -> Schema:
    return {
        "kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower(), "shortNames": short_names,
    }  # fmt: skip


def _build(scope: str, names_of_kind: Schema, version: Schema) -> Schema:
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names_of_kind['plural']}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "scope": scope,
            "names": names_of_kind,
            "versions": [{"name": names.VERSION, "served": True, "storage": True, **version}],
        },
    }
