"""Polls a QLoRAJob, through restarts of the API server."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from qlora_api.job_ref import JobRef
from qlora_cli.cluster.client import ClusterClient, UnreachableError
from qlora_cli.cluster.jobs import ClusterJob, get_job

POLL_SECONDS: Final = 1.0
UNREACHABLE_TIMEOUT_SECONDS: Final = 300.0
"""How long the API server may be unreachable while a command waits: longer than its upgrade takes."""


@dataclass(frozen=True)
class Clock:
    """Time and sleep; tests inject their own."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def poll_job(cluster: ClusterClient, ref: JobRef, clock: Clock, note: Callable[[str], None]) -> Iterator[ClusterJob]:
    """Yield the QLoRAJob every POLL_SECONDS, until the caller stops.

    Args:
        cluster: The cluster.
        ref: The QLoRAJob.
        clock: Time and sleep.
        note: Receives a message when the API server becomes unreachable.

    Raises:
        UnreachableError: The API server was unreachable for longer than UNREACHABLE_TIMEOUT_SECONDS.

    """
    unreachable_since: float | None = None
    while True:
        try:
            yield get_job(cluster, ref)
            unreachable_since = None
        except UnreachableError as error:
            if unreachable_since is None:
                note(f"{error}; retrying for {UNREACHABLE_TIMEOUT_SECONDS / 60:.0f} minutes")
            unreachable_since = unreachable_since or clock.now()
            if clock.now() - unreachable_since > UNREACHABLE_TIMEOUT_SECONDS:
                raise
        clock.sleep(POLL_SECONDS)
