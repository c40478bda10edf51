"""What kopf remembers of an object between its events: nothing.

kopf compares every object with what it stored in its annotations, whether or not a handler asks for changes. With
event handlers only that is a fifth of the operator's processor time and decides nothing.
"""

from collections.abc import Iterable
from typing import Any

import kopf


class NullDiffBaseStorage(kopf.DiffBaseStorage):
    """Finds nothing worth comparing in any object."""

    def build(self, *, body: kopf.Body, extra_fields: Iterable[Any] | None = None) -> kopf.BodyEssence:  # noqa: ARG002
        """Return nothing, at no cost."""
        return kopf.BodyEssence({})

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:  # noqa: ARG002
        """Return nothing: nothing was stored."""
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Store nothing."""


class NullProgressStorage(kopf.ProgressStorage):
    """Keeps no handler's progress: event handlers have none."""

    def fetch(self, **_: Any) -> None:
        """Return nothing: nothing was stored."""

    def store(self, **_: Any) -> None:
        """Store nothing."""

    def purge(self, **_: Any) -> None:
        """Remove nothing."""

    def touch(self, **_: Any) -> None:
        """Mark nothing."""

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        """Return what was found, which is nothing."""
        return essence
