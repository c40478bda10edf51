"""What `qlora validate` finds in a file: errors, notes, and the manifests that are valid."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from qlora_api.escapes import escape_line, shell_command
from qlora_api.names import CLASS_KIND
from qlora_cli.manifests.classes import is_class, parse_class
from qlora_cli.manifests.job_files import read_manifests
from qlora_cli.manifests.loader import ManifestError, parse_manifest
from qlora_cli.manifests.local_paths import is_missing, local_fields
from qlora_cli.manifests.validation_messages import read_location
from qlora_cli.manifests.yaml_documents import Document, YamlError, name_of
from qlora_planner.validation import CLUSTER_RULES, LOCAL_RULES


class Level(StrEnum):
    """How serious a finding is."""

    ERROR = "error"
    NOTE = "note"
    VALID = "valid"


@dataclass(frozen=True)
class Finding:
    """One line of `qlora validate`."""

    level: Level
    file: str
    line: int | None
    field: str
    """Path of the field; empty: the file, or the whole manifest."""
    message: str

    def __str__(self) -> str:
        position = self.file if self.line is None else f"{self.file}:{self.line}"
        return escape_line(f"{position}: {self.message}")


def find_in_file(file: str) -> Iterator[Finding]:
    """Yield what a file's QLoRAJobs and QLoRAClasses have, in its order; a file without any is an error."""
    try:
        manifests = read_manifests(file)
    except YamlError as error:
        position, message = _split_position(str(error), file)
        yield _finding(Level.ERROR, position, "", message)
        return
    for manifest in manifests:
        yield from _find_in_class(manifest) if is_class(manifest) else _find_in_job(file, manifest)


def _find_in_class(document: Document) -> Iterator[Finding]:
    try:
        manifest = parse_class(document)
    except ManifestError as error:
        yield from _errors(error)
        return
    yield _finding(Level.VALID, document.position_of(()), "", f"{CLASS_KIND} {manifest.metadata.name} is valid")


def _errors(error: ManifestError) -> Iterator[Finding]:
    return (_finding(Level.ERROR, found.position, found.field, found.message) for found in error.problems)


def _find_in_job(file: str, job: Document) -> Iterator[Finding]:
    local = local_fields(job.value)
    try:
        manifest = parse_manifest(job, LOCAL_RULES if local else CLUSTER_RULES)
    except ManifestError as error:
        yield from _errors(error)
        return
    where = " for qlora run" if local else ""
    yield _finding(Level.VALID, job.position_of(()), "", f"QLoRAJob {manifest.metadata.name} is valid{where}")
    for field, path in local.items():
        yield _finding(Level.NOTE, _position_of(job, field), field, _describe_local(field, path, file))


def _describe_local(field: str, path: str, file: str) -> str:
    command = shell_command("qlora", "run", file)
    if not field.startswith("spec.output") and is_missing(path):
        return f"{field}: nothing is at {path} on this machine; correct the path before {command}"
    return f"{field}: {path} is on this machine; only {command} can use it, a cluster needs s3://"


def _position_of(job: Document, field: str) -> str:
    return job.position_of(read_location(field))


def _split_position(text: str, file: str) -> tuple[str, str]:
    """Split the message of a YamlError into position and cause."""
    name = re.escape(escape_line(name_of(file)))
    found = re.fullmatch(rf"({name}(?::[0-9]+)?): (.*)", text, re.DOTALL)
    return (found[1], found[2]) if found else (escape_line(name_of(file)), text)


def _finding(level: Level, position: str, field: str, message: str) -> Finding:
    found = re.fullmatch(r"(.*):([0-9]+)", position, re.DOTALL)
    file, line = (found[1], int(found[2])) if found else (position, None)
    return Finding(level, file, line, field, message)


def to_json(finding: Finding) -> dict[str, Any]:
    """Return a finding as a JSON object."""
    return {
        "level": finding.level.value,
        "file": finding.file,
        "line": finding.line,
        "field": finding.field or None,
        "message": finding.message,
    }
