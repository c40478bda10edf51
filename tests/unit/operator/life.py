"""Passes over the QLoRAJob of a cluster in memory, from its submission to its end."""

import json
from datetime import timedelta
from typing import Any, Final

from qlora_api import names
from qlora_api.v1alpha1 import Progress
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.controller.reconcile import reconcile
from qlora_operator.controller.result import ReconcileResult
from qlora_operator.lifecycle import Reception, ReconcileContext
from tests.fakes import CrashError, FakeCluster
from tests.make import INSTALLATION, PREPARED_MESSAGE, PUBLISHED_MESSAGE, REF

PREPARE: Final = names.prepare_job_name(REF.name)
PREPARE_AGAIN: Final = names.prepare_job_name(REF.name, 2)
TRAIN: Final = names.train_job_name(REF.name, 1)


async def reconcile_now(cluster: FakeCluster, report: Progress | None = None) -> ReconcileResult:
    now = cluster.now + cluster.clock_skew
    others = Reception(
        (now,) if cluster.others_reported_at is None else cluster.others_reported_at, refused_at=cluster.refused_at
    )
    watch = ReconcileContext(
        now,
        report,
        cluster.reports_since,
        quarantined_nodes=cluster.quarantined_nodes,
        reception=others,
        node_selector=cluster.placement[0],
        tolerations=cluster.placement[1],
    )
    return await reconcile(REF, cluster, INSTALLATION, watch)


async def reconcile_until_stable(cluster: FakeCluster, report: Progress | None = None) -> None:
    """Reconcile until nothing is written, restarting the operator when it dies."""
    for _ in range(20):
        before = len(cluster.writes)
        cluster.pass_time(timedelta(seconds=1))
        try:
            await reconcile_now(cluster, report)
        except (CrashError, ClusterBusyError):
            continue
        if len(cluster.writes) == before:
            return
    raise AssertionError(f"never settles: {cluster.writes}")


def newest_preparation(cluster: FakeCluster) -> str:
    """The name of the prepare Job with the highest number."""
    labels = {name: job["metadata"]["labels"] for (kind, name), job in cluster.children.items() if kind == "Job"}
    numbers = {
        name: int(label[names.PREPARATION_LABEL]) for name, label in labels.items() if names.PREPARATION_LABEL in label
    }
    return max(numbers, key=numbers.__getitem__)


async def run_to_success(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(newest_preparation(cluster), 0, PREPARED_MESSAGE)
    cluster.pass_time(timedelta(minutes=1))
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(minutes=10))
    cluster.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    await reconcile_until_stable(cluster)


def without_times(status: dict[str, Any]) -> str:
    """A status that can be compared with another life's."""
    return json.dumps(_strip(status, {"lastTransitionTime", "startedAt", "finishedAt", "containerSeconds", "usage"}))


def _strip(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _strip(item, keys) for key, item in sorted(value.items()) if key not in keys}
    return [_strip(item, keys) for item in value] if isinstance(value, list) else value
