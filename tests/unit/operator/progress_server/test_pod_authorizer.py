"""Who may report for a QLoRAJob, and how often the API server is asked, by everybody together."""

import asyncio
from datetime import timedelta
from typing import Final

import pytest

from qlora_api.job_ref import JobRef
from qlora_operator.cluster.interface import ClusterBusyError, PodIdentity, PodOwner
from qlora_operator.progress_server import PodAuthorizer, pod_authorizer
from qlora_operator.progress_server.pod_authorizer import (
    MAX_REVIEWS,
    REFUSAL_CACHE_SECONDS,
    REFUSAL_PAUSE_SECONDS,
    TOKEN_CACHE_SECONDS,
    ReportRejectedError,
)
from tests.fakes import FakeTokenReviewer
from tests.make import NOW, REF, UID, make_token

POD: Final = PodIdentity(REF.namespace, "support-bot-1-0-abcde", "uid-1")
TOKEN: Final = make_token(POD)
CLIENTS: Final = 2_000


class Setup:
    """An authorizer with a clock that tests move, and a cluster with one pod."""

    def __init__(self, owner: PodOwner | None = None) -> None:
        self.seconds = 0.0
        self.reviewer = FakeTokenReviewer({TOKEN: POD}, {POD: owner or PodOwner(REF.name, UID, NOW)})
        self.reviewer.cached_pods = {POD.uid}
        self.authorizer = PodAuthorizer(self.reviewer, lambda: self.seconds, lambda: NOW)

    async def code(self, token: str = TOKEN, ref: JobRef = REF) -> int:
        """Return the HTTP status that a token gets."""
        try:
            await self.authorizer.authorize(f"Bearer {token}", ref)
        except ReportRejectedError as error:
            return error.status
        except ClusterBusyError:
            return 503
        return 200

    async def flood(self, tokens: list[str]) -> asyncio.Task[list[int]]:
        """Send tokens at once, and return when all wait or are answered."""
        task = asyncio.create_task(self._send(tokens))
        for _ in range(10):
            await asyncio.sleep(0)
        return task

    async def _send(self, tokens: list[str]) -> list[int]:
        return list(await asyncio.gather(*(self.code(token) for token in tokens)))


@pytest.fixture
def setup() -> Setup:
    return Setup()


def forge(number: int, uid: str = "uid-unknown") -> str:
    """Return one of many tokens that only the API server can tell from a pod's."""
    return make_token(POD._replace(uid=uid), jti=str(number))


@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param([""] * CLIENTS, id="no-token"),
        pytest.param([f"random{number}" for number in range(CLIENTS)], id="random-text"),
        pytest.param([make_token(POD, jti=str(number), exp=1) for number in range(CLIENTS)], id="expired"),
        pytest.param([make_token(POD, jti=str(number), aud="other") for number in range(CLIENTS)], id="audience"),
    ],
)
async def test_flood_of_implausible_tokens_asks_nobody(setup: Setup, tokens: list[str]) -> None:
    assert set(await (await setup.flood(tokens))) == {401}
    assert setup.reviewer.reviews == 0


async def test_token_of_another_namespace_asks_nobody(setup: Setup) -> None:
    assert await setup.code(make_token(POD._replace(namespace="other"))) == 403
    assert setup.reviewer.reviews == 0


async def test_flood_of_forged_tokens_is_one_review_and_keeps_no_pod_waiting(setup: Setup) -> None:
    setup.reviewer.answering.clear()
    flood = await setup.flood([forge(number, f"uid-{number + 2}") for number in range(CLIENTS)])
    assert setup.reviewer.reviews == 1
    honest = await setup.flood([TOKEN])
    assert setup.reviewer.reviews == 2, "the pod is reviewed beside the flood"
    setup.reviewer.answering.set()
    assert await honest == [200]
    answers = await flood
    assert (answers.count(503), answers.count(401)) == (CLIENTS - 1, 1)
    assert setup.reviewer.max_in_flight == 2


async def test_flood_in_the_name_of_one_pod_is_one_review(setup: Setup) -> None:
    setup.reviewer.answering.clear()
    flood = await setup.flood([forge(number, POD.uid) for number in range(CLIENTS)])
    setup.reviewer.answering.set()
    assert (await flood).count(503) == CLIENTS - 1
    assert setup.reviewer.reviews == 1


async def test_reviews_in_flight_are_bounded(setup: Setup) -> None:
    setup.reviewer.cached_pods = {f"uid-{number}" for number in range(CLIENTS)}
    setup.reviewer.answering.clear()
    flood = await setup.flood([forge(number, f"uid-{number}") for number in range(CLIENTS)])
    assert setup.reviewer.reviews == MAX_REVIEWS
    setup.reviewer.answering.set()
    await flood
    assert setup.reviewer.max_in_flight == MAX_REVIEWS


async def test_forged_tokens_are_reviewed_ten_times_a_second(setup: Setup) -> None:
    for number in range(100):
        setup.seconds = number / 100
        await setup.code(forge(number))
    assert setup.reviewer.reviews <= 1 / REFUSAL_PAUSE_SECONDS


async def test_renewal_does_not_wait_for_forged_tokens(setup: Setup) -> None:
    setup.reviewer.cached_pods = set()
    assert await setup.code() == 200
    setup.seconds = TOKEN_CACHE_SECONDS + 1
    assert await setup.code(forge(1)) == 401
    assert await setup.code() == 200


async def test_review_that_takes_too_long_is_given_up(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_authorizer, "REVIEW_SECONDS", 0.01)
    setup.reviewer.answering.clear()
    assert await setup.code() == 503
    setup.reviewer.answering.set()
    assert await setup.code() == 200, "it holds no slot any more"


async def test_refusal_is_remembered_for_a_while(setup: Setup) -> None:
    assert [await setup.code(forge(1)) for _ in range(5)] == [401] * 5
    assert setup.reviewer.reviews == 1
    setup.seconds = REFUSAL_CACHE_SECONDS + 1
    assert await setup.code(forge(1)) == 401
    assert setup.reviewer.reviews == 2


async def test_remembered_tokens_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_authorizer, "MAX_CACHED_TOKENS", 10)
    setup = Setup()
    for number in range(100):
        setup.seconds = float(number)
        await setup.code(forge(number))
    assert len(setup.authorizer._refused) == 10
    assert len(setup.authorizer._paused) <= 10


@pytest.mark.parametrize(
    ("owner", "code"),
    [
        pytest.param(PodOwner(REF.name, UID, NOW), 200, id="controlled-by-it"),
        pytest.param(PodOwner(REF.name, "uid-of-earlier", NOW), 403, id="controlled-by-an-earlier-one"),
        pytest.param(PodOwner(REF.name, None, NOW), 200, id="own-script"),
        pytest.param(PodOwner(REF.name, None, NOW - timedelta(seconds=1)), 403, id="own-script-of-an-earlier-one"),
        pytest.param(PodOwner("another", UID, NOW), 403, id="label-of-another"),
    ],
)
async def test_pod_of_an_earlier_job_with_the_same_name_is_refused(owner: PodOwner, code: int) -> None:
    assert await Setup(owner).code() == code


async def test_trust_ends_with_the_job(setup: Setup) -> None:
    assert await setup.code() == 200
    setup.seconds = 1.0
    setup.reviewer.job_uids[REF] = "uid-of-the-next"
    setup.authorizer.on_job_delete(REF)
    assert await setup.code() == 403


async def test_review_from_before_the_deletion_is_not_trusted(setup: Setup) -> None:
    setup.reviewer.answering.clear()
    early = await setup.flood([TOKEN])
    setup.seconds = 1.0
    setup.authorizer.on_job_delete(REF)
    setup.reviewer.answering.set()
    assert await early == [200]
    setup.reviewer.job_uids[REF] = "uid-of-the-next"
    assert await setup.code() == 403
