"""Storages for kopf that store nothing.

kopf compares every object with the state in its annotations, whether or not a handler asks for changes. With event
handlers only, this takes a fifth of the operator's CPU time and has no effect.
"""

from collections.abc import Iterable
from typing import Any

import kopf


class NullDiffBaseStorage(kopf.DiffBaseStorage):
    """Diff base that is empty for every object."""

    def build(self, *, body: kopf.Body, extra_fields: Iterable[Any] | None = None) -> kopf.BodyEssence:  # noqa: ARG002
        """Return an empty essence."""
        return kopf.BodyEssence({})

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:  # noqa: ARG002
        """Return None: nothing is ever stored."""
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Store nothing."""


class NullProgressStorage(kopf.ProgressStorage):
    """Stores no handler progress: event handlers have none."""

    def fetch(self, **_: Any) -> None:
        """Return None: nothing is ever stored."""

    def store(self, **_: Any) -> None:
        """Store nothing."""

    def purge(self, **_: Any) -> None:
        """Remove nothing."""

    def touch(self, **_: Any) -> None:
        """Touch nothing."""

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        """Return the essence unchanged: there is no progress in it."""
        return essence
