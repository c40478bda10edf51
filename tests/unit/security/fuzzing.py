"""Strategies for foreign data: JSON values, and valid files with bytes changed, cut, repeated or exchanged."""

import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([2**31, 2**53, 2**63, 2**64, 10**18, -(2**63), 10**40, 10**320, 1.5, -0.0, 1e308]),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["", " ", "\0", "\ud800", "\x1b]52;c;x\x07", "../..", "{}", "1e400", "NaN", "x" * 5000, "\u202e"]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)


def json_values(keys: st.SearchStrategy[str] = TEXTS) -> st.SearchStrategy[Any]:
    """Return a strategy for JSON values, some of whose objects have keys that a parser reads."""
    return st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys | TEXTS, inner, max_size=4),
        max_leaves=12,
    )


def json_objects(*keys: str, value: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for objects with some of the given keys."""
    known = st.sampled_from(keys)
    values = json_values(known) if value is None else value
    return st.dictionaries(known, values, max_size=len(keys))


def changed(value: Any, replacement: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[Any]:
    """Return a strategy for a JSON value with one part of it replaced, removed or added."""
    paths = list(_paths(value))
    return st.builds(
        lambda path, new, remove: _replaced(value, path, new, remove=remove),
        st.sampled_from(paths),
        json_values() if replacement is None else replacement,
        st.booleans(),
    )


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _paths(inner, (*path, key))


def _replaced(value: Any, path: tuple[Any, ...], new: Any, *, remove: bool) -> Any:
    if not path:
        return new
    copy = value.copy()
    if remove and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = _replaced(value[path[0]], path[1:], new, remove=remove)
    return copy


def json_text(value: Any) -> str:
    """Return a value as JSON, also where Python has no literal for it."""
    return json.dumps(value)


def mutations(seed: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy for a file that differs from a valid one in a few places."""
    position = st.integers(0, len(seed))
    edit = st.tuples(position, st.integers(0, 8), st.one_of(st.binary(max_size=8), st.sampled_from(_FRAGMENTS)))
    return st.lists(edit, max_size=4).map(lambda edits: _edited(seed, edits))


_FRAGMENTS = [
    b"\xff" * 4,
    b"\0" * 8,
    b"[" * 3000,
    b'{"a":' * 3000,
    b"9" * 5000,
    b'"',
    b"\n",
    b",",
    b"\xef\xbb\xbf",
    b"\\ud800",
]


def _edited(seed: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for position, removed, inserted in edits:
        seed = seed[:position] + inserted + seed[position + removed :]
    return seed
