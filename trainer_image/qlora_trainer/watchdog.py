"""Ends a process that gives no sign of life, so that it holds no GPU, and leaves what its threads were doing."""

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

from qlora_api.logs import log_fields
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
"""Folder of a result with the stacks of processes that were ended."""
_POLL_SECONDS: Final = 5.0
"""Longest time between two looks; a tenth of the limit where that is shorter."""
_UPLOAD_SECONDS: Final = 30.0
"""Longest wait for the upload: the object store may be what the process hangs on."""
_PEERS_SECONDS: Final = 20.0
"""How long a process that is not alone stays: the launcher ends all of them with the first one, and each has stacks."""
_LAST_SECONDS: Final = _UPLOAD_SECONDS + FINAL_UPLOAD_SECONDS + _PEERS_SECONDS + 30.0
"""When the C-level timer strikes after the limit: later than everything that this module does by itself."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def watchdog_running(liveness: Liveness, limit: float, on_silence: Callable[[], None]) -> Iterator[None]:
    """Within, a silence longer than so many seconds is the end."""
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


def _watch(liveness: Liveness, limit: float, end: Callable[[], None], closed: threading.Event) -> None:
    while not closed.wait(min(_POLL_SECONDS, limit / 10)):
        # Native code that keeps Python's lock stops this thread as well; a timer that needs no lock is the second line.
        faulthandler.dump_traceback_later(limit + _LAST_SECONDS, exit=True)
        if liveness.seconds_silent() > limit:
            end()
            return


def run_watchdog(
    config: RunConfig, termination_message: TerminationMessageWriter, log_uploader: LogUploader
) -> contextlib.AbstractContextManager[None]:
    """Return what ends this process of a run after spec.deadlines.heartbeat without a sign of life."""
    limit = to_timedelta(config.spec.deadlines.heartbeat).total_seconds()
    return watchdog_running(LIVENESS, limit, lambda: end_hung_process(config, termination_message, log_uploader))


def end_hung_process(
    config: RunConfig, termination_message: TerminationMessageWriter, log_uploader: LogUploader
) -> None:
    """Leave the stacks, the last word and the log, and end the process without asking any other thread."""
    stacks = dump_stacks()
    sys.stderr.write(stacks)
    uploaded = upload_stacks(config, stacks)
    where = uploaded or "this container's log: they could not be uploaded"
    known = RunError(
        Reason.HEARTBEAT_LOST,
        f"no sign of life for {config.spec.deadlines.heartbeat} (spec.deadlines.heartbeat); the stacks of all threads "
        f"are in {where}",
    )
    termination_message.write_failure(known)
    log.error("the run failed: %s", known.message, extra=log_fields(reason=known.reason))
    if uploaded:
        log_uploader.finish()
    if config.plan.processes > 1:
        time.sleep(_PEERS_SECONDS)
    os._exit(1)


def dump_stacks() -> str:
    """Return the stack of each thread of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def upload_stacks(config: RunConfig, stacks: str) -> str | None:
    """Return the URI of the uploaded stacks; None where that failed or took too long."""
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
