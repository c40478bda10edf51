"""The endpoint that running pods post their progress to."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import ValidationError

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.progress import ProgressReport
from qlora_api.units import KIB
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.progress_server.expiring_cache import ExpiringCache
from qlora_operator.progress_server.pod_authorizer import MAX_CACHED_TOKENS, PodAuthorizer, ReportRejectedError
from qlora_operator.progress_server.reports import ReportStore, read_report

MAX_BODY: Final = 64 * KIB
REPORT_INTERVAL: Final = timedelta(seconds=1)
"""Mean interval between reports of one QLoRAJob from which on they are rejected; trainers report every 5 s."""
REPORT_BURST: Final = 5
"""Reports that a QLoRAJob may send at once: a trainer also reports each change of its phase."""

Notify = Callable[[JobRef, timedelta], None]
"""Called with a job that has a new report, and the delay after which to reconcile it."""


@web.middleware
async def close_connection(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer one request per connection: connections are few, and trainers report every 5 s."""
    try:
        response = await handler(request)
    except web.HTTPException as error:
        error.force_close()
        raise
    response.force_close()
    return response


class ProgressEndpoint:
    """Accepts progress reports."""

    def __init__(
        self, authorizer: PodAuthorizer, reports: ReportStore, notify: Notify, clock: Callable[[], datetime]
    ) -> None:
        self._authorizer = authorizer
        self._reports = reports
        self._notify = notify
        self._clock = clock
        self._next_report: ExpiringCache[JobRef, float] = ExpiringCache(MAX_CACHED_TOKENS, self._seconds)

    def application(self) -> web.Application:
        """Return the web application."""
        app = web.Application(client_max_size=MAX_BODY, middlewares=[close_connection])
        app.router.add_post(names.progress_path("{namespace}", "{job}"), self.post)
        return app

    async def post(self, request: web.Request) -> web.Response:
        """Accept one report."""
        ref = JobRef(request.match_info["namespace"], request.match_info["job"])
        try:
            job_uid = await self._authorizer.authorize(request.headers.get("Authorization", ""), ref)
            self._limit_rate(ref)
            await self._accept(ref, job_uid, request)
        except ReportRejectedError as error:
            if error.names_pod:
                self._reports.note_refused(ref, self._clock())
            return _reject(error)
        except ClusterBusyError as error:
            return _reject(ReportRejectedError(503, str(error), retry_after=1))
        return web.json_response({})

    def _seconds(self) -> float:
        return self._clock().timestamp()

    def _limit_rate(self, ref: JobRef) -> None:
        """Reject a report that exceeds the rate of its QLoRAJob (generic cell rate algorithm)."""
        interval, now = REPORT_INTERVAL.total_seconds(), self._seconds()
        wait = max((self._next_report.get(ref) or now) - now, 0.0)
        if REPORT_BURST - 1 < wait / interval <= REPORT_BURST:  # beyond, the clock was set back
            raise ReportRejectedError(429, f"report at most every {interval:.0f} s", retry_after=1)
        wait = wait + interval if wait / interval <= REPORT_BURST else interval
        self._next_report.put(ref, now + wait, wait)

    async def _accept(self, ref: JobRef, job_uid: str, request: web.Request) -> None:
        try:
            report = ProgressReport.model_validate_json(await request.read())
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "body"
            raise ReportRejectedError(400, f"{field}: {first['msg']}") from error
        now, previous = self._clock(), self._reports.get(ref)
        latest = read_report(report, now)
        self._reports.put(ref, latest, job_uid)
        urgent = previous is None or (previous.phase, previous.checkpoint) != (latest.phase, latest.checkpoint)
        self._notify(ref, self._reports.time_to_status(ref, now, urgent=urgent))


def _reject(error: ReportRejectedError) -> web.Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return web.json_response({"message": str(error)}, status=error.status, headers=headers)
