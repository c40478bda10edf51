"""Looking at a QLoRAJob again and again, through restarts of the API server."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from qlora_api.job_ref import JobRef
from qlora_cli.cluster.client import ClusterClient, UnreachableError
from qlora_cli.cluster.jobs import ClusterJob, get_job

POLL_SECONDS: Final = 1.0
UNREACHABLE_TIMEOUT_SECONDS: Final = 300.0
"""How long an API server may be away while somebody waits: longer than its upgrade takes."""


@dataclass(frozen=True)
class Clock:
    """The time and its passing; a test has its own."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def poll_job(cluster: ClusterClient, ref: JobRef, clock: Clock, note: Callable[[str], None]) -> Iterator[ClusterJob]:
    """Yield the QLoRAJob every second until the caller has seen enough; a silent API server is waited for."""
    silent_since: float | None = None
    while True:
        try:
            yield get_job(cluster, ref)
            silent_since = None
        except UnreachableError as error:
            if silent_since is None:
                note(f"{error}; trying again for {UNREACHABLE_TIMEOUT_SECONDS / 60:.0f} minutes")
            silent_since = silent_since or clock.now()
            if clock.now() - silent_since > UNREACHABLE_TIMEOUT_SECONDS:
                raise
        clock.sleep(POLL_SECONDS)
