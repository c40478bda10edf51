"""Terminates a hung process, so that it does not hold a GPU, and uploads the stack traces of its threads."""

import contextlib
import faulthandler
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from qlora_api.escapes import escape_text
from qlora_api.logs.formatters import log_fields
from qlora_api.reasons import Reason
from qlora_api.runconfig import RunConfig
from qlora_api.v1alpha1 import to_timedelta
from qlora_trainer.errors import RunError
from qlora_trainer.observability.log_upload import FINAL_UPLOAD_SECONDS, LogUploader
from qlora_trainer.runtime.liveness import LIVENESS, Liveness
from qlora_trainer.runtime.rank import rank_of_process
from qlora_trainer.runtime.termination_message import TerminationMessageWriter
from qlora_trainer.storage.results import open_own_output

HANGS: Final = "hangs"
"""Folder of a result with the stack traces of processes that the watchdog terminated."""
_POLL_SECONDS: Final = 5.0
"""Longest poll interval; a tenth of the limit if that is shorter."""
_UPLOAD_SECONDS: Final = 30.0
"""Longest wait for the upload: the process may be hanging on the object store."""
_PEERS_SECONDS: Final = 20.0
"""Delay before one of several processes exits: the launcher then terminates the others, which have stacks to upload."""
_LAST_SECONDS: Final = _UPLOAD_SECONDS + FINAL_UPLOAD_SECONDS + _PEERS_SECONDS + 30.0
"""Time from the limit to the C-level timer: longer than everything that this module does in Python."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def watchdog_running(liveness: Liveness, limit: float, on_silence: Callable[[], None]) -> Iterator[None]:
    """Call `on_silence` once if no heartbeat arrives for `limit` seconds within the block."""
    closed = threading.Event()
    thread = threading.Thread(target=_watch, args=(liveness, limit, on_silence, closed), name="watchdog", daemon=True)
    liveness.tick()
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()


def _watch(liveness: Liveness, limit: float, on_silence: Callable[[], None], closed: threading.Event) -> None:
    while not closed.wait(min(_POLL_SECONDS, limit / 10)):
        # Native code that holds the GIL blocks this thread as well; faulthandler's timer needs no GIL.
        faulthandler.dump_traceback_later(limit + _LAST_SECONDS, exit=True)
        if liveness.seconds_silent() > limit:
            on_silence()
            return


def run_watchdog(
    config: RunConfig, termination_message: TerminationMessageWriter, log_uploader: LogUploader
) -> contextlib.AbstractContextManager[None]:
    """Return the watchdog that terminates this process after spec.deadlines.heartbeat without a heartbeat."""
    limit = to_timedelta(config.spec.deadlines.heartbeat).total_seconds()
    return watchdog_running(LIVENESS, limit, lambda: end_hung_process(config, termination_message, log_uploader))


def end_hung_process(
    config: RunConfig, termination_message: TerminationMessageWriter, log_uploader: LogUploader
) -> None:
    """Write stack traces, termination message and log, and exit without waiting for any other thread."""
    stacks = dump_stacks()
    sys.stderr.write(escape_text(stacks))
    uploaded = upload_stacks(config, stacks)
    location = uploaded or "this container's log: they could not be uploaded"
    run_error = RunError(
        Reason.HEARTBEAT_LOST,
        f"no heartbeat for {config.spec.deadlines.heartbeat} (spec.deadlines.heartbeat); the stack traces of all "
        f"threads are in {location}",
    )
    termination_message.write_failure(run_error)
    log.error("the run failed: %s", run_error.message, extra=log_fields(reason=run_error.reason))
    if uploaded:
        log_uploader.finish()
    if config.plan.processes > 1:
        time.sleep(_PEERS_SECONDS)
    os._exit(1)


def dump_stacks() -> str:
    """Return the stack traces of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def upload_stacks(config: RunConfig, stacks: str) -> str | None:
    """Upload the stack traces and return their URI; None if that failed or timed out."""
    path = f"{config.prepared.digest}/{HANGS}/attempt-{config.attempt}-rank-{rank_of_process() or 0}.txt"
    done: list[str] = []

    def upload() -> None:
        output = open_own_output(config)
        output.put(path, stacks.encode())
        done.append(f"{output.root}/{path}")

    thread = threading.Thread(target=upload, name="stacks", daemon=True)
    thread.start()
    thread.join(_UPLOAD_SECONDS)
    return done[0] if done else None
