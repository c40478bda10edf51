"""Starts the operator: health, election, then kopf, the work queue and the progress server in one event loop."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from functools import partial
from typing import Final

from qlora_api.logs import configure_logs, handler_for
from qlora_operator.cluster.http import Api, load_configuration, read_credentials
from qlora_operator.cluster.server_clock import ServerClock, utc_now
from qlora_operator.controller.controller import Controller
from qlora_operator.controller.handlers import run_kopf
from qlora_operator.controller.metrics import Metrics
from qlora_operator.health_server import serve_health
from qlora_operator.leader_election.election import LeaderElector, leadership
from qlora_operator.leader_election.lease_client import KubeLeaseLock
from qlora_operator.settings import Settings, SettingsError, read_settings

_log = logging.getLogger("qlora_operator")

NOISY_LOGGERS: Final = ("kopf.objects", "kopf.activities.probe", "aiohttp.access")
"""Loggers of libraries that tell what is normal."""
GC_THRESHOLD: Final = 20_000
"""New objects after which Python looks for cycles. A page of a list has many more, and none of them is in a cycle: with
the default of 700 the looks take more than half of the time in which a page is read."""


async def run(settings: Settings) -> None:
    """Run one operator until it is told to stop."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is not None:
        # Until kopf takes the signal over: a container's first process has no default for it.
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    configuration = await load_configuration(settings.kubeconfig)
    renew = partial(read_credentials, configuration, settings.kubeconfig)
    # A connection of its own: a renewal of the Lease must not wait behind other calls.
    election = make_elector(settings, Api(configuration, renew_credentials=renew), loop)
    leads = election.is_leader if election else always_leader
    metrics, clock = Metrics(leads), ServerClock()
    api = Api(configuration, leads, renew, metrics.on_api_call, clock.on_server_date)
    runtime = Controller(settings, api, metrics, clock.now)
    async with serve_health(settings.health_port, runtime.unhealthy_reason, metrics.render), leadership(election):
        await run_kopf(settings, configuration, runtime)


def always_leader() -> bool:
    """Say that there is nobody else who could lead."""
    return True


def make_elector(settings: Settings, api: Api, loop: asyncio.AbstractEventLoop) -> LeaderElector | None:
    """Return this replica's part in the election; outside a cluster there is nobody to agree with."""
    home = settings.leader_election
    if home is None:
        return None
    leases = KubeLeaseLock(api, home.namespace, home.lease, home.pod)
    return LeaderElector(leases, home.pod, loop.time, utc_now)


def main() -> int:
    """Return 0 after SIGTERM, 2 for a wrong setting, and 1 after anything else, which the log tells of."""
    try:
        settings = read_settings(os.environ)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    configure_logs(handler_for(settings.log_format, sys.stderr), settings.log_level)
    gc.freeze()  # what is imported stays
    gc.set_threshold(GC_THRESHOLD)
    for chatty in NOISY_LOGGERS:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(run(settings))
    except Exception as error:
        _log.error("the operator ends, and has to be started again: %s", error, exc_info=True)
        # What one dead watch is to kopf ends the others as well; their tasks would say so after the log was closed.
        logging.getLogger("asyncio").disabled = True
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
