"""HTTP endpoint for the progress reports of running pods, in Kubeflow Trainer's status protocol.

A pod authenticates with its bound service account token, and can report for its own QLoRAJob only. Losing a report, or
the endpoint, never fails a run.
"""

import math
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Final

from aiohttp import web
from pydantic import ValidationError

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.names import Phase
from qlora_api.progress import ProgressReport
from qlora_api.units import KIB
from qlora_api.v1alpha1 import Checkpoint, Progress
from qlora_operator.cluster.interface import ClusterBusyError, TokenReviewer

MAX_BODY: Final = 64 * KIB
MAX_TOKEN: Final = 16 * KIB
TOKEN_CACHE_SECONDS: Final = 60.0
"""How long the review of a token is cached."""
MAX_CACHED_TOKENS: Final = 10_000
"""Maximum number of cached reviews; with more pods, tokens are just reviewed more often."""
STATUS_INTERVAL: Final = timedelta(seconds=5)
"""Minimum interval between two status updates that only progress causes."""
REPORTED_PHASES: Final = frozenset({Phase.TRAINING, Phase.EVALUATING, Phase.PUBLISHING})


class ReportRejectedError(Exception):
    """A report is rejected; becomes an HTTP status and a message for the caller."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ReportStore:
    """The last report of every running job, in memory."""

    def __init__(self) -> None:
        self._last: dict[JobRef, Progress] = {}

    def get(self, ref: JobRef) -> Progress | None:
        """Return the last report."""
        return self._last.get(ref)

    def put(self, ref: JobRef, report: Progress) -> None:
        """Replace the last report."""
        self._last[ref] = report

    def forget(self, ref: JobRef) -> None:
        """Drop the report of a run that is over."""
        self._last.pop(ref, None)


def read_report(report: ProgressReport, now: datetime) -> Progress:
    """Convert a report, whose numbers are strings on the wire; values that cannot be parsed are left out."""
    status = report.trainer_status
    metrics = {metric.name: metric.value for metric in status.metrics}
    speed = _to_float(metrics, "tokens_per_second")
    phase = metrics.get("phase")
    return Progress(
        percent=status.progress_percentage or 0,
        step=_to_int(metrics, "current_step"),
        total_steps=_to_int(metrics, "total_steps"),
        remaining_seconds=status.estimated_remaining_seconds,
        loss=_to_float(metrics, "loss"),
        tokens_per_second=speed if speed is not None and speed >= 0 else None,
        phase=Phase(phase) if phase in REPORTED_PHASES else None,
        checkpoint=_to_checkpoint(metrics),
        updated_at=now.replace(microsecond=0),
    )


def _to_float(metrics: Mapping[str, str], name: str) -> float | None:
    try:
        number = float(metrics[name])
    except (KeyError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _to_int(metrics: Mapping[str, str], name: str) -> int | None:
    number = _to_float(metrics, name)
    return int(number) if number is not None and number >= 0 else None


def _to_checkpoint(metrics: Mapping[str, str]) -> Checkpoint | None:
    values = {
        name: value for name in Checkpoint.model_fields if (value := metrics.get(f"checkpoint_{name}")) is not None
    }
    try:
        checkpoint = Checkpoint.model_validate(values)
    except ValidationError:
        return None
    # A time without its timezone is ambiguous.
    return checkpoint if checkpoint.time.tzinfo else None


class PodAuthorizer:
    """Checks that a token belongs to a pod of the QLoRAJob that it reports for."""

    def __init__(self, identities: TokenReviewer, clock: Callable[[], float]) -> None:
        self._identities = identities
        self._clock = clock
        self._authorized_until: dict[tuple[str, JobRef], float] = {}

    async def authorize(self, authorization: str, ref: JobRef) -> None:
        """Check that the token belongs to a pod of the job; ReportRejectedError if it does not."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not 0 < len(token) <= MAX_TOKEN:
            raise ReportRejectedError(401, "send the pod's token: Authorization: Bearer <token>")
        key = (sha256(token.encode()).hexdigest(), ref)
        if self._authorized_until.get(key, -math.inf) < self._clock():
            await self._review(token, ref)
            self._remember(key)

    def _remember(self, key: tuple[str, JobRef]) -> None:
        if len(self._authorized_until) >= MAX_CACHED_TOKENS:
            self._authorized_until.clear()
        self._authorized_until[key] = self._clock() + TOKEN_CACHE_SECONDS

    async def _review(self, token: str, ref: JobRef) -> None:
        pod = await self._identities.review_token(token)
        if pod is None:
            raise ReportRejectedError(
                401, f"the token is not a pod's, has expired, or lacks audience {names.TOKEN_AUDIENCE}"
            )
        job = await self._identities.job_of_pod(pod) if pod.namespace == ref.namespace else None
        if job != ref.name:
            raise ReportRejectedError(
                403, f"pod {pod.namespace}/{pod.name} does not belong to {names.KIND} {'/'.join(ref)}"
            )
        if await self._identities.read_job(ref) is None:
            raise ReportRejectedError(404, f"there is no {names.KIND} {'/'.join(ref)}")


Notify = Callable[[JobRef, timedelta], None]
"""Called with a job that has a new report, and the delay after which to reconcile it."""


class ProgressEndpoint:
    """Accepts progress reports."""

    def __init__(
        self, authorizer: PodAuthorizer, reports: ReportStore, notify: Notify, clock: Callable[[], datetime]
    ) -> None:
        self._authorizer = authorizer
        self._reports = reports
        self._notify = notify
        self._clock = clock

    def application(self) -> web.Application:
        """Return the web application."""
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_post(names.progress_path("{namespace}", "{job}"), self.post)
        return app

    async def post(self, request: web.Request) -> web.Response:
        """Accept one report."""
        ref = JobRef(request.match_info["namespace"], request.match_info["job"])
        try:
            await self._authorizer.authorize(request.headers.get("Authorization", ""), ref)
            await self._accept(ref, request)
        except ReportRejectedError as error:
            return web.json_response({"message": str(error)}, status=error.status)
        except ClusterBusyError as error:
            return web.json_response({"message": str(error)}, status=503)
        return web.json_response({})

    async def _accept(self, ref: JobRef, request: web.Request) -> None:
        try:
            report = ProgressReport.model_validate_json(await request.read())
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "body"
            raise ReportRejectedError(400, f"{field}: {first['msg']}") from error
        now, previous = self._clock(), self._reports.get(ref)
        self._reports.put(ref, read_report(report, now))
        age = now - previous.updated_at if previous else STATUS_INTERVAL
        self._notify(ref, max(STATUS_INTERVAL - age, timedelta(0)))
