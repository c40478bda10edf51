"""What a row of a dataset means, whatever file it is in: a prompt with its answer, a conversation, or plain text."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]
"""role and content, as a chat template reads them; also tool_calls and the like."""


@dataclass(frozen=True)
class Example:
    """A prompt as the model sees it, and the answer it should give."""

    prompt: str
    answer: str

    @property
    def digest(self) -> bytes:
        """Return the SHA-256 of the content; equal rows have equal digests."""
        return _sha256([self.prompt, self.answer])


@dataclass(frozen=True)
class Chat:
    """A conversation that ends with the assistant."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the tools that the assistant may call."""

    @property
    def digest(self) -> bytes:
        """Return the SHA-256 of the content."""
        return _sha256({"messages": self.messages, "tools": self.tools})


@dataclass(frozen=True)
class Text:
    """Text to continue."""

    text: str

    @property
    def digest(self) -> bytes:
        """Return the SHA-256 of the content."""
        return _sha256({"text": self.text})


Row: TypeAlias = Example | Chat | Text


def _sha256(content: Any) -> bytes:
    return hashlib.sha256(json.dumps(content, default=str).encode()).digest()
