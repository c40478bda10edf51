"""Redacts secrets from text that leaves a process: logs, termination messages, reports.

Secrets that were given to this process are found by their values. Others, such as a presigned URL in the exception of
a library, are found by patterns.
"""

import json
import re
import threading
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import quote

MASK: Final = "[redacted]"
MIN_SECRET_LENGTH: Final = 8
"""Minimum length of a value that is redacted: shorter ones would match ordinary text."""

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
        (r"(\bx-(?:amz-security|xet|hf)-[\w-]{0,64}token[\"']?\s*[:=]\s*[\"']?)[^\s\"',;&]+", rf"\1{MASK}"),
        (
            r"((?:[?&;]|\b)(?:x-amz-(?:signature|credential|security-token)|signature|credential|policy|key-pair-id"
            r"|awsaccesskeyid|sig|token|access_token|api_key)=)[^&\s\"'<>,;\\]+",
            rf"\1{MASK}",
        ),
        (rf"(\b(?:{_CREDENTIAL_NAME})(?:\s*=\s*|[\"']\s*:\s*)[\"']?)[^\s\"',}}&]+", rf"\1{MASK}"),
        (r"(\b[a-z][a-z0-9+.-]{0,31}://)[^\s/@:\"']*:[^\s/@\"']+@", rf"\1{MASK}@"),
        (r"(?<![\w-])(?=[\w-]*eyJ[\w-]{8})[\w-]++\.eyJ[\w-]{8,}+\.[\w-]+", MASK),
    )
) + tuple(
    (re.compile(pattern), MASK)
    for pattern in (r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}\b", r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")
)
"""Headers, query strings of presigned URLs, assignments, user information in URLs, tokens with a known format.

What may repeat before a fixed text has a bound: a search for it would take quadratic time in a long line otherwise.
"""
_SECRET_FIELD: Final = re.compile(
    rf"(?:{_CREDENTIAL_NAME}|(?:.*[_-])?(?:authorization|password|secret|token))", re.IGNORECASE
)


class Redactor:
    """Redacts the secrets it was given, and whatever looks like a secret."""

    def __init__(self) -> None:
        self._values: set[str] = set()
        self._secret_pattern: re.Pattern[str] | None = None
        self._lock = threading.Lock()

    def add_secrets(self, values: Iterable[str]) -> None:
        """Redact these values from now on, also as quoted in a URL, in JSON and by Python's repr()."""
        with self._lock:
            for value in values:
                if len(value) >= MIN_SECRET_LENGTH:
                    self._values |= {value, quote(value, safe=""), json.dumps(value)[1:-1], repr(value)[1:-1]}
            longest_first = sorted(self._values, key=len, reverse=True)
            self._secret_pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def redact_text(self, text: str) -> str:
        """Return the text with secrets masked."""
        if self._secret_pattern is not None:
            text = self._secret_pattern.sub(MASK, text)
        for pattern, replacement in _SECRET_PATTERNS:
            text = pattern.sub(replacement, text)
        return text

    def redact_value(self, value: Any, name: str = "") -> Any:
        """Return a value as JSON types, with secrets masked at any depth.

        Args:
            value: A value of any type; types that JSON does not have become text.
            name: The field's name. The text of a field such as `password` or `hf_token` is masked completely.

        """
        if isinstance(value, str):
            return MASK if value and _SECRET_FIELD.fullmatch(name) else self.redact_text(value)
        if isinstance(value, Mapping):
            return {str(key): self.redact_value(item, str(key)) for key, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.redact_value(item, name) for item in value]
        return value if value is None or isinstance(value, (bool, int, float)) else self.redact_text(str(value))


REDACTOR: Final = Redactor()
"""The redactor of this process: a secret given to one component is redacted in the output of all."""
