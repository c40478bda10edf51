"""Parses YAML documents as QLoRAJobs; each problem has its position, its field and the fix."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails

from qlora_api import names
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_cli.manifests.repair import check_repaired
from qlora_cli.manifests.validation_messages import Problem, describe_error, read_location, write_location
from qlora_cli.manifests.yaml_documents import Document, Duplicate, Location
from qlora_planner.validation import Rule, check

MAX_PROBLEMS: Final = 100
"""Problems of a kind that are explained; a file of another program may have tens of thousands."""
Found = TypeVar("Found")


def expect(expected: str) -> AfterValidator:
    """Return a validator that accepts one text only."""

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

    api_version: Annotated[str, expect(names.API_VERSION)]
    kind: Annotated[str, expect(names.KIND)]
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
        return not isinstance(document.value, list)
    group, kind = str(document.value.get("apiVersion", "")).split("/")[0], str(document.value.get("kind", "")).lower()
    return kind == names.KIND.lower() or (group == names.GROUP and kind != names.CLASS_KIND.lower())


def parse_manifest(document: Document, rules: tuple[Rule, ...]) -> JobManifest:
    """Parse a document as a QLoRAJob and check the rules.

    Raises:
        ManifestError: With every problem, in the order of the file: what the schema refuses, keys that a block has
            twice, and every rule whose fields are valid.

    """
    problems = _first(document.duplicates, lambda found: found.location, _duplicate, document)
    manifest, details = _parse(document)
    if manifest is not None:
        messages = [violation.message for violation in check(manifest.spec, rules)]
    else:
        problems += _first(details, lambda detail: detail["loc"], lambda detail: _problem(document, detail), document)
        messages = check_repaired(document.value, details, rules, _parse_value)
    problems += [_violation(document, message) for message in messages]
    if manifest is None or problems:
        raise ManifestError(sorted(problems, key=lambda problem: document.index_of(read_location(problem.field))))
    return manifest


def _own_errors(error: ValidationError) -> list[ErrorDetails]:
    """Return the errors, without lists that pydantic calls too short as it counts their valid entries only."""
    details = error.errors(include_url=False)
    parents = {detail["loc"][:-1] for detail in details}
    return [detail for detail in details if detail["type"] != "too_short" or detail["loc"] not in parents]


def _parse(document: Document) -> tuple[JobManifest | None, list[ErrorDetails]]:
    """Return the manifest, or what pydantic finds."""
    try:
        return _parse_value(document.value), []
    except ValidationError as error:
        return None, _own_errors(error)
    except (TypeError, ValueError) as error:
        message = f"has a key or a value that JSON does not have ({error}); write text or a number, without a YAML tag"
        raise ManifestError([Problem(document.position_of(()), message)]) from error


def _parse_value(value: Any) -> JobManifest:
    # Strict, and from JSON, to reject what the API server rejects: "8" for 8, snake_case.
    return JobManifest.model_validate_json(json.dumps(value), strict=True, by_alias=True, by_name=False)


def _first(
    found: Sequence[Found],
    location_of: Callable[[Found], Location],
    write: Callable[[Found], Problem],
    document: Document,
) -> list[Problem]:
    """Return the first problems in the order of the file, and how many more there are: to explain one takes a while."""
    ordered = sorted(found, key=lambda item: document.index_of(location_of(item)))
    problems: list[Problem] = [write(item) for item in ordered[:MAX_PROBLEMS]]
    if len(ordered) <= MAX_PROBLEMS:
        return problems
    path = write_location(location_of(ordered[MAX_PROBLEMS]))
    message = f"{path}: and {len(ordered) - MAX_PROBLEMS:,} more problems from here on; correct these first"
    return [*problems, Problem(document.position_of(location_of(ordered[MAX_PROBLEMS])), message, path)]


def _problem(document: Document, detail: ErrorDetails) -> Problem:
    location = detail["loc"]
    path = write_location(location) or "a QLoRAJob"
    return Problem(document.position_of(location), f"{path}: {describe_error(detail, JobManifest)}", path)


def _duplicate(found: Duplicate) -> Problem:
    path = write_location(found.location)
    return Problem(
        found.position, f"{path}: duplicate key '{found.location[-1]}', first at {found.first}; keep one of them", path
    )


def _violation(document: Document, message: str) -> Problem:
    """Return the problem of a rule's message, whose first word is the path of the field."""
    path = message.split(maxsplit=1)[0]
    return Problem(document.position_of(read_location(path)), message, path)
