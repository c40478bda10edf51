"""Says in plain words why a text is not YAML; PyYAML's own words are about tokens."""

import re
from typing import Final

_EXPRESSION: Final = re.compile(r"\{\{-?\s*[^\s}]")
_NO_SPACE: Final = re.compile(r"^\s*(- )?([A-Za-z_][\w.-]*):[^\s:/]")
RENDER_FIRST: Final = (
    "has template expressions, {{ … }}; render it first, such as with helm template, and give the output"
)


def explain_yaml_error(text: str, line: int | None, problem: str) -> tuple[int | None, str]:
    """Return the index of the wrong line, and cause and fix of a YAML error.

    Args:
        text: The whole text.
        line: Index of the line with the error; None: unknown.
        problem: What PyYAML says.

    """
    lines = text.splitlines()
    at = lines[line] if line is not None and line < len(lines) else ""
    before = lines[line - 1] if line and line <= len(lines) else ""
    if has_template(f"{before}\n{at}" if "chatTemplate:" in text else text):
        return line, RENDER_FIRST
    for index, candidate in ((line, at), (line - 1 if line else line, before)):
        if "\t" in candidate[: len(candidate) - len(candidate.lstrip())]:
            return index, "a tab indents this line; replace it by spaces, the only indentation in YAML"
        if missing := _NO_SPACE.match(candidate):
            return index, f"'{missing[2]}:' has no space after its colon; write '{missing[2]}: …'"
    return line, _explain_problem(problem)


def has_template(text: str) -> bool:
    """Return whether a text has {{ … }} or {% … %}; a regular expression for both ends takes quadratic time."""
    statement = text.find("{%")
    return bool(_EXPRESSION.search(text, 0, max(text.rfind("}}"), 0))) or 0 <= statement < text.rfind("%}") - 1


def _explain_problem(problem: str) -> str:
    if "mapping values are not allowed" in problem:
        return "a second ':' in one line; put the field on a line of its own, or quote the value"
    if "cannot start any token" in problem or "undefined alias" in problem or "but found '%'" in problem:
        return f"{problem}; quote the value"
    if "expected <block end>" in problem:
        return f"{problem}; indent this line like the fields around it"
    return problem
