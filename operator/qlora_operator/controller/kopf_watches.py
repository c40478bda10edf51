"""Lets each of kopf's watches fail alone: it is retried with back-off, and the others continue.

kopf ends the process when one watch is rejected, as one of a namespace without a RoleBinding is, and has no setting for
it. All its watches come from one generator, which is replaced while kopf runs.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

from kopf._cogs.clients import watching

_log = logging.getLogger(__name__)

FIRST_RETRY_SECONDS: Final = 1.0
"""Pause after the first failure of a watch, doubled with each further one."""
MAX_RETRY_SECONDS: Final = 60.0


class WatchObserver(Protocol):
    """What is informed of the watches; the namespace is empty for the whole cluster."""

    def on_success(self, namespace: str, part: str) -> None:
        """Record that all objects of a kind were listed, and are watched."""

    def on_failure(self, namespace: str, part: str, error: Exception) -> None:
        """Record that a kind cannot be listed or watched."""


@contextmanager
def isolated_watches(
    observer: WatchObserver, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> Iterator[None]:
    """Isolate the watches that kopf starts while the block runs."""
    infinite_watch = watching.infinite_watch

    async def isolated_watch(*, resource: Any, namespace: Any, **options: Any) -> AsyncIterator[Any]:
        loop, failures = asyncio.get_running_loop(), 0
        while True:
            started = loop.time()
            try:
                async for event in infinite_watch(resource=resource, namespace=namespace, **options):
                    if event is watching.Bookmark.LISTED:
                        observer.on_success(namespace or "", resource.plural)
                    yield event
            except Exception as error:
                _log.info("the watch of %s in %r failed: %r", resource.plural, namespace, error)
                observer.on_failure(namespace or "", resource.plural, error)
            failures = 1 if loop.time() - started > MAX_RETRY_SECONDS else failures + 1
            await sleep(min(FIRST_RETRY_SECONDS * 2.0 ** min(failures - 1, 10), MAX_RETRY_SECONDS))

    watching.infinite_watch = isolated_watch
    try:
        yield
    finally:
        watching.infinite_watch = infinite_watch
