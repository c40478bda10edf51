"""The work queue."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.controller import workqueue
from qlora_operator.controller.workqueue import MAX_BACKOFF_SECONDS, WorkQueue, backoff_seconds

Work = Callable[[str], Awaitable[timedelta | None]]


@asynccontextmanager
async def running(work: Work, workers: int = 4) -> AsyncIterator[WorkQueue[str]]:
    queue = WorkQueue(work, workers, jitter=lambda: 0.5)
    queue.start()
    yield queue
    await queue.drain(timedelta(seconds=1))


async def test_waiting_key_is_processed_once() -> None:
    done: list[str] = []

    async def work(key: str) -> None:
        done.append(key)

    async with running(work) as queue:
        for _ in range(10):
            queue.add("a")
        await asyncio.sleep(0.01)
    assert done == ["a"]


async def test_key_added_while_active_is_processed_again_afterwards() -> None:
    passes, inside = [], 0

    async def work(key: str) -> None:
        nonlocal inside
        inside += 1
        assert inside == 1
        passes.append(key)
        await asyncio.sleep(0.01)
        inside -= 1

    async with running(work) as queue:
        queue.add("a")
        await asyncio.sleep(0.005)
        queue.add("a")
        queue.add("a")
        await asyncio.sleep(0.05)
    assert passes == ["a", "a"]


async def test_workers_bound_concurrency() -> None:
    now = most = 0

    async def work(_: str) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1

    async with running(work, workers=3) as queue:
        for key in "abcdefgh":
            queue.add(key)
        await asyncio.sleep(0.1)
    assert most == 3


@pytest.mark.parametrize("error", [ClusterBusyError("away"), ValueError("our mistake")])
async def test_failed_key_is_requeued_with_backoff(error: Exception) -> None:
    passes = 0

    async def work(_: str) -> None:
        nonlocal passes
        passes += 1
        if passes == 1:
            raise error

    async with running(work) as queue:
        queue.add("a")
        await asyncio.sleep(0.1)
        assert passes == 1
        await asyncio.sleep(0.6)
    assert passes == 2


async def test_returned_delay_requeues_key() -> None:
    passes = 0

    async def work(_: str) -> timedelta | None:
        nonlocal passes
        passes += 1
        return timedelta(milliseconds=10) if passes < 3 else None

    async with running(work) as queue:
        queue.add("a")
        await asyncio.sleep(0.1)
    assert passes == 3


async def test_earlier_delay_wins() -> None:
    passes = 0

    async def work(_: str) -> None:
        nonlocal passes
        passes += 1

    async with running(work) as queue:
        queue.add_after("a", timedelta(milliseconds=20))
        queue.add_after("a", timedelta(seconds=30))
        await asyncio.sleep(0.1)
    assert passes == 1


async def test_drain_lets_active_key_finish() -> None:
    done: list[str] = []

    async def work(key: str) -> None:
        await asyncio.sleep(0.05)
        done.append(key)

    queue = WorkQueue(work, 1)
    queue.start()
    queue.add("a")
    queue.add("b")
    await asyncio.sleep(0.01)
    await queue.drain(timedelta(seconds=5))
    assert done == ["a"]
    assert not queue.alive()


async def test_oldest_age_includes_active_key() -> None:
    release = asyncio.Event()

    async def work(_: str) -> None:
        await release.wait()

    async with running(work) as queue:
        queue.add("a")
        await asyncio.sleep(0.05)
        assert queue.oldest_age() >= 0.04
        release.set()
        await asyncio.sleep(0.01)
        assert queue.oldest_age() == 0.0


def test_backoff_doubles_up_to_maximum_with_jitter() -> None:
    assert [backoff_seconds(failures, 0.5) for failures in (1, 2, 3)] == [0.5, 1.0, 2.0]
    assert backoff_seconds(100, 0.5) == MAX_BACKOFF_SECONDS
    assert (backoff_seconds(1, 0.0), backoff_seconds(1, 1.0)) == (0.25, 0.75)


async def test_queue_stalls_only_while_nothing_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = asyncio.get_running_loop().time()
    failing = True

    async def work(_: str) -> None:
        if failing:
            raise KeyError

    queue = WorkQueue(work, 1, jitter=lambda: 0.5)
    assert queue.stalled_seconds() == 0.0
    queue.add("a")
    queue.add("b")
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now + 100)
    assert queue.stalled_seconds() == pytest.approx(100, abs=1)
    await queue._work_on(await queue._ready.get())
    assert queue.stalled_seconds() == pytest.approx(100, abs=1)
    failing = False
    queue.add("c")
    await queue._work_on(await queue._ready.get())
    assert queue.stalled_seconds() == 0.0
    await queue._work_on(await queue._ready.get())
    assert queue.stalled_seconds() == 0.0
    await queue.drain(timedelta(0))


async def test_key_that_always_fails_stalls_nothing() -> None:
    async def work(_: str) -> None:
        raise KeyError

    async with running(work) as queue:
        queue.add("a")
        await asyncio.sleep(0.05)
        assert queue.stalled_seconds() == 0.0


async def test_key_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workqueue, "PASS_SECONDS", 0.02)
    done: list[str] = []

    async def work(key: str) -> None:
        if key == "hangs":
            await asyncio.Event().wait()
        done.append(key)

    async with running(work, workers=1) as queue:
        queue.add("hangs")
        queue.add("waits")
        await asyncio.sleep(0.1)
        assert queue.alive()
    assert done == ["waits"]
