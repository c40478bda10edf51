"""Converts between local paths, for people, and file:// URIs, for the contract."""

from pathlib import Path
from urllib.parse import unquote, urlparse


def to_uri(text: str) -> str:
    """Return a URI unchanged, and a local path as an absolute file:// URI; a trailing '/' (a folder) is kept."""
    if "://" in text:
        return text
    return Path(text).expanduser().resolve().as_uri() + ("/" if text.endswith("/") else "")


def to_display_path(uri: str) -> str:
    """Return a file:// URI as a path, and any other URI unchanged."""
    return unquote(urlparse(uri).path) if uri.startswith("file://") else uri
