"""Takes secrets out of text that leaves a process: logs, last words, and whatever is made of them.

What this process was given is known by its value. What it may meet without having been given it (a presigned URL in an
exception of a library) is known by its form.
"""

import json
import re
import threading
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import quote

MASK: Final = "[redacted]"
MIN_SECRET_LENGTH: Final = 8
"""Characters of a value that is looked for: a shorter one would be found in every other word."""

_CREDENTIAL_NAME: Final = (
    r"(?:aws_?)?(?:secret_?access_?key|access_?key_?id|session_?token)|hf_?token|hugging_?face_?hub_?token"
    r"|wandb_?api_?key|mlflow_tracking_(?:password|token)|passw(?:or)?d|client_?secret|api_?key|(?:access|bearer)_?token"
)
_SECRET_PATTERNS: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (
            r"(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic|aws4-hmac-sha256)\s+)?)[^\s\"',;<>]+",
            rf"\1{MASK}",
        ),
        (r"(\b(?:bearer|basic)\s+)[\w.~+/=-]{16,}", rf"\1{MASK}"),
        (r"(\bx-(?:amz-security|xet|hf)-[\w-]*token[\"']?\s*[:=]\s*[\"']?)[^\s\"',;&]+", rf"\1{MASK}"),
        (
            r"((?:[?&;]|\b)(?:x-amz-(?:signature|credential|security-token)|signature|credential|policy|key-pair-id"
            r"|awsaccesskeyid|sig|token|access_token|api_key)=)[^&\s\"'<>,;\\]+",
            rf"\1{MASK}",
        ),
        (rf"(\b(?:{_CREDENTIAL_NAME})(?:\s*=\s*|[\"']\s*:\s*)[\"']?)[^\s\"',}}&]+", rf"\1{MASK}"),
        (r"(\b[a-z][a-z0-9+.-]*://)[^\s/@:\"']*:[^\s/@\"']+@", rf"\1{MASK}@"),
        (r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+", MASK),
    )
) + tuple(
    (re.compile(pattern), MASK)
    for pattern in (r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}\b", r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")
)
"""Headers, query strings of presigned URLs, assignments, user information of URLs, tokens with a form of their own."""
_SECRET_FIELD: Final = re.compile(
    rf"(?:{_CREDENTIAL_NAME}|(?:.*[_-])?(?:authorization|password|secret|token))", re.IGNORECASE
)


class Redactor:
    """Masks what it has learnt, and what looks like a secret."""

    def __init__(self) -> None:
        self._values: set[str] = set()
        self._secret_pattern: re.Pattern[str] | None = None
        self._lock = threading.Lock()

    def add_secrets(self, values: Iterable[str]) -> None:
        """Look for these values from now on, and for how they are written in a URL, in JSON and by Python."""
        with self._lock:
            for value in values:
                if len(value) >= MIN_SECRET_LENGTH:
                    self._values |= {value, quote(value, safe=""), json.dumps(value)[1:-1], repr(value)[1:-1]}
            longest_first = sorted(self._values, key=len, reverse=True)
            self._secret_pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def redact_text(self, text: str) -> str:
        """Return the text without secrets."""
        if self._secret_pattern is not None:
            text = self._secret_pattern.sub(MASK, text)
        for form, replacement in _SECRET_PATTERNS:
            text = form.sub(replacement, text)
        return text

    def redact_value(self, value: Any, name: str = "") -> Any:
        """Return a value without secrets, however deep they are; one whose name says what it is goes as a whole."""
        if isinstance(value, str):
            return MASK if value and _SECRET_FIELD.fullmatch(name) else self.redact_text(value)
        if isinstance(value, Mapping):
            return {str(key): self.redact_value(item, str(key)) for key, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.redact_value(item, name) for item in value]
        return value if value is None or isinstance(value, (bool, int, float)) else self.redact_text(str(value))


REDACTOR: Final = Redactor()
"""This process's: what one part of it was given, no other part may tell."""
