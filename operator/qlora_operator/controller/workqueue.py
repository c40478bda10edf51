"""A work queue: keys are deduplicated, never processed concurrently, requeued after a delay, backed off on errors.

A key that is added while it is being processed is not lost: it is processed once more.
"""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Final, Generic, TypeVar

from qlora_operator.cluster.interface import ClusterBusyError

Key = TypeVar("Key")
Work = Callable[[Key], Awaitable[timedelta | None]]
"""Processes a key; returns the delay after which to requeue it, or None to wait for the next event."""

_log = logging.getLogger(__name__)

BASE_BACKOFF_SECONDS: Final = 0.5
"""Delay in seconds after the first error, doubled with each further one."""
MAX_BACKOFF_SECONDS: Final = 300.0
"""Upper bound of the back-off in seconds, before jitter."""
PASS_SECONDS: Final = 240.0
"""Longest processing of one key; one that hangs would otherwise occupy a worker for ever."""


def backoff_seconds(failures: int, jitter: float) -> float:
    """Return the delay in seconds after a number of errors; jitter (0 to 1) scales it by 0.5 to 1.5."""
    return min(BASE_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 20), MAX_BACKOFF_SECONDS) * (0.5 + jitter)


class WorkQueue(Generic[Key]):
    """Processes added keys on a bounded number of workers."""

    def __init__(self, work: Work[Key], workers: int, jitter: Callable[[], float] = random.random) -> None:
        self._work = work
        self._count = workers
        self._jitter = jitter
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._since: dict[Key, float] = {}
        self._active: dict[Key, float] = {}
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: Counter[Key] = Counter()
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False
        self._busy_since = 0.0
        self._last_success = 0.0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def depth(self) -> int:
        """Number of keys waiting for a worker."""
        return self._ready.qsize()

    def add(self, key: Key) -> None:
        """Queue a key, unless it is queued already."""
        if self._closed or key in self._since:
            return
        now = asyncio.get_running_loop().time()
        if not self._since and not self._active:
            self._busy_since = now
        self._since[key] = now
        if key not in self._active:
            self._ready.put_nowait(key)

    def add_after(self, key: Key, delay: timedelta) -> None:
        """Queue a key after a delay; an earlier timer of the same key is kept."""
        loop = asyncio.get_running_loop()
        due = loop.time() + delay.total_seconds()
        timer = self._timers.get(key)
        if self._closed or (timer is not None and timer.when() <= due):
            return
        if timer is not None:
            timer.cancel()
        self._timers[key] = loop.call_at(due, self._on_timer, key)

    def oldest_age(self) -> float:
        """Return the age in seconds of the oldest key that is queued or being processed."""
        now = asyncio.get_running_loop().time()
        return max((now - since for since in (*self._since.values(), *self._active.values())), default=0.0)

    def stalled_seconds(self) -> float:
        """Return for how many seconds no key was processed without an error although some were there all the time.

        The age of the queue would not do: with slow answers of the API server, a burst of keys takes its time.
        """
        if not self._since and not self._active:
            return 0.0
        return asyncio.get_running_loop().time() - max(self._busy_since, self._last_success)

    def is_active(self, key: Key) -> bool:
        """Return whether a key is being processed."""
        return key in self._active

    def start(self) -> None:
        """Start the workers."""
        self._tasks = [asyncio.create_task(self._run(), name=f"worker {number}") for number in range(self._count)]

    def alive(self) -> bool:
        """Return whether every worker is running."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    async def drain(self, grace: timedelta) -> None:
        """Stop accepting keys, let the workers finish their current key within the grace period, then cancel them."""
        self._closed = True
        for timer in self._timers.values():
            timer.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace.total_seconds())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_timer(self, key: Key) -> None:
        del self._timers[key]
        self.add(key)

    async def _run(self) -> None:
        while True:
            key = await self._ready.get()
            if self._closed:
                continue
            await self._work_on(key)

    async def _work_on(self, key: Key) -> None:
        self._active[key] = self._since.pop(key)
        self._idle.clear()
        try:
            delay = await self._attempt(key)
        finally:
            del self._active[key]
            if not self._active:
                self._idle.set()
        if delay is not None:
            self.add_after(key, delay)
        if key in self._since:
            self._ready.put_nowait(key)

    async def _attempt(self, key: Key) -> timedelta | None:
        """Process a key; any error is logged and counted, and the key is requeued with back-off."""
        try:
            async with asyncio.timeout(PASS_SECONDS):
                delay = await self._work(key)
        except ClusterBusyError as error:
            _log.info("%s", error)
        except TimeoutError:
            _log.warning("reconcile of %s took longer than %.0f s, so it is repeated", key, PASS_SECONDS)
        except Exception:
            _log.exception("reconcile of %s failed", key)
        else:
            del self._failures[key]
            self._last_success = asyncio.get_running_loop().time()
            return delay
        self._failures[key] += 1
        return timedelta(seconds=backoff_seconds(self._failures[key], self._jitter()))
