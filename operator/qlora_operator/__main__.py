"""Starts the operator: health server, leader election, then kopf, work queue and progress server in one event loop."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from functools import partial
from typing import Final

from qlora_api.escapes import escape_text
from qlora_api.logs.formatters import configure_logs, handler_for
from qlora_operator.cluster.http import Api, ApiError, load_configuration, read_credentials
from qlora_operator.cluster.interface import ClusterBusyError
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
"""Library loggers that log routine events at INFO."""
COMPARED_ANSWERS: Final = 10
"""Most answers, one a second, that the operator waits for at start if its clock seems wrong."""
GC_THRESHOLD: Final = 20_000
"""Allocations after which Python runs the cyclic garbage collector. A page of a list makes many more, none of them in a
cycle: with the default of 700, collections take more than half of the time in which a page is read."""


async def run(settings: Settings) -> None:
    """Run one operator until SIGTERM."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is not None:
        # Until kopf installs its own handler: PID 1 of a container has no default action for SIGTERM.
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    configuration = await load_configuration(settings.kubeconfig)
    renew_credentials = partial(read_credentials, configuration, settings.kubeconfig)
    # A connection of its own, so that renewing the Lease never waits behind other calls.
    elector = make_elector(settings, Api(configuration, renew_credentials=renew_credentials), loop)
    is_leader = elector.is_leader if elector else always_leader
    metrics, clock = Metrics(is_leader), ServerClock()
    api = Api(configuration, is_leader, renew_credentials, metrics.on_api_call, clock.on_server_date)
    # Another one, so that a slow or overloaded TokenReview never delays a reconcile.
    review_api = Api(configuration, is_leader, renew_credentials, metrics.on_api_call)
    controller = Controller(settings, api, metrics, clock.now, review_api)
    metrics.track_work(controller.is_working)
    try:
        async with serve_health(settings.health_port, controller.unhealthy_reason, metrics.render), leadership(elector):
            await compare_clocks(clock, api)
            await run_kopf(settings, configuration, controller)
    finally:
        # kopf leaves its watches to be closed with the loop, and asyncio would log what they raise then.
        logging.getLogger("asyncio").disabled = True


async def compare_clocks(clock: ServerClock, api: Api) -> None:
    """Wait for a few answers of the API server if the first contradicts the local clock: decisions depend on it."""
    for _ in range(COMPARED_ANSWERS):
        with contextlib.suppress(ClusterBusyError, ApiError):
            await api.request("GET", "/version")
        if not clock.in_doubt:
            return
        await asyncio.sleep(1)


def always_leader() -> bool:
    """Return True: without an election there is only one replica."""
    return True


def make_elector(settings: Settings, api: Api, loop: asyncio.AbstractEventLoop) -> LeaderElector | None:
    """Return the elector of this replica; None outside a cluster, where there is only one."""
    election = settings.leader_election
    if election is None:
        return None
    lock = KubeLeaseLock(api, election.namespace, election.lease, election.pod, settings.namespaces)
    return LeaderElector(lock, election.pod, loop.time, utc_now)


def main() -> int:
    """Return the exit code: 0 after SIGTERM, 2 for an invalid setting, 1 after any other error, which is logged."""
    try:
        settings = read_settings(os.environ)
    except SettingsError as error:
        sys.stderr.write(f"{escape_text(str(error))}\n")
        return 2
    configure_logs(handler_for(settings.log_format, sys.stderr), settings.log_level)
    gc.freeze()  # imported modules are never collected
    gc.set_threshold(GC_THRESHOLD)
    for chatty in NOISY_LOGGERS:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(run(settings))
    except Exception as error:
        _log.error("fatal error, exiting: %s", error, exc_info=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
