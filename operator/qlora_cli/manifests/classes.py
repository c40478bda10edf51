"""Parses YAML documents as QLoRAClasses; each problem has its position, its field and the fix."""

import json
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails

from qlora_api import names
from qlora_api.escapes import shell_command
from qlora_api.qlora_class import QLoRAClassSpec
from qlora_api.v1alpha1.types import ClassName
from qlora_cli.manifests.loader import ManifestError, expect
from qlora_cli.manifests.validation_messages import Problem, describe_error, read_location, write_location
from qlora_cli.manifests.yaml_documents import Document
from qlora_operator.models import RawClass

_NOT_CREATED: Final = datetime.min.replace(tzinfo=UTC)
"""Age of a class that only a file has: of several default classes, the first by name counts."""


class ClassMetadata(BaseModel):
    """The fields of metadata that `qlora` reads."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: ClassName
    annotations: dict[str, str] = Field(default_factory=dict)


class ClassManifest(BaseModel):
    """A QLoRAClass manifest."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)

    api_version: Annotated[str, expect(names.API_VERSION)]
    kind: Annotated[str, expect(names.CLASS_KIND)]
    metadata: ClassMetadata
    spec: QLoRAClassSpec


def is_class(document: Document) -> bool:
    """Return whether a document is meant to be a QLoRAClass."""
    value = document.value
    return isinstance(value, dict) and str(value.get("kind", "")).lower() == names.CLASS_KIND.lower()


def parse_class(document: Document) -> ClassManifest:
    """Parse a document as a QLoRAClass.

    Raises:
        ManifestError: With every problem.

    """
    problems = [
        Problem(found.position, f"{path}: duplicate key, first at {found.first}; keep one of them", path)
        for found in document.duplicates
        if (path := write_location(found.location))
    ]
    manifest, details = _parse(document)
    problems += [_problem(document, detail) for detail in details]
    if manifest is None or problems:
        raise ManifestError(sorted(problems, key=lambda problem: document.index_of(read_location(problem.field))))
    return manifest


def _parse(document: Document) -> tuple[ClassManifest | None, list[ErrorDetails]]:
    """Return the manifest, or what pydantic finds."""
    try:
        text = json.dumps(document.value)
        return ClassManifest.model_validate_json(text, strict=True, by_alias=True, by_name=False), []
    except ValidationError as error:
        return None, error.errors(include_url=False)
    except (TypeError, ValueError) as error:
        message = f"has a key or a value that JSON does not have ({error}); write text or a number, without a YAML tag"
        raise ManifestError([Problem(document.position_of(()), message)]) from error


def _problem(document: Document, detail: ErrorDetails) -> Problem:
    location = detail["loc"]
    path = write_location(location) or f"a {names.CLASS_KIND}"
    return Problem(document.position_of(location), f"{path}: {_describe(detail)}", path)


def _describe(detail: ErrorDetails) -> str:
    if detail["type"] != "extra_forbidden":
        return describe_error(detail, ClassManifest)
    parents = [part for part in detail["loc"][:-1] if isinstance(part, str)]
    explain = shell_command("kubectl", "explain", ".".join(["qloraclass", *parents]))
    return f"unknown field; remove it, the known ones are in {explain}"


def to_raw_class(manifest: ClassManifest, spec: Any) -> RawClass:
    """Return a class as the operator reads it; the labels of namespaces are not known here, so that all may match."""
    selects = manifest.spec.namespaces.selector is not None
    return RawClass(
        name=manifest.metadata.name,
        generation=0,
        created_at=_NOT_CREATED,
        is_default=manifest.metadata.annotations.get(names.DEFAULT_CLASS_ANNOTATION) == "true",
        spec={name: value for name, value in spec.items() if not (selects and name == "namespaces")},
    )
