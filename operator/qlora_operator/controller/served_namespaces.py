"""Which of the watched namespaces are served; one that cannot be listed or watched does not keep the others from it."""

import logging
from collections.abc import Callable, Collection, Iterator
from typing import Final

_log = logging.getLogger(__name__)

ALL_NAMESPACES: Final = ""
"""Stands for the whole cluster."""
LIST: Final = "list"
"""What fails if children and QLoRAJobs of a namespace cannot be listed; otherwise, the plural of a kind is watched."""
NOT_STARTED: Final = "not listed yet"


class ServedNamespaces:
    """Why each namespace is not served, if it is not."""

    def __init__(self, namespaces: Collection[str], watched: Collection[str], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._errors = {
            namespace: dict.fromkeys((LIST, *watched), NOT_STARTED) for namespace in namespaces or (ALL_NAMESPACES,)
        }
        self._unserved_since = clock()

    def on_success(self, namespace: str, part: str) -> None:
        """Record that a part of a namespace, LIST or a watched kind, works."""
        self._set(namespace, part, "")

    def on_failure(self, namespace: str, part: str, error: Exception) -> None:
        """Record that it does not; the reason is logged once."""
        self._set(namespace, part, f"{type(error).__name__}: {error}"[:500])

    def _set(self, namespace: str, part: str, reason: str) -> None:
        errors = self._errors.get(namespace)
        if errors is None or errors.get(part) == reason:
            return
        served = self.is_served(namespace)
        errors[part] = reason
        if reason:
            _log.warning("namespace %r is not served, will retry: %s: %s", namespace, part, reason)
        elif not served and self.is_served(namespace):
            _log.info("namespace %r is served", namespace)
        if not any(self.is_served(namespace) for namespace in self._errors):
            self._unserved_since = self._clock() if served else self._unserved_since

    def restart(self) -> None:
        """Count the time without a served namespace from now."""
        self._unserved_since = self._clock()

    def is_served(self, namespace: str) -> bool:
        """Return whether everything in the namespace works, or in the whole cluster if that is watched."""
        errors = self._errors.get(namespace) or self._errors.get(ALL_NAMESPACES)
        return errors is not None and not any(errors.values())

    def unlisted(self) -> tuple[str, ...]:
        """Return the namespaces whose lists fail."""
        return tuple(namespace for namespace, errors in self._errors.items() if errors[LIST])

    def by_namespace(self) -> Iterator[tuple[str, bool]]:
        """Yield each watched namespace, and whether it is served."""
        return ((namespace, self.is_served(namespace)) for namespace in self._errors)

    def unserved_seconds(self) -> float:
        """Return for how many seconds not a single namespace has been served; 0 if one is."""
        if any(self.is_served(namespace) for namespace in self._errors):
            return 0.0
        return self._clock() - self._unserved_since

    def why(self) -> str:
        """Return the reason of the first namespace that is not served."""
        return next((reason for errors in self._errors.values() for reason in errors.values() if reason), "")
