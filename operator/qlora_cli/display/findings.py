"""Formats findings for programs: JSON, workflow commands of GitHub Actions, SARIF."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from qlora_api import __version__
from qlora_api.escapes import escape_json
from qlora_cli.manifests.findings import Finding, Level, to_json

_SARIF_SCHEMA: Final = "https://json.schemastore.org/sarif-2.1.0.json"
_COMMANDS: Final[Mapping[Level, str]] = {Level.ERROR: "error", Level.NOTE: "notice"}


def format_json(findings: Iterable[Finding]) -> str:
    """Return a JSON list, one object per finding."""
    return escape_json(json.dumps([to_json(finding) for finding in findings], indent=2, ensure_ascii=False)) + "\n"


def format_github(findings: Iterable[Finding]) -> str:
    """Return workflow commands, which GitHub shows at the lines of a pull request; valid manifests are left out."""
    return "".join(_to_command(finding) for finding in findings if finding.level in _COMMANDS)


def _to_command(finding: Finding) -> str:
    properties = {"file": finding.file, "line": finding.line, "title": finding.field or None}
    written = ",".join(f"{name}={_escape_property(str(value))}" for name, value in properties.items() if value)
    return f"::{_COMMANDS[finding.level]} {written}::{_escape_data(finding.message)}\n"


def _escape_data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(text: str) -> str:
    return _escape_data(text).replace(":", "%3A").replace(",", "%2C")


def format_sarif(findings: Iterable[Finding]) -> str:
    """Return a SARIF 2.1.0 log; valid manifests are left out."""
    results = [_to_result(finding) for finding in findings if finding.level in _COMMANDS]
    driver = {"name": "qlora", "version": __version__, "rules": [{"id": "manifest"}]}
    log = {"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
    return escape_json(json.dumps(log, indent=2, ensure_ascii=False)) + "\n"


def _to_result(finding: Finding) -> dict[str, Any]:
    region = {} if finding.line is None else {"region": {"startLine": finding.line}}
    location = {"physicalLocation": {"artifactLocation": {"uri": finding.file}, **region}}
    return {
        "ruleId": "manifest",
        "level": finding.level.value,
        "message": {"text": finding.message},
        "locations": [location],
    }


def format_text(findings: Iterable[Finding]) -> str:
    """Return one line per finding."""
    return "".join(f"{finding}\n" for finding in findings)


FORMATS: Final[Mapping[str, Callable[[Iterable[Finding]], str]]] = {
    "text": format_text,
    "json": format_json,
    "github": format_github,
    "sarif": format_sarif,
}
