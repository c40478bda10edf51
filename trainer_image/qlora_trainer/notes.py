"""Sentences about what is going on, for whoever watches."""

from collections.abc import Callable

Note = Callable[[str], None]


def silent(_: str) -> None:
    """Say nothing."""
