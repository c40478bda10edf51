"""Parses YAML documents as QLoRAJobs; each problem has its position, its field and the fix."""

import json
from collections.abc import Iterable
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails

from qlora_api import names
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_cli.manifests.validation_messages import Problem, describe_error, read_location, write_location
from qlora_cli.manifests.yaml_documents import Document
from qlora_planner.validation import Rule, check


def _expect(expected: str) -> AfterValidator:
    def compare(text: str) -> str:
        if text != expected:
            raise ValueError(f"must be {expected}")
        return text

    return AfterValidator(compare)


class Metadata(BaseModel):
    """The fields of metadata that `qlora` reads."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Annotated[
        str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=names.MAX_JOB_NAME, examples=["support-bot"])
    ]
    namespace: str = "default"


class JobManifest(BaseModel):
    """A QLoRAJob manifest; its status is ignored."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)

    api_version: Annotated[str, _expect(names.API_VERSION)]
    kind: Annotated[str, _expect(names.KIND)]
    metadata: Metadata
    spec: QLoRAJobSpec
    status: Any = None


class ManifestError(Exception):
    """The user must change the manifest; the message lists every problem."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: Final = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def is_qlorajob(document: Document) -> bool:
    """Return whether a document is meant to be a QLoRAJob; a file may have other kinds as well."""
    if not isinstance(document.value, dict):
        return True
    group = str(document.value.get("apiVersion", "")).split("/")[0]
    return group == names.GROUP or str(document.value.get("kind", "")).lower() == names.KIND.lower()


def parse_manifest(document: Document, rules: tuple[Rule, ...]) -> JobManifest:
    """Parse a document as a QLoRAJob and check the rules.

    Raises:
        ManifestError: With every problem of the schema or, if there is none, of the rules.

    """
    try:
        # Strict, and from JSON, to reject what the API server rejects: "8" for 8, snake_case.
        manifest = JobManifest.model_validate_json(_to_json(document), strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        details = sorted(_own_errors(error), key=lambda detail: document.index_of(detail["loc"]))
        raise ManifestError(_problem(document, detail) for detail in details) from None
    if violations := check(manifest.spec, rules):
        raise ManifestError(
            Problem(_position_of_message(document, found.message), found.message) for found in violations
        )
    return manifest


def _own_errors(error: ValidationError) -> list[ErrorDetails]:
    """Return the errors, without lists that pydantic calls too short as it counts their valid entries only."""
    details = error.errors(include_url=False)
    parents = {detail["loc"][:-1] for detail in details}
    return [detail for detail in details if detail["type"] != "too_short" or detail["loc"] not in parents]


def _to_json(document: Document) -> str:
    try:
        return json.dumps(document.value)
    except (TypeError, ValueError) as error:
        message = f"has a key or a value that JSON does not have ({error}); write text or a number, without a YAML tag"
        raise ManifestError([Problem(document.position_of(()), message)]) from error


def _problem(document: Document, detail: ErrorDetails) -> Problem:
    location = detail["loc"]
    path = write_location(location) or "a QLoRAJob"
    return Problem(document.position_of(location), f"{path}: {describe_error(detail, JobManifest)}")


def _position_of_message(document: Document, message: str) -> str:
    """Return the position of the field whose path is the first word of a rule's message."""
    return document.position_of(read_location(message.split(maxsplit=1)[0]))
