"""Decides whether a token belongs to a pod of the QLoRAJob that it reports for, with few API calls."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from hashlib import sha256
from typing import Final, NamedTuple

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_operator.cluster.interface import ClusterBusyError, PodIdentity, PodOwner, TokenReviewer
from qlora_operator.models import RawJob
from qlora_operator.progress_server.expiring_cache import ExpiringCache
from qlora_operator.progress_server.token_claims import MAX_TOKEN, read_claims

TOKEN_CACHE_SECONDS: Final = 60.0
"""How long an accepted token is cached."""
REFUSAL_CACHE_SECONDS: Final = 10.0
"""How long a refused token is cached: two intervals in which a trainer reports."""
REFUSAL_PAUSE_SECONDS: Final = 0.1
"""Pause of a slot after a refused token: ten forged tokens in a second are no load for an API server."""
MAX_CACHED_TOKENS: Final = 10_000
"""Maximum number of cached reviews; with more pods, tokens are just reviewed more often."""
MAX_REVIEWS: Final = 4
"""TokenReviews in flight; at 10 ms each, four are 400 pods in a second, each of which needs one in a minute."""
REVIEW_SECONDS: Final = 5.0
"""Timeout of one review in seconds, waiting included; the trainer's client gives up after as many."""
_UNAUTHENTICATED: Final = 401
_UNKNOWN_POD: Final = ""
"""Stands for all pods that are not in the cache of children; they share one review at a time."""


class ReportRejectedError(Exception):
    """A report is rejected; becomes an HTTP status and a message for the caller."""

    def __init__(self, status: int, message: str, retry_after: int | None = None, *, names_pod: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        """Seconds after which to try again."""
        self.names_pod = names_pod
        """Whether the token, which nobody vouches for, names a pod of the QLoRAJob by its uid."""


class _Refusal(NamedTuple):
    status: int
    message: str
    names_pod: bool

    def to_error(self) -> ReportRejectedError:
        return ReportRejectedError(self.status, self.message, names_pod=self.names_pod)


class _Acceptance(NamedTuple):
    job_uid: str
    reviewed_at: float


_Key = tuple[str, JobRef]


class PodAuthorizer:
    """Checks that a token belongs to a pod of the QLoRAJob that it reports for.

    Forged tokens cost little: the claims are read first, and refusals are cached. A pod in the cache of children never
    waits for pods that are not in it: its uid cannot be guessed.
    """

    def __init__(self, reviewer: TokenReviewer, clock: Callable[[], float], now: Callable[[], datetime]) -> None:
        self._reviewer = reviewer
        self._clock = clock
        self._now = now
        self._accepted: ExpiringCache[_Key, _Acceptance] = ExpiringCache(MAX_CACHED_TOKENS, clock)
        self._refused: ExpiringCache[_Key, _Refusal] = ExpiringCache(MAX_CACHED_TOKENS, clock)
        self._deleted: ExpiringCache[JobRef, float] = ExpiringCache(MAX_CACHED_TOKENS, clock)
        self._paused: ExpiringCache[str, bool] = ExpiringCache(MAX_CACHED_TOKENS, clock)
        self._reviewing: set[str] = set()
        self._slots = asyncio.Semaphore(MAX_REVIEWS)

    def on_job_delete(self, ref: JobRef) -> None:
        """Review every token of a deleted QLoRAJob again: the next one of that name has other pods."""
        self._deleted.put(ref, self._clock(), TOKEN_CACHE_SECONDS)

    async def authorize(self, authorization: str, ref: JobRef) -> str:
        """Return the uid of the QLoRAJob whose pod the token belongs to.

        Raises:
            ReportRejectedError: The token does not belong to a pod of the QLoRAJob, or cannot be reviewed now.
            ClusterBusyError: The API server is unavailable or overloaded.

        """
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not 0 < len(token) <= MAX_TOKEN:
            raise ReportRejectedError(401, "send the pod's token: Authorization: Bearer <token>")
        claimed = read_claims(token, self._now())
        if claimed is None:
            raise _not_a_token()
        if claimed.namespace != ref.namespace:
            raise _not_of_job(claimed, ref)
        key = (sha256(token.encode()).hexdigest(), ref)
        accepted = self._accepted.get(key)
        deleted_at = self._deleted.get(ref)
        if accepted is not None and (deleted_at is None or accepted.reviewed_at > deleted_at):
            return accepted.job_uid
        refusal = self._refused.get(key)
        if refusal is not None:
            raise refusal.to_error()
        return await self._review(token, claimed, key)

    async def _review(self, token: str, claimed: PodIdentity, key: _Key) -> str:
        started = self._clock()
        async with self._slot(self._slot_of(claimed, key)) as slot:
            try:
                job_uid = await self._ask(token, key[1])
            except ReportRejectedError as error:
                names_pod = error.status == _UNAUTHENTICATED and self._reviewer.caches_pod(key[1], claimed.uid)
                refusal = _Refusal(error.status, str(error), names_pod)
                self._refused.put(key, refusal, REFUSAL_CACHE_SECONDS)
                self._paused.put(slot, True, REFUSAL_PAUSE_SECONDS)
                raise refusal.to_error() from error
        self._accepted.put(key, _Acceptance(job_uid, started), TOKEN_CACHE_SECONDS)
        return job_uid

    def _slot_of(self, claimed: PodIdentity, key: _Key) -> str:
        """Return what a review is for: a token that was accepted before, a cached pod, or one of all other pods."""
        if key in self._accepted:
            return key[0]
        return claimed.uid if self._reviewer.caches_pod(key[1], claimed.uid) else _UNKNOWN_POD

    @asynccontextmanager
    async def _slot(self, slot: str) -> AsyncIterator[str]:
        """Wait for one of the reviews in flight; each slot has at most one, and pauses after a refusal."""
        if slot in self._reviewing or self._paused.get(slot):
            raise ReportRejectedError(503, "too many tokens to review; report again later", retry_after=1)
        self._reviewing.add(slot)
        try:
            async with asyncio.timeout(REVIEW_SECONDS), self._slots:
                yield slot
        except TimeoutError as error:
            raise ClusterBusyError("the token was not reviewed in time") from error
        finally:
            self._reviewing.discard(slot)

    async def _ask(self, token: str, ref: JobRef) -> str:
        pod = await self._reviewer.review_token(token)
        if pod is None:
            raise _not_a_token()
        owner = await self._reviewer.owner_of_pod(pod) if pod.namespace == ref.namespace else None
        if owner is None or owner.job != ref.name:
            raise _not_of_job(pod, ref)
        job = await self._reviewer.read_job(ref)
        if job is None:
            raise ReportRejectedError(404, f"there is no {names.KIND} {'/'.join(ref)}")
        if not _belongs_to(owner, job):
            raise ReportRejectedError(
                403, f"pod {pod.namespace}/{pod.name} belongs to an earlier {names.KIND} {'/'.join(ref)}"
            )
        return job.uid


def _belongs_to(owner: PodOwner, job: RawJob) -> bool:
    """Return whether a pod belongs to this QLoRAJob, not to an earlier one with its name.

    A pod that nobody's Job controls has only the label; it is of an earlier one if it is older than this one.
    """
    return owner.job_uid == job.uid if owner.job_uid else owner.pod_created_at >= job.created_at


def _not_a_token() -> ReportRejectedError:
    return ReportRejectedError(401, f"the token is not a pod's, has expired, or lacks audience {names.TOKEN_AUDIENCE}")


def _not_of_job(pod: PodIdentity, ref: JobRef) -> ReportRejectedError:
    return ReportRejectedError(403, f"pod {pod.namespace}/{pod.name} does not belong to {names.KIND} {'/'.join(ref)}")
