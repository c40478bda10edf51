"""Converts between local paths, for people, and file:// URIs, for the contract."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import unquote

_ABSOLUTE_FILE_URI: Final = re.compile("file://(localhost)?/")
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
_SCHEME: Final = re.compile("[A-Za-z][A-Za-z0-9+.-]*:")
FILE_SCHEME: Final = "file:"
_SHOWN_CHARACTERS: Final = 200
"""Of a path in a message; file systems take 255 for a name."""


class LocalPathError(ValueError):
    """A text that a person gave is no path of this machine; the message has field, cause and fix."""


def to_absolute_path(text: str, field: str, base: Path | None = None) -> Path:
    """Return the absolute path that a person means, with '~' and links resolved; nothing has to be there.

    Args:
        text: A path.
        field: Argument or field that gave it, for the message.
        base: Folder that a relative path starts from; None: the working folder.

    Raises:
        LocalPathError: No file can have this path, or this user has no permission to read its folder.

    """
    try:
        path = ((base or Path.cwd()).absolute() / _expand_home(text)).resolve()
        str(path).encode()  # half a character, or a name that is not UTF-8: no URI can have it
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except UnicodeEncodeError:
        cause = "has bytes that are not UTF-8, or half a character; rename it"
    except ValueError:
        cause = "has a null character, which no path has; correct the path"
    except OSError as error:
        cause = f"cannot be used: {error.strerror}; correct the path, or its permissions"
    except RuntimeError as error:  # a circle of links, or a user that does not exist
        cause = f"cannot be used: {str(error).rstrip('.')}; correct the path"
    else:
        return path
    raise LocalPathError(f"{field}: {text[:_SHOWN_CHARACTERS]!r} {cause}")


@contextlib.contextmanager
def using_path(path: str | Path, field: str) -> Iterator[None]:
    """Turn an error of the operating system about a path that a person gave into LocalPathError."""
    try:
        yield
    except OSError as error:
        shown = str(path)[:_SHOWN_CHARACTERS]
        cause = f"cannot be used: {error.strerror or error}; correct the path, or its permissions"
        raise LocalPathError(f"{field}: {shown!r} {cause}") from error


def _expand_home(text: str) -> str:
    """Return a path without a leading ~; pathlib would expand that of ./~name too, and raises as this does."""
    expanded = os.path.expanduser(text)  # noqa: PTH111
    if text.startswith("~") and expanded == text:
        raise RuntimeError(f"there is no home directory of {text.partition('/')[0]}")
    return expanded


def to_uri(text: str, field: str) -> str:
    """Return a URI unchanged, and a local path as an absolute file:// URI; a trailing '/' (a folder) is kept.

    Raises:
        LocalPathError: As `to_absolute_path`; the field is the argument that gave the text.

    """
    if (path := path_of_relative_uri(text)) is not None:
        text = path
    if text.startswith("file://"):
        to_absolute_path(to_display_path(text), field)
    if "://" in text:
        return text
    return to_absolute_path(text, field).as_uri() + ("/" if text.endswith("/") else "")


def to_model_uri(text: str, field: str) -> str:
    """Return organization/name as a model of the hub, unless there is such a folder; everything else as `to_uri`."""
    is_hub = _HUB_NAME.fullmatch(text) is not None and not to_absolute_path(text, field).exists()
    return f"hf://{text}" if is_hub else to_uri(text, field)


def path_of_relative_uri(uri: str) -> str | None:
    """Return the path of a file: URI that is not absolute, such as file://my.jsonl or file:my.jsonl, or None."""
    if not uri.startswith(FILE_SCHEME) or _ABSOLUTE_FILE_URI.match(uri):
        return None
    return unquote(uri.removeprefix(FILE_SCHEME).removeprefix("//"))


def to_display_path(uri: str) -> str:
    """Return a file:// URI as the path that is read, in which '#' and '?' have no meaning, and any other unchanged."""
    return f"/{unquote(uri.removeprefix('file://').partition('/')[2])}" if uri.startswith("file://") else uri


def has_scheme(text: str) -> bool:
    """Return whether a text starts as a URI does, whatever follows."""
    return _SCHEME.match(text) is not None
