"""Converts between local paths, for people, and file:// URIs, for the contract."""

import re
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlparse

_ABSOLUTE_FILE_URI: Final = re.compile("file://(localhost)?/")
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
FILE_SCHEME: Final = "file:"


def to_uri(text: str) -> str:
    """Return a URI unchanged, and a local path as an absolute file:// URI; a trailing '/' (a folder) is kept."""
    if (path := path_of_relative_uri(text)) is not None:
        text = path
    if "://" in text:
        return text
    return Path(text).expanduser().resolve().as_uri() + ("/" if text.endswith("/") else "")


def to_model_uri(text: str) -> str:
    """Return organization/name as a model of the hub, unless there is such a folder; everything else as `to_uri`."""
    is_hub = _HUB_NAME.fullmatch(text) is not None and not Path(text).exists()
    return f"hf://{text}" if is_hub else to_uri(text)


def path_of_relative_uri(uri: str) -> str | None:
    """Return the path of a file: URI that is not absolute, such as file://my.jsonl or file:my.jsonl, or None."""
    if not uri.startswith(FILE_SCHEME) or _ABSOLUTE_FILE_URI.match(uri):
        return None
    return unquote(uri.removeprefix(FILE_SCHEME).removeprefix("//"))


def to_display_path(uri: str) -> str:
    """Return a file:// URI as a path, and any other URI unchanged."""
    return unquote(urlparse(uri).path) if uri.startswith("file://") else uri
