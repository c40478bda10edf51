"""Places of this computer: paths for people, file:// URIs for the contract."""

from pathlib import Path
from urllib.parse import unquote, urlparse


def to_uri(text: str) -> str:
    """Return a URI as it is, and a path of this computer as an absolute file:// URI; '/' at the end means a folder."""
    if "://" in text:
        return text
    return Path(text).expanduser().resolve().as_uri() + ("/" if text.endswith("/") else "")


def to_display_path(uri: str) -> str:
    """Return a file:// URI as a path, and any other URI as it is."""
    return unquote(urlparse(uri).path) if uri.startswith("file://") else uri
