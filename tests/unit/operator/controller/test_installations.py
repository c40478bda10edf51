"""Two installations of the operator: each QLoRAJob is reconciled by one, which the others notice by its claim."""

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest

from qlora_api.job_ref import JobRef
from qlora_api.v1alpha1 import Progress
from qlora_operator.cluster.http import Api, ApiError, NotFoundError
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.controller.controller import Controller
from qlora_operator.controller.error_status import write_error
from qlora_operator.controller.installations import GONE_SECONDS, Installations
from qlora_operator.controller.metrics import Metrics
from qlora_operator.controller.reconcile import reconcile
from qlora_operator.controller.result import ReconcileResult
from qlora_operator.leader_election.installation_lease import InstallationLease
from qlora_operator.lifecycle import Claimant, ReconcileContext
from qlora_operator.resources import Installation
from qlora_operator.settings import LeaderElectionSettings, Settings
from tests.fakes import FakeCluster
from tests.make import INSTALLATION, NOW, PREPARED_MESSAGE, REF, make_manifest
from tests.unit.operator.life import PREPARE, TRAIN

OURS, THEIRS = "qlora-system/qlora-operator", "team-a-tools/qlora"
FIRST, SECOND = JobRef("team-a", "first"), JobRef("team-a", "second")
ELSEWHERE = JobRef("team-b", "first")


@dataclass
class FakeLeases:
    """Leases of installations, and a clock."""

    leases: dict[str, InstallationLease] = field(default_factory=dict)
    error: Exception | None = None
    now: float = 1000.0
    reads: int = 0

    async def read(self, installation: str) -> InstallationLease | None:
        self.reads += 1
        if self.error:
            raise self.error
        return self.leases.get(installation)

    def renew(self, installation: str = THEIRS, *watched: str) -> None:
        self.leases[installation] = InstallationLease(str(self.now), frozenset(watched))

    def clock(self) -> float:
        return self.now


def make(leases: FakeLeases, own: str = OURS) -> Installations:
    return Installations(own, leases, leases.clock)


async def test_namespace_of_other_installation_is_left_to_it() -> None:
    leases = FakeLeases()
    leases.renew()
    ours = make(leases)
    ours.observe(FIRST, THEIRS)
    for _ in range(3):
        assert (ours.find_other(FIRST), ours.find_other(SECOND), ours.find_other(ELSEWHERE)) == (THEIRS, THEIRS, "")
        assert await ours.refresh() == []
    assert (ours.leave(FIRST), ours.leave(SECOND)) == (True, False)
    assert list(ours.left_namespaces()) == ["team-a"]


@pytest.mark.parametrize(
    ("ends", "released"),
    [
        pytest.param(lambda leases: leases.leases.clear(), True, id="Lease deleted"),
        pytest.param(lambda leases: setattr(leases, "now", leases.now + GONE_SECONDS + 1), True, id="not renewed"),
        pytest.param(lambda leases: leases.renew(THEIRS, "team-b"), True, id="watches other namespaces now"),
        pytest.param(lambda leases: leases.renew(THEIRS, "team-a", "team-b"), False, id="watches more"),
        pytest.param(lambda leases: setattr(leases, "now", leases.now + GONE_SECONDS - 1), False, id="upgrades"),
        pytest.param(lambda leases: setattr(leases, "error", ApiError(403, "Forbidden", "no")), False, id="forbidden"),
        pytest.param(lambda leases: setattr(leases, "error", ClusterBusyError("504")), False, id="unknown"),
    ],
)
async def test_namespace_is_taken_over_once_the_other_installation_is_gone(ends, released: bool) -> None:  # type: ignore[no-untyped-def]
    leases = FakeLeases()
    leases.renew()
    ours = make(leases)
    ours.observe(FIRST, THEIRS)
    ours.leave(FIRST)
    ours.leave(SECOND)
    await ours.refresh()
    ends(leases)
    assert sorted(await ours.refresh()) == ([FIRST, SECOND] if released else [])
    assert ours.find_other(FIRST) == ("" if released else THEIRS)
    assert ours.claimant("team-a") == Claimant(
        OURS, frozenset({THEIRS} if released else ()), claims_first=True
    )  # fmt: skip


async def test_unread_lease_counts_as_there_and_renewal_keeps_it() -> None:
    leases = FakeLeases()
    ours = make(leases)
    ours.observe(FIRST, THEIRS)
    assert ours.find_other(FIRST) == THEIRS
    for _ in range(10):
        leases.now += GONE_SECONDS / 2
        leases.renew()
        await ours.refresh()
        assert ours.find_other(FIRST) == THEIRS


async def test_own_claim_is_kept_when_the_namespace_has_claims_of_both() -> None:
    leases = FakeLeases()
    leases.renew()
    ours = make(leases)
    ours.observe(FIRST, THEIRS)
    ours.on_write(SECOND, OURS)
    assert (ours.find_other(FIRST), ours.find_other(SECOND)) == (THEIRS, "")
    assert ours.find_other(JobRef("team-a", "third")) == ""
    assert ours.claimant("team-a").claims_first  # whoever writes first has the third one


async def test_claims_first_until_one_is_written() -> None:
    ours = make(FakeLeases())
    assert ours.claimant("team-a") == Claimant(OURS, claims_first=True)
    ours.on_write(FIRST, OURS)
    assert ours.claimant("team-a") == Claimant(OURS)
    ours.observe(FIRST, None)  # an older CRD does not store it
    assert ours.claimant("team-a") == Claimant(OURS)
    assert ours.claimant("team-b").claims_first


async def test_operator_outside_the_cluster_claims_nothing_and_leaves_claimed_namespaces() -> None:
    leases = FakeLeases()
    leases.renew()
    ours = make(leases, own="")
    assert ours.claimant("team-a") == Claimant()
    ours.on_write(FIRST, None)
    assert not ours.find_other(FIRST)
    ours.observe(FIRST, THEIRS)
    assert (ours.find_other(FIRST), ours.find_other(SECOND)) == (THEIRS, THEIRS)


async def test_forgotten_claims_read_no_lease() -> None:
    leases = FakeLeases()
    ours = make(leases)
    ours.observe(FIRST, THEIRS)
    ours.forget(FIRST)
    await ours.refresh()
    assert leases.reads == 0
    assert not ours.find_other(SECOND)


@pytest.mark.parametrize("claim", [None, "", 7, ["x"], {"a": 1}])
def test_claim_of_another_type_is_none(claim: object) -> None:
    ours = make(FakeLeases())
    ours.observe(FIRST, claim)
    assert not ours.find_other(FIRST)
    assert not Claimant(OURS).find_other(claim)


async def step(
    cluster: FakeCluster, claimant: Claimant, report: Progress | None = None, *, seconds: int = 1
) -> ReconcileResult:
    cluster.pass_time(timedelta(seconds=seconds))
    context = ReconcileContext(cluster.now, report, cluster.reports_since, claimant=claimant)
    return await reconcile(REF, cluster, INSTALLATION, context)


async def test_run_of_other_installation_is_not_touched() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest())
    assert cluster.job
    cluster.job["status"] = {"operator": THEIRS}
    result = await step(cluster, Claimant(OURS))
    assert result == ReconcileResult(belongs_to=THEIRS)
    assert cluster.writes == []


async def test_first_run_of_a_namespace_is_claimed_before_anything_is_created() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest())
    await step(cluster, Claimant(OURS, claims_first=True))
    assert cluster.status["operator"] == OURS
    assert cluster.created == []
    for _ in range(3):
        await step(cluster, Claimant(OURS))
    assert PREPARE in cluster.created


async def test_of_two_installations_one_claims_and_the_other_creates_nothing() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest())
    await step(cluster, Claimant(OURS, claims_first=True))
    for _ in range(3):
        assert (await step(cluster, Claimant(THEIRS, claims_first=True))).belongs_to == OURS
    assert cluster.created == []


async def test_finished_run_of_other_installation_is_not_cleaned_up() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest(ttl="1m"))
    assert cluster.job
    cluster.job["status"] = {
        "operator": THEIRS, "phase": "Failed", "reason": "InvalidSpec", "finishedAt": "2020-01-01T00:00:00Z"
    }  # fmt: skip
    assert (await step(cluster, Claimant(OURS))).belongs_to == THEIRS
    assert cluster.writes == []


async def test_run_that_was_taken_over_continues_and_is_not_hung() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest())
    for _ in range(3):
        await step(cluster, Claimant(THEIRS))
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    for _ in range(4):
        await step(cluster, Claimant(THEIRS))
    cluster.start_pod(TRAIN)
    await step(cluster, Claimant(THEIRS))
    await step(cluster, Claimant(THEIRS), Progress(percent=20, step=50, updated_at=cluster.now))
    assert cluster.status["operator"] == THEIRS
    assert cluster.status["phase"] == "Training"
    before = [*cluster.created]
    taken_over = Claimant(OURS, frozenset({THEIRS}), claims_first=True)
    for _ in range(30):  # its pod reports to the installation that is gone
        await step(cluster, replace(taken_over, claims_first=cluster.status["operator"] != OURS), seconds=600)
    assert (cluster.status["operator"], cluster.status["phase"]) == (OURS, "Training")
    assert cluster.created == before
    assert cluster.now - NOW > timedelta(hours=4)


class ApiWithOtherInstallation(Api):
    """An API server whose QLoRAJobs another installation has claimed, and its Lease."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = {"metadata": {"resourceVersion": "1"}}
        self.writes: list[tuple[str, dict[str, Any]]] = []
        manifest = make_manifest("first", "team-a")
        metadata = {"uid": "1", "generation": 1, "resourceVersion": "5", "creationTimestamp": NOW.isoformat()}
        self.job = {**manifest, "metadata": {**manifest["metadata"], **metadata}, "status": {"operator": THEIRS}}

    async def request(self, method: str, path: str, body: Any = None, **_: Any) -> dict[str, Any]:
        if method != "GET":
            self.writes.append((path, body))
            return {"metadata": {"resourceVersion": "6"}}
        if "/leases/" in path:
            if self.lease is None:
                raise NotFoundError(404, "NotFound", "404")
            return self.lease
        return self.job if path.endswith("/first") else {"metadata": {"resourceVersion": "9"}, "items": []}


async def test_operator_reports_a_namespace_that_it_leaves_and_takes_it_over() -> None:
    api = ApiWithOtherInstallation()
    election = LeaderElectionSettings("qlora-system", "pod", "qlora-operator")
    settings = Settings(Installation("trainer:1"), leader_election=election)
    controller = Controller(settings, api, Metrics(lambda: True))
    controller.metrics.jobs.start_leading(lambda _: None)
    controller.on_job_update(FIRST, api.job)
    for ref in (FIRST, FIRST, SECOND):
        assert await controller._reconcile(ref) is None
    assert [(path.rpartition("/")[2], body["reason"], body["type"]) for path, body in api.writes] == [
        ("events", "ServedByOtherInstallation", "Warning")
    ]
    assert f"namespace team-a is served by installation {THEIRS}, so {OURS} leaves" in api.writes[0][1]["note"]
    assert 'qlora_operator_namespace_served{namespace="team-a"} 0.0' in controller.metrics.render().decode()
    assert controller.unhealthy_reason() is None
    assert await controller._installations.refresh() == []
    api.lease = None
    assert sorted(await controller._installations.refresh()) == [FIRST, SECOND]
    assert 'namespace="team-a"' not in controller.metrics.render().decode()
    await controller._reconcile(FIRST)
    statuses = [body["status"] for path, body in api.writes if path.endswith("/first/status")]
    assert [status["operator"] for status in statuses] == [OURS]


async def test_error_is_not_written_into_the_status_of_another_installation() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest())
    assert cluster.job
    cluster.job["status"] = {"operator": THEIRS}
    context = ReconcileContext(NOW, claimant=Claimant(OURS))
    assert await write_error(REF, ValueError("x"), cluster, context) is None
    assert cluster.writes == []
