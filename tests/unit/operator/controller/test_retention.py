"""What is deleted of runs that have ended, and when: spec.ttl and the retention of the installation."""

from dataclasses import replace
from datetime import timedelta
from typing import Final

import pytest

from qlora_api.reasons import Reason
from qlora_operator.controller.reconcile import reconcile, reconcile_once
from qlora_operator.controller.result import ReconcileResult
from qlora_operator.lifecycle import ReconcileContext
from qlora_operator.models import Retention
from tests.fakes import FakeCluster
from tests.make import INSTALLATION, REF, make_manifest, make_termination_message
from tests.unit.operator.life import PREPARE, reconcile_until_stable, run_to_success

DAY: Final = timedelta(days=1)


async def ended(*, ok: bool = True, **change: object) -> FakeCluster:
    cluster = FakeCluster()
    cluster.submit(make_manifest(**change))
    if ok:
        await run_to_success(cluster)
    else:
        await reconcile_until_stable(cluster)
        cluster.end_pod(PREPARE, 1, make_termination_message(Reason.DATASET_INVALID, "spec.dataset.uri: row 1"))
        await reconcile_until_stable(cluster)
    return cluster


async def reconcile_in(cluster: FakeCluster, wait: timedelta, retention: Retention) -> ReconcileResult:
    cluster.pass_time(wait)
    installation = replace(INSTALLATION, retention=retention)
    return await reconcile(REF, cluster, installation, ReconcileContext(cluster.now, None, cluster.reports_since))


@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize(
    ("ttl", "default", "expires"),
    [("2h", None, 2), ("2h", 48, 2), ("48h", 2, 48), (None, 2, 2), (None, None, None)],
)
async def test_children_are_deleted_after_own_or_installed_ttl(
    ok: bool, ttl: str | None, default: int | None, expires: int | None
) -> None:
    cluster = await ended(ok=ok, **({"ttl": ttl} if ttl else {}))
    retention = Retention(ttl=timedelta(hours=default) if default else None)
    kept = set(cluster.children)
    assert {kind for kind, _ in kept} == {"ConfigMap", "Job"}
    await reconcile_in(cluster, timedelta(hours=1), retention)
    assert set(cluster.children) == kept
    await reconcile_in(cluster, timedelta(hours=(expires or 100) - 1), retention)
    assert set(cluster.children) == (set() if expires else kept)
    assert cluster.job is not None, "the QLoRAJob itself stays"


async def test_children_of_invalid_run_expire_too() -> None:
    cluster = await ended(ok=False, ttl="1h")
    cluster.change(lora={"rank": -1})
    await reconcile_in(cluster, DAY, Retention())
    assert cluster.children == {}


async def test_children_that_lost_their_jobs_are_deleted_once() -> None:
    cluster = await ended(ttl="1h")
    for kind, name in list(cluster.children):
        if kind == "Job":
            cluster.remove(name)
    await reconcile_in(cluster, DAY, Retention())
    assert cluster.children == {}
    writes = len(cluster.writes)
    await reconcile_in(cluster, DAY, Retention())
    assert len(cluster.writes) == writes


async def test_children_of_another_owner_are_kept() -> None:
    cluster = await ended(ttl="1h")
    former = cluster.children["ConfigMap", PREPARE]
    former["metadata"]["ownerReferences"] = [{**former["metadata"]["ownerReferences"][0], "uid": "former"}]
    await reconcile_in(cluster, DAY, Retention())
    assert set(cluster.children) == {("ConfigMap", PREPARE)}


@pytest.mark.parametrize("ok", [True, False])
async def test_finished_qlorajob_is_deleted_after_retention(ok: bool) -> None:
    cluster = await ended(ok=ok, ttl="1h")
    retention = Retention(jobs=90 * DAY)
    first = await reconcile_in(cluster, timedelta(minutes=1), retention)
    assert first.requeue_after is not None
    assert first.requeue_after <= timedelta(hours=1), "the children expire first"
    second = await reconcile_in(cluster, DAY, retention)
    assert second.requeue_after is not None
    assert 88 * DAY < second.requeue_after < 90 * DAY
    assert cluster.job is not None
    await reconcile_in(cluster, 89 * DAY, retention)
    assert cluster.job is None


async def test_unfinished_qlorajob_outlives_retention() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest(suspend=True))
    await reconcile_until_stable(cluster)
    await reconcile_in(cluster, 1000 * DAY, Retention(ttl=DAY, jobs=DAY))
    assert cluster.status["phase"] == "Suspended"


async def test_stale_view_of_ended_run_deletes_nothing() -> None:
    cluster = await ended()
    raw = await cluster.read_job(REF)
    assert raw is not None
    installation = replace(INSTALLATION, retention=Retention(jobs=DAY))
    context = ReconcileContext(cluster.now + 2 * DAY)
    assert await reconcile_once(raw, cluster, installation, context, from_cache=True) is None
    assert cluster.job is not None


async def test_longest_retention_is_no_overflow() -> None:
    cluster = await ended(ttl="9999999d")
    result = await reconcile_in(cluster, DAY, Retention(jobs=timedelta(days=9_999_999)))
    assert result.requeue_after is not None
