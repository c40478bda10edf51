"""A bounded cache whose entries expire."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ExpiringCache(Generic[Key, Value]):
    """Forgets entries after their time, and the oldest ones beyond the maximum number."""

    def __init__(self, max_entries: int, clock: Callable[[], float]) -> None:
        self._max_entries = max_entries
        self._clock = clock
        self._entries: dict[Key, tuple[float, Value]] = {}

    def __len__(self) -> int:
        """Return the number of entries, expired ones included."""
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        """Return whether there is an entry, even an expired one."""
        return key in self._entries

    def get(self, key: Key) -> Value | None:
        """Return the value of an entry that has not expired."""
        expires, value = self._entries.get(key, (0.0, None))
        return value if self._clock() <= expires else None

    def put(self, key: Key, value: Value, seconds: float) -> None:
        """Store a value for a number of seconds."""
        self._entries.pop(key, None)
        if len(self._entries) >= self._max_entries:
            del self._entries[next(iter(self._entries))]
        self._entries[key] = (self._clock() + seconds, value)
