"""Reads the value `pods` from values of the chart, as Helm merges them with the chart's own."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from qlora_api.pod_profile import DEFAULT_PROFILE, PodProfile
from qlora_cli.manifests.yaml_documents import YamlError, name_of, read_documents


def read_pods(file: str) -> PodProfile:
    """Return what an installation with such values sets in the pods of runs.

    Raises:
        YamlError: The file cannot be read, or a field is wrong.

    """
    values = [document.value for document in read_documents(file)]
    pods = values[0].get("pods") if values and isinstance(values[0], Mapping) else None
    default = DEFAULT_PROFILE.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
    try:
        return PodProfile.model_validate_json(json.dumps(_merge(default, pods or {})), by_alias=True, by_name=False)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(("pods", *map(str, first["loc"])))
        cause = first["msg"].removeprefix("Value error, ")
        raise YamlError(f"{name_of(file)}: {field}: {cause}; correct it") from error


def _merge(default: Any, value: Any) -> Any:
    """Merge mappings; null removes a default, other values replace it."""
    if not (isinstance(default, Mapping) and isinstance(value, Mapping)):
        return value
    merged = {name: _merge(default.get(name), value.get(name, default.get(name))) for name in {**default, **value}}
    return {name: part for name, part in merged.items() if part is not None}
