"""A gang of which a quota refuses some pods: its reason, and what the pods that were created hold."""

from datetime import timedelta
from typing import Final

from qlora_api.reasons import Domain, Reason
from tests.fake_kubernetes import FakeKubernetes, has_ended, name_of
from tests.make import PREPARED_MESSAGE, make_termination_message
from tests.unit.operator.life import PREPARE
from tests.unit.operator.simulation import Simulation, train

MINUTE: Final = timedelta(minutes=1)
HOUR: Final = timedelta(hours=1)
REFUSAL: Final = "exceeded quota: gpus, requested: requests.nvidia.com/gpu=8, used: requests.nvidia.com/gpu=8"


class KubernetesWithQuota(FakeKubernetes):
    """Admits one training pod at a time."""

    def _create_pods(self, name: str, job: dict[str, object], known: set[int]) -> None:
        training = [pod for pod in self.cluster.pods.values() if "-prepare-" not in name_of(pod)]
        self.refusal = REFUSAL if any(not has_ended(pod) for pod in training) and name != PREPARE else ""
        super()._create_pods(name, job, known)


async def gang_over_quota() -> Simulation:
    run = Simulation(resources={"nodes": 2, "gpusPerNode": 8}, training={"globalBatchSize": 16})
    run.kubernetes = KubernetesWithQuota(run.cluster)
    run.kubernetes.pods_per_step = 1
    await run.run(MINUTE)
    run.kubernetes.end_trainer(PREPARE, 0, PREPARED_MESSAGE)
    await run.run(2 * MINUTE)
    return run


async def test_gang_over_quota_is_rejected_with_sentence_of_quota() -> None:
    run = await gang_over_quota()
    assert run.outcome == ("Scheduling", "PodRejected")
    assert REFUSAL in run.status["message"]
    await run.run(30 * MINUTE)
    [first, *_] = run.status["attempts"]
    assert (first["reason"], first["domain"]) == (Reason.POD_REJECTED, Domain.CLUSTER)
    assert first["lackingPods"] == 1
    assert first["message"] == f"1 of 2 pods of Job {train(1)} were not created: {REFUSAL}"
    assert "avoidedNodes" not in run.status["attempts"][-1]


async def test_gang_over_quota_gives_nodes_back_and_does_not_fail_within_patience() -> None:
    run = await gang_over_quota()
    await run.run(6 * HOUR, 2 * MINUTE)
    assert run.outcome == ("Scheduling", "PodRejected")
    assert run.kubernetes.held < 0.6 * 6 * HOUR
    assert len(run.ends) <= 8


async def test_rendezvous_that_times_out_for_lack_of_a_refused_pod_blames_the_quota() -> None:
    run = await gang_over_quota()
    await run.run(10 * MINUTE)
    message = make_termination_message(Reason.COLLECTIVE_TIMEOUT, "1 of 2 processes did not join")
    run.kubernetes.end_trainer(train(1), 1, message)
    await run.run(2 * MINUTE)
    [first, *_] = run.status["attempts"]
    assert (first["reason"], first["domain"]) == (Reason.POD_REJECTED, Domain.CLUSTER)
    assert REFUSAL in first["message"]


async def test_gang_trains_once_quota_has_room() -> None:
    run = await gang_over_quota()
    run.kubernetes = FakeKubernetes(run.cluster)
    await run.run(2 * MINUTE)
    assert len(run.cluster.pods_of(train(1))) == 2
    assert run.outcome == ("Training", "Training")
