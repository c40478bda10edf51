"""kopf event handlers: every change of a QLoRAJob or of its children only adds a key to the work queue.

kopf's create and update handlers, timers, daemons, finalizers and annotations are not used: they lose status on a
crash between two writes, and a finalizer would make deletion wait for the operator.
"""

from typing import Any, Final

import kopf
from kubernetes.aio import client

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_operator.cluster.http import read_credentials
from qlora_operator.cluster.kube_cluster import PAGE_SIZE
from qlora_operator.controller.controller import Controller
from qlora_operator.controller.kopf_storage import NullDiffBaseStorage, NullProgressStorage
from qlora_operator.controller.kopf_watches import isolated_watches
from qlora_operator.settings import Settings

QLORAJOBS: Final = (names.GROUP, names.VERSION, names.PLURAL)
JOBS: Final = ("batch", "v1", "jobs")
PODS: Final = ("", "v1", "pods")
IDLE_SECONDS: Final = 0.1
"""How long kopf keeps an object in memory after its last event: with 1 s, 5,000 objects of each kind peak at 251 MiB
instead of 196."""
ERROR_BACKOFFS: Final = (1, 2, 4)
"""Pauses of kopf in seconds after rejected requests, before a watch counts as failed and starts from its list."""
EXIT_SECONDS: Final = 25.0
"""Less than the 30 seconds of a pod's default terminationGracePeriodSeconds."""


@kopf.on.login()
async def on_login(memo: kopf.Memo, **_: Any) -> kopf.ConnectionInfo:
    """Log in to the same API server as the rest of the operator, with the token as it is on disk now."""
    await read_credentials(memo.configuration, memo.controller.settings.kubeconfig)
    return await connection_info(memo.configuration)


@kopf.on.startup(errors=kopf.ErrorsMode.PERMANENT)
async def on_startup(memo: kopf.Memo, settings: kopf.OperatorSettings, **_: Any) -> None:
    """Start everything that kopf does not run; a failure ends the process, so that another replica takes the Lease."""
    configure_kopf(settings)
    await memo.controller.start()


@kopf.on.cleanup()
async def on_cleanup(memo: kopf.Memo, **_: Any) -> None:
    """Stop everything that `on_startup` started; kopf's watches have ended by now."""
    await memo.controller.stop()


@kopf.on.event(*QLORAJOBS)
async def on_job_event(event: kopf.RawEvent, namespace: str | None, name: str, memo: kopf.Memo, **_: Any) -> None:
    """Queue a QLoRAJob that changed, or drop one that was deleted."""
    ref = JobRef(namespace or "", name)
    if event["type"] == "DELETED":
        memo.controller.on_job_delete(ref, event["object"])
    else:
        memo.controller.on_job_update(ref, event["object"])


@kopf.on.event(*JOBS)
async def on_child_job_event(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    """Queue the QLoRAJob of a Job that changed; a label on the Job names it."""
    memo.controller.on_child_event(memo.controller.child_cache.jobs, event["type"], event["object"])


@kopf.on.event(*PODS)
async def on_pod_event(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    """Queue the QLoRAJob of a pod that changed; a label on the pod names it."""
    memo.controller.on_child_event(memo.controller.child_cache.pods, event["type"], event["object"])


def configure_kopf(settings: kopf.OperatorSettings) -> None:
    """Configure kopf to watch only: no patches, no Events, no scanning."""
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.posting.loggers = False
    settings.queueing.worker_limit = None
    settings.queueing.idle_timeout = IDLE_SECONDS
    settings.watching.chunk_size = PAGE_SIZE
    settings.networking.error_backoffs = ERROR_BACKOFFS
    settings.persistence.diffbase_storage = NullDiffBaseStorage()
    settings.persistence.progress_storage = NullProgressStorage()
    settings.process.ultimate_exiting_timeout = EXIT_SECONDS
    managed = f"{names.MANAGED_BY_LABEL}={names.FIELD_MANAGER}"
    settings.watching.label_selectors[JOBS] = managed
    settings.watching.label_selectors[PODS] = managed


async def connection_info(configuration: client.Configuration) -> kopf.ConnectionInfo:
    """Convert the Kubernetes client's configuration to kopf's."""
    authorization = await configuration.get_api_key_with_prefix("BearerToken") or ""
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        token=authorization.rpartition(" ")[2] or None,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
    )


async def run_kopf(settings: Settings, configuration: client.Configuration, controller: Controller) -> None:
    """Run kopf until SIGTERM."""
    with isolated_watches(controller.served_namespaces):
        await kopf.operator(
            standalone=True,
            clusterwide=not settings.namespaces,
            namespaces=settings.namespaces,
            memo=kopf.Memo(controller=controller, configuration=configuration),
        )
